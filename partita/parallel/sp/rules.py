"""Sequence parallelism (Korthikanti et al. 2022): outside tp's regions the tokens are cut over tp.

It rewrites tp's regions: copy_to -> gather_from, reduce_from -> scatter_to, and cuts seq outside. Same
volume, plus one all-gather a sub-block in backward, since the shard is what is kept. A sum that cut
tensors still need whole keeps its all-reduce (the loss). Norm weights and row biases then see only a
share of the tokens: their gradients are partial over tp, one small all-reduce a step.
"""

from __future__ import annotations

from collections.abc import Iterable

from partita.base.errors import Problem
from partita.parallel.room import (
    Request,
    cut,
    cut_space,
    error,
    filled_up,
    gather_from,
    scatter_to,
    sum_rule,
)
from partita.spec.program import Block, Op, Program, rewrite


def problems(job: Request) -> list[Problem]:
    """There is a sequence; where tp does not divide it, it is filled up."""
    tp = job.plan.mesh.tp
    if not job.plan.mesh.sp or tp == 1:
        return []
    if job.model.image is None:
        return filled_up(job, "sp", f"tp{tp}+sp") if job.plan.mesh.cp == 1 else []
    message = (
        "an image is a sequence of one place: between its layers tp cuts channels, and +sp has "
    )
    message += "nothing to cut"
    nearest = str(job.plan.with_("mesh", sp=False))
    asked, limit = f"tp{tp}+sp", "a model of sequences"
    return [error("sp", "seq_len", message, asked=asked, limit=limit, nearest=nearest)]


def lay(job: Request, program: Program) -> Program:
    """Turns tp's regions; the program must have been laid by tp."""
    if not job.plan.mesh.sp or job.plan.mesh.tp == 1:
        return program
    return program.map(_lay_block)


def _lay_block(block: Block) -> Block:
    inside: set[str] = set()  # tensors that every tp rank holds whole along seq
    t, ops = block.tensors, block.ops()

    def touches(op: Op) -> bool:
        names = (*op.reads, op.writes, *op.weights)
        return any(n in inside or "tp" in t[n].axes() or "tp" in t[n].partial for n in names)

    def change(op: Op) -> Iterable[Op]:
        if op.axes != ("tp",):
            if touches(op):
                inside.update((op.writes, *op.reads, *op.scratch))
                return (op,)
            return (cut_space(op, ("seq",), "tp"),)
        x, y = op.reads[0], op.writes
        writer = op.name.partition(":")[0]
        if op.kind == "copy_to":
            inside.add(y)
            again = any(x in o.saves for o in ops if y in o.reads)
            return (gather_from(writer, ("tp",), x, y, again),)
        inside.add(x)
        readers = [o for o in ops if y in o.reads]
        if t[y].role == "value" and not any(touches(o) for o in readers):
            return (scatter_to(writer, ("tp",), x, y),)
        inside.add(y)
        return (op,)

    block = rewrite(block, change)
    outside = {
        n for n, x in t.items() if n not in inside and "tp" not in x.axes() and x.role != "weight"
    }
    block = cut(block, ("seq",), "tp", lambda x: x.name in outside)
    return sum_rule(block, "tp")

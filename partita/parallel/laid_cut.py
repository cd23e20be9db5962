"""What a microbatch's program becomes where rooms cut its dims: the first half of laying a plan.

    ORDER  split, dp, cp, tp, sp, ep

It follows from the plan's mesh, context and expert alone: plans that differ in what is recomputed, in states,
schedule, precision or offload share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from partita.parallel.cp import rules as cp
from partita.parallel.dp import rules as dp
from partita.parallel.ep import rules as ep
from partita.parallel.room import Request
from partita.parallel.sp import rules as sp
from partita.parallel.split import rules as split
from partita.parallel.tp import rules as tp
from partita.spec.families import program as family_program
from partita.spec.families.moe import capacity
from partita.spec.frozen import freeze
from partita.spec.plan import Plan
from partita.spec.program import Block, Dim, Op, Program, Tensor, rewrite


def cut(request: Request) -> Program:
    """The program with every dim cut, and the regions that follow from that."""
    plan = request.plan
    alone = Plan(mesh=plan.mesh, context=plan.context, expert=plan.expert)
    return _cut(replace(request, plan=alone, state_words=0))


@lru_cache(maxsize=256)
def _cut(request: Request) -> Program:
    return cut_blocks(request, whole(request))


def whole(request: Request) -> Program:
    """The program before any room has cut it, its frozen weights marked."""
    batch = request.micro_batch_size * request.plan.data_parallel_size
    found = freeze(family_program(request.model, batch, request.laid_len), request.frozen)
    if request.laid_len > request.seq_len:
        found = found.map(lambda block: _limited(block, request))
    return found.map(_masked) if request.masks_samples else found


def _limited(block: Block, request: Request) -> Block:
    """With the capacity that experts have of a sequence before it was filled up."""
    if "capacity" not in block.tensors:
        return block
    rows = Dim("capacity", capacity(request.model, request.seq_len))
    limit = replace(block.tensors["capacity"], dims=(rows,))
    return replace(block, tensors={**block.tensors, "capacity": limit})


def _masked(block: Block) -> Block:
    """With what attention holds of each sample where documents are packed: which keys a query sees, and what
    is added to its scores (cp/visible.py, cp/tile.py), with ALiBi apart from what all samples share."""
    tensors = dict(block.tensors)

    def change(op: Op) -> Iterator[Op]:
        if op.kind == "attention" and len(op.reads) == 3:
            of = {d.name: d for d in op.space}
            dims = tuple(of[n] for n in ("batch", "seq", "keys"))
            tensors["seen"], added = Tensor("seen", dims, "mask"), Tensor("added", dims)
            if "falls" in tensors:
                added = replace(
                    tensors["falls"], name="added", dims=(of["batch"], *tensors["falls"].dims)
                )
            tensors["added"] = added
            op = replace(op, scratch=(*op.scratch, "seen", "added"))
        yield op

    return rewrite(block, change, tensors)


def cut_blocks(request: Request, program: Program) -> Program:
    """Some blocks with every dim cut: what becomes of one does not depend on the others."""
    return ep.lay(request, cut_tokens(request, program))


def cut_tokens(request: Request, program: Program) -> Program:
    """The same before experts are cut, which is alike wherever they lie."""
    for room in (split, dp, cp, tp, sp):
        program = room.lay(request, program)
    return program


def with_samples(block: Block, times: int) -> Block:
    """A cut block whose microbatch has so many times the samples: rooms ask nothing of their number."""
    if times == 1:
        return block

    def more(dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        return _more_dims(dims, times)

    tensors = {n: t.with_dims(more(t.dims)) for n, t in block.tensors.items()}
    return rewrite(block, lambda op: (op.over(more),), tensors)


def _more_dims(dims: tuple[Dim, ...], times: int) -> tuple[Dim, ...]:
    if not any(d.name == "batch" or "batch" in d.of for d in dims):
        return dims
    return tuple(_more(d, times) for d in dims)


@lru_cache(maxsize=65_536)
def _more(d: Dim, times: int) -> Dim:
    of_samples = d.name == "batch" or "batch" in d.of
    return replace(d, size=d.size * times) if of_samples else d

"""Tensor parallelism (Shoeybi et al. 2019): heads, ffn and vocab lie on tp.

The rules of room.py find every collective: copy_to before the column-parallel linears, reduce_from
behind the row-parallel ones, the embedding and the three small sums of the loss: one all-reduce a
sub-block and direction; forward one for both, where attention and mlp stand side by side. Fewer kv heads
than ranks: neighbours share one, and its gradient is partial over 'tp/share'. A vocabulary or an ffn that
does not divide is padded; padding belongs to no box, and an ffn's is zeros that stay: what they make is
zero, and so is their gradient.
"""

from __future__ import annotations

from partita.base.errors import Problem
from partita.parallel.room import (
    Request,
    copy_rule,
    cut_everywhere,
    error,
    sum_once,
    sum_rule,
)
from partita.spec.program import Block, Program

DIMS = ("heads", "kv_heads", "ffn", "vocab")


def problems(job: Request) -> list[Problem]:
    """tp divides heads; kv heads divide tp or the other way round."""
    tp, m = job.plan.mesh.tp, job.model
    found = []
    if tp > 1 and m.heads % tp:
        found.append(_divides("heads", "query heads", m.heads, tp, job))
    if tp > 1 and m.kv_heads % tp and tp % m.kv_heads:
        found.append(_divides("kv_heads", "key/value heads", m.kv_heads, tp, job))
    return found


def legal(job: Request, tp: int) -> bool:
    """Whether every dim of the model lies on tp ranks."""
    m = job.model
    shares = m.kv_heads % tp == 0 or tp % m.kv_heads == 0
    return m.heads % tp == 0 and shares


def _divides(rule: str, what: str, size: int, tp: int, job: Request) -> Problem:
    fits = [n for n in range(1, job.model.heads + 1) if legal(job, n)]
    near = max((n for n in fits if n <= tp), default=1)
    nearest = str(job.plan.with_("mesh", tp=near, sp=job.plan.mesh.sp and near > 1))
    law = "one must divide the other" if rule == "kv_heads" else "tp must divide them"
    message = f"{size} {what} cannot lie on {tp} ranks: {law}; tp may be {_list(fits)}"
    return error(
        "tp", rule, message, asked=f"tp{tp}", limit=f"tp in {_list(fits)}", nearest=nearest
    )


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")


def lay(job: Request, program: Program) -> Program:
    """Cuts DIMS by tp and inserts its regions. Nothing moves at tp 1."""
    if job.plan.mesh.tp == 1:
        return program

    def block(b: Block) -> Block:
        return sum_once(sum_rule(copy_rule(cut_everywhere(b, DIMS, "tp"), "tp"), "tp"), "tp")

    return program.map(block)

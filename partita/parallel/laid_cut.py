"""What a microbatch's program becomes where rooms cut its dims: the first half of laying a plan.

    ORDER  split, dp, cp, tp, sp, ep

It follows from the plan's mesh, context and expert alone: plans that differ in what is recomputed, in states,
schedule, precision or offload share it.
"""

from __future__ import annotations

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
from partita.spec.frozen import freeze
from partita.spec.plan import Plan
from partita.spec.program import Program


def cut(request: Request) -> Program:
    """The program with every dim cut, and the regions that follow from that."""
    plan = request.plan
    alone = Plan(mesh=plan.mesh, context=plan.context, expert=plan.expert)
    return _cut(replace(request, plan=alone, state_words=0))


@lru_cache(maxsize=256)
def _cut(request: Request) -> Program:
    batch = request.micro_batch_size * request.plan.data_parallel_size
    program = family_program(request.model, batch, request.seq_len)
    program = freeze(program, request.frozen)
    for room in (split, dp, cp, tp, sp, ep):
        program = room.lay(request, program)
    return program

"""A whole program, laid but for its stages: what plans that differ in their schedule and in the split of
their layers share.

    ORDER  laid_cut, recompute, dp.reduce, the step's sums, offload, precision
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from partita.parallel.dp import rules as dp
from partita.parallel.laid_cut import cut
from partita.parallel.laid_step import step_sums
from partita.parallel.offload import rules as offload
from partita.parallel.precision import rules as precision
from partita.parallel.recompute import rules as recompute
from partita.parallel.room import Request
from partita.spec.plan import PipelinePlan
from partita.spec.program import Program, distinct, well_formed


def before_stages(request: Request, two_ways: bool) -> Program:
    """The program before pp cuts it. `two_ways`: its schedule goes two ways."""
    plan = request.plan
    alone = PipelinePlan(post_validation=plan.pipeline.post_validation)
    return _laid(replace(request, plan=replace(plan, pipeline=alone)), two_ways)


@lru_cache(maxsize=64)
def _laid(request: Request, two_ways: bool) -> Program:
    program = recompute.lay(request, cut(request))
    program = step_sums(dp.reduce(request, program), request.plan, two_ways)
    program = precision.lay(request, offload.lay(request, program))
    wrong = [w for b, _ in distinct(program.blocks) for w in well_formed(b)]
    if wrong:
        raise AssertionError("; ".join(wrong))
    return program

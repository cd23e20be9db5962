"""auto: the schedule made for stated costs, communication and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from partita.base.errors import ScheduleError
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule
from partita.schedule.make import hold_to_size
from partita.schedule.synth.synthesis import Task, synthesise
from partita.spec.stage_costs import read_costs

QUICK = 30_000  # items that are placed where a plan states the costs


def auto(
    num_ranks: int,
    num_microbatches: int,
    virtual_stages: int = 1,
    *,
    costs: Costs | None = None,
    limit: float | tuple[float, ...] = math.inf,
    limit_in_bytes: bool = False,
    copies: int = 1,
    seed: int = 0,
) -> Schedule:
    """The fastest schedule found on lines, vees and loops (synth/synthesis.py), at F=I=W unless told.

    `costs`: one entry for a rank's whole share, or one a stage, of p or 2p stages. `limit` caps the
    activations of a rank until W, one number for all or one for each, in whole shares or, with
    `limit_in_bytes`, in bytes. Never slower than a named schedule within the limit; loops of more than two
    stages a rank take part where `virtual_stages` asks for them. `copies` = 2 admits bidirectional ones, on
    lines and on vees, which hold the parameters twice. `synthesise` says besides how far from the optimum
    it can be.

    >>> from partita.plots.timeline import draw
    >>> print(draw(auto(2, 3, limit=2), F=2, I=2, W=2))
    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    rank 1 |     1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """
    given = costs or Costs((StageCosts(),))
    stages = max(2, virtual_stages)
    task = Task(
        num_ranks,
        num_microbatches,
        given,
        limit,
        limit_in_bytes,
        stages=stages,
        copies=copies,
        seed=seed,
    )
    return synthesise(task).schedule


def _hold(p: int, most: int, stages: int, limit: int) -> None:
    if not stages and limit:
        raise ScheduleError(
            f"pipeline.limit={limit} counts stage-microbatches: pipeline.costs says of how many stages"
        )
    each, rest = divmod(stages, p)
    if rest or each > most:
        counts = " or ".join(str(p * v) for v in range(1, most + 1))
        raise ScheduleError(
            f"auto on {p} ranks needs pipeline.costs of {counts} stages; {stages} are stated"
        )
    if limit and limit < each:
        raise ScheduleError(
            f"pipeline.limit={limit}: one microbatch holds {each} stage-microbatches on a rank; no order "
            "holds less"
        )


@lru_cache(maxsize=64)
def made_for(
    num_ranks: int,
    num_microbatches: int,
    virtual_stages: int,
    texts: Sequence[str],
    limit: int,
    copies: int = 1,
) -> Schedule:
    """The schedule for the costs, the limit, in stage-microbatches, and the copies of a stage at most that a
    plan states (spec/stage_costs.py); the same on every rank. Raises ScheduleError where the costs are of no
    such number of stages, or the limit is of no stages or below what one microbatch holds."""
    stages, message = read_costs(texts)
    _hold(num_ranks, max(2, virtual_stages), len(stages), limit)
    hold_to_size(len(stages), num_microbatches)
    costs = Costs(tuple(StageCosts(*map(float, each)) for each in stages), *map(float, message))
    shares = limit / max(len(stages) // num_ranks, 1) if limit else math.inf
    most = max(2, virtual_stages)
    if not stages:
        return auto(num_ranks, num_microbatches, virtual_stages, limit=shares, copies=copies)
    task = Task(num_ranks, num_microbatches, costs, shares, stages=most, copies=copies)
    task = replace(task, exchanged=copies > 1, effort=QUICK, proof=0.0)
    return synthesise(task).schedule

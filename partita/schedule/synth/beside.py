"""Named schedules that run backwards beside forwards, where the costs say that this hides something.

The search places one action at a time. Costs may say that a B is `hidden` seconds shorter beside the forward
before it (DualPipe's pairs, which hide all-to-all under compute): then the fastest named schedule with pairs
that fits is held against what was found, and the bound takes every backward as short as it can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from partita.schedule.check import over_limit
from partita.schedule.clock import Costs, StageCosts, clock, makespan, span
from partita.schedule.ir import Schedule
from partita.schedule.synth.flow import Flow


def hides(costs: Costs) -> bool:
    """Whether a backward is shorter beside a forward than alone."""
    return any(stage.hidden for stage in costs.stages)


def at_shortest(stages: Sequence[StageCosts]) -> tuple[StageCosts, ...]:
    """Halves of backwards that are beside a forward all of the time: no order takes less of them."""
    out = []
    for stage in stages:
        whole = stage.of("B", beside=True)
        out.append(replace(stage, I=min(stage.I, whole), W=max(whole - stage.I, 0.0), hidden=0.0))
    return tuple(out)


def shortest(flow: Flow, costs: Costs) -> Flow:
    """The flow with these halves."""
    stages = at_shortest(costs.stages)
    return replace(flow, seconds=tuple(stages[s].of(kind) for s, _, kind in flow.names))


def fastest(
    schedules: Sequence[Schedule],
    costs: Costs,
    goal: str,
    limit: Sequence[float],
    weights: list[float],
) -> tuple[float, Schedule] | None:
    """(flush time, or span where that is the goal; schedule) of the fastest with pairs that fits."""
    time = span if goal == "span" else makespan
    found = [
        (time(clock(each, costs)), each)
        for each in schedules
        if each.paired and not over_limit(each, limit, weights)
    ]
    return min(found, key=lambda entry: entry[0], default=None)

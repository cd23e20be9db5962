"""Stages and schedule chosen together: where to cut the layers, and in which order to run what results.

Beginning from the cut whose dearest rank is cheapest, a schedule is made; then one layer at a time moves
over a boundary between stages as long as the schedule at hand gets faster by it; then a schedule is made
for the new cut, until neither changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from partita.base.errors import ScheduleError
from partita.schedule.clock import StageCosts
from partita.schedule.ir import Schedule
from partita.schedule.make.families import loop_placement, vee_placement
from partita.schedule.synth.flow import Held, fits, flow_like, orders_of, starts_of
from partita.schedule.synth.synthesis import Synthesis, Task, synthesise

_ROUNDS = 4


@dataclass(frozen=True)
class Partition:
    """The schedule found, and how many layers each of its stages has."""

    synthesis: Synthesis
    split: tuple[int, ...]


def partitioned(task: Task, layers: Sequence[StageCosts]) -> Partition:
    """The best found over cuts of `layers` (in order, the first with the embedding, the last with the head)
    into p or 2p stages. `task.costs` gives the time of a message alone. Raises ScheduleError where
    there are fewer layers than ranks, or nothing fits."""
    best: Partition | None = None
    refused: ScheduleError | None = None
    for stages in range(1, task.stages + 1):
        if len(layers) >= stages * task.num_ranks:
            try:
                found = _of_stages(replace(task, stages=stages), layers, stages)
            except ScheduleError as error:
                refused = error
                continue
            if best is None or found.synthesis.makespan < best.synthesis.makespan:
                best = found
    if best is None:
        raise refused or ScheduleError(
            f"{len(layers)} layers cannot fill {task.num_ranks} stages, one at least for each"
        )
    return best


def _of_stages(task: Task, layers: Sequence[StageCosts], stages: int) -> Partition:
    p = task.num_ranks
    placement = vee_placement(p) if stages == 2 else loop_placement(p, stages)
    split = _balanced(layers, placement, p)
    quick = replace(task, effort=0, proof=0.0)
    found = synthesise(_with(quick, layers, split))
    for _ in range(_ROUNDS):
        moved = _moved(task, layers, split, found.schedule)
        if moved == split:
            break
        again = synthesise(_with(quick, layers, moved))
        if again.makespan >= found.makespan:
            break
        split, found = moved, again
    return Partition(synthesise(_with(task, layers, split)), split)


def _with(task: Task, layers: Sequence[StageCosts], split: Sequence[int]) -> Task:
    return replace(task, costs=replace(task.costs, stages=_stages(layers, split)))


def _stages(layers: Sequence[StageCosts], split: Sequence[int]) -> tuple[StageCosts, ...]:
    out, first = [], 0
    for count in split:
        part = layers[first : first + count]
        first += count
        out.append(
            StageCosts(
                sum(s.F for s in part),
                sum(s.I for s in part),
                sum(s.W for s in part),
                sum(s.U for s in part),
                sum(s.activation_bytes for s in part),
            )
        )
    return tuple(out)


def _balanced(layers: Sequence[StageCosts], placement: Sequence[int], p: int) -> tuple[int, ...]:
    """From even counts, single layers move over boundaries while the dearest rank gets cheaper, or as many
    ranks are as dear but their squares add up to less."""
    size = len(placement)
    split = tuple(len(layers) * (s + 1) // size - len(layers) * s // size for s in range(size))

    def dear(cut: Sequence[int]) -> tuple[float, float]:
        ranks = [0.0] * p
        for stage, cost in enumerate(_stages(layers, cut)):
            ranks[placement[stage]] += cost.F + cost.I + cost.W
        return max(ranks), sum(r * r for r in ranks)

    while True:
        best = min(_neighbours(split), key=dear, default=split)
        if dear(best) >= dear(split):
            return split
        split = best


def _neighbours(split: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """One layer from any stage that has another to any other, those between shifted."""
    for giver, count in enumerate(split):
        for taker in range(len(split)):
            if taker != giver and count > 1:
                new = list(split)
                new[giver] -= 1
                new[taker] += 1
                yield tuple(new)


def _moved(
    task: Task, layers: Sequence[StageCosts], split: tuple[int, ...], schedule: Schedule
) -> tuple[int, ...]:
    """The split after moves that make the schedule at hand faster and let it fit."""

    def time(cut: tuple[int, ...]) -> float:
        costs = replace(task.costs, stages=_stages(layers, cut))
        weights = task.weights_of(len(cut) // task.num_ranks, costs)
        limits = [task.limit] * task.num_ranks
        flow = flow_like(schedule, costs, limits, Held(weights, task.until_weights))
        orders = orders_of(flow, schedule)
        found = starts_of(flow, orders) if fits(flow, orders) else None
        return found[0] if found else math.inf

    now = time(split)
    while True:
        best = min(_neighbours(split), key=time, default=split)
        then = time(best)
        if then >= now * (1 - 1e-9):
            return split
        split, now = best, then

"""Stages and schedule chosen together: where to cut the layers, and in which order to run what results.

Where there are few cuts, all of them are tried. Else on each placement (line, vee or wave, loop),
beginning from the cut that fits and whose dearest rank is cheapest, one layer at a time moves over a
boundary between stages as long as the schedule at hand gets faster by it; then a schedule is made for the
new cut, until neither changes anything.

What no cut undercuts: the least over all cuts where all were bounded; else the work of all layers shared
evenly between ranks, each idle until one layer at least has run on every rank before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from partita.base.errors import ScheduleError
from partita.schedule.clock import StageCosts
from partita.schedule.ir import Schedule
from partita.schedule.make.families import loop_placement, wave_placement
from partita.schedule.synth.beside import at_shortest
from partita.schedule.synth.flow import EPSILON, Held, fits, flow_like, orders_of, starts_of
from partita.schedule.synth.synthesis import Synthesis, Task, synthesise

_ROUNDS = 4
_MOST = 12_000  # items of the cuts that are all tried: layers' F, I, W of every microbatch
_PROVEN = 12  # cuts that the effort is shared by
_EFFORT = 600_000  # items placed for them

Cut = tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """The schedule found, whose bound holds for every cut, how many layers each of its stages has, and
    whether nothing on this cut is faster."""

    synthesis: Synthesis
    split: Cut
    cut_proven: bool


def partitioned(task: Task, layers: Sequence[StageCosts]) -> Partition:
    """The best found over cuts of `layers` (in order, the first with the embedding, the last with the head)
    into p stages up to `task.stages` p. `task.costs` gives the time of a message alone. Raises ScheduleError
    where there are fewer layers than ranks, or nothing fits."""
    if len(layers) < task.num_ranks:
        raise ScheduleError(
            f"{len(layers)} layers cannot fill {task.num_ranks} stages, one at least for each"
        )
    quick = replace(task, effort=0, proof=0.0)
    cuts, complete = _cuts(task, layers)
    found: dict[Cut, Synthesis] = {}
    refused: ScheduleError | None = None
    for cut in cuts:
        try:
            found[cut] = synthesise(_with(quick, layers, cut))
        except ScheduleError as error:
            refused = error
    if not found:
        raise refused or AssertionError("layers enough have a cut")
    if not complete:
        for cut in list(found):
            _improve(quick, layers, cut, found)
    best = _proven(task, layers, found, complete)
    made = found[best]
    bound = _over_cuts(task, layers)
    if complete:
        bound = max(bound, min(each.lower_bound for each in found.values()))
    whole = replace(made, lower_bound=min(bound, made.makespan))
    return Partition(whole, best, made.proven)


def _cuts(task: Task, layers: Sequence[StageCosts]) -> tuple[list[Cut], bool]:
    """(Every cut, True) where they are few; else those to begin from."""
    n, p, m = len(layers), task.num_ranks, task.num_microbatches
    sizes = [v * p for v in range(1, task.stages + 1) if v * p <= n]
    if sum(math.comb(n - 1, size - 1) * 3 * size * m for size in sizes) <= _MOST:
        every = [
            tuple(b - a for a, b in zip((0, *ends), (*ends, n), strict=True))
            for size in sizes
            for ends in combinations(range(1, n), size - 1)
        ]
        return every, True
    out: dict[Cut, None] = {}
    for size in sizes:
        for make in (wave_placement, loop_placement):
            out[_balanced(task, layers, make(p, size // p))] = None
    return list(out), False


def _improve(
    quick: Task, layers: Sequence[StageCosts], split: Cut, found: dict[Cut, Synthesis]
) -> None:
    """Adds to `found` what moves of layers from the cut make of it, as long as it gets faster."""
    for _ in range(_ROUNDS):
        moved = _moved(quick, layers, split, found[split].schedule)
        if moved not in found:
            found[moved] = synthesise(_with(quick, layers, moved))
        if found[moved].makespan >= found[split].makespan:
            return
        split = moved


def _proven(
    task: Task, layers: Sequence[StageCosts], found: dict[Cut, Synthesis], complete: bool
) -> Cut:
    """The fastest cut, once the task's effort went to those that may be it, the most hopeful first; where
    not all cuts are there, to the fastest of each number of stages alone."""
    hopeful = sorted(found, key=lambda cut: (found[cut].makespan, cut))
    if not complete:
        first: dict[int, Cut] = {}
        for cut in hopeful:
            first.setdefault(len(cut), cut)
        hopeful = list(first.values())
    best, hopeful = hopeful[0], hopeful[:_PROVEN]
    effort = _EFFORT // len(hopeful) if complete and task.effort is None else task.effort
    for cut in hopeful:
        if found[cut].lower_bound < found[best].makespan * (1 - EPSILON):
            part = replace(task, effort=effort, proof=task.proof / len(hopeful))
            again = synthesise(_with(part, layers, cut))
            bound = max(again.lower_bound, found[cut].lower_bound)
            found[cut] = replace(
                min(again, found[cut], key=lambda each: each.makespan), lower_bound=bound
            )
            best = min(best, cut, key=lambda each: found[each].makespan)
    return best


def _over_cuts(task: Task, layers: Sequence[StageCosts]) -> float:
    """Seconds that no schedule of any cut undercuts on any placement: all ranks share the work; of one way,
    the k-th rank to begin waits until k layers have gone forward and k messages on."""
    p, m, send = task.num_ranks, task.num_microbatches, task.costs.send
    layers = at_shortest(layers)
    works = [each.F + each.I + each.W for each in layers]
    heads = [sum(each.F for each in layers[:k]) + k * send for k in range(p)]
    if task.copies > 1:
        return m * sum(works) / p
    if task.goal == "span":
        heads = [0.0] * p
    one = sum(each.F + each.I for each in layers) + 2 * send * (p - 1) + layers[0].W
    alone = one if task.goal == "flush" else 0.0
    return max((m * sum(works) + sum(heads)) / p, m * max(works), alone)


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
                sum(s.hidden for s in part),
            )
        )
    return tuple(out)


def _balanced(task: Task, layers: Sequence[StageCosts], placement: Sequence[int]) -> Cut:
    """From even counts, single layers move over boundaries while the ranks' single microbatches get nearer to
    fit; then while the dearest rank gets cheaper, or as many ranks are as dear but their squares add up to
    less."""
    size, p = len(placement), task.num_ranks
    split = tuple(len(layers) * (s + 1) // size - len(layers) * s // size for s in range(size))

    def dear(cut: Sequence[int]) -> tuple[float, float, float]:
        ranks, holds = [0.0] * p, [0.0] * p
        for stage, cost in enumerate(_stages(layers, cut)):
            ranks[placement[stage]] += cost.F + cost.I + cost.W
            holds[placement[stage]] += cost.activation_bytes
        beyond = (max(h - most, 0.0) for h, most in zip(holds, task.limits, strict=True))
        over = sum(beyond) if task.limit_in_bytes else 0.0
        return over, max(ranks), sum(r * r for r in ranks)

    while True:
        best = min(_neighbours(split), key=dear, default=split)
        if dear(best) >= dear(split):
            return split
        split = best


def _neighbours(split: Cut) -> Iterator[Cut]:
    """One layer from any stage that has another to any other, those between shifted."""
    for giver, count in enumerate(split):
        for taker in range(len(split)):
            if taker != giver and count > 1:
                new = list(split)
                new[giver] -= 1
                new[taker] += 1
                yield tuple(new)


def _moved(task: Task, layers: Sequence[StageCosts], split: Cut, schedule: Schedule) -> Cut:
    """The split after moves that make the schedule at hand faster and let it fit."""

    def time(cut: Cut) -> float:
        costs = replace(task.costs, stages=_stages(layers, cut))
        weights = task.weights_of(len(cut) // task.num_ranks, costs)
        flow = flow_like(schedule, costs, task.limits, Held(weights, task.until_weights))
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

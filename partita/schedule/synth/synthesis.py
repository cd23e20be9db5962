"""The best schedule found for stated costs and a memory limit, and how far from the optimum it may be.

1 seeds     every named schedule that fits, lines of any warm-up, and one microbatch at a time
2 justify   the best of them by list scheduling forwards and backwards, at the costs asked for
3 search    building blocks at these costs, then shaken priorities
4 prove     CP-SAT, where an instance is small enough, from what is best so far

All of it on every placement that the task admits: line, loop, vee, wave; with two copies of every stage both
ways through a line or a wave; waves with a lighter busiest rank (placements.py). The answer is never
worse than a named schedule that fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from partita.base.errors import ScheduleError
from partita.schedule.check import limits_by_rank
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule
from partita.schedule.make.families import loop_placement, wave_placement
from partita.schedule.synth import seeds
from partita.schedule.synth.beside import fastest, hides, shortest
from partita.schedule.synth.blocks import from_blocks
from partita.schedule.synth.bounds import heads_of, lower_bound
from partita.schedule.synth.exact import optimum
from partita.schedule.synth.flow import (
    EPSILON,
    Flow,
    Held,
    Orders,
    fits,
    flow_like,
    orders_of,
    schedule_of,
    starts_of,
)
from partita.schedule.synth.lists import AS_BEFORE, WEIGHTS_LAST, justified
from partita.schedule.synth.placements import more_ways
from partita.schedule.synth.search import improved

Goal = Literal["flush", "span"]
_JUSTIFIED = 4  # seeds of a placement that are improved
_BLOCK_WALKS, _SHAKEN_WALKS = 2, 3  # short ones find more than a long one
_FIRST, _LEAST = 10, 40  # one part of the effort, and items placed, of first building blocks
# Items placed at most, about 3 s of processor time; half of it may go to first orders
_USUAL = 800_000
# Times that justification places every item in a round of both rules; rounds
_ROUND, _ROUNDS = 4, 3
# Of one placement of each number of stages: beyond, named ones take seconds to make
MOST_ITEMS = 30_000


@dataclass(frozen=True)
class Task:
    """What a schedule is wanted for.

    `costs` is of a rank's whole share (one entry: each of v stages pays 1/v), or has one entry a stage.
    `limit` caps the activations of a rank, one number for all or one for each: in whole shares, or in bytes
    of the costs' activation_bytes where `limit_in_bytes`; `until_weights` is the fraction of them that a
    weight half still needs, all by default. `stages` is the most stages a rank may hold; `copies` = 2 admits
    bidirectional schedules, `exchanged` waves of which stages changed places. `goal` is the flush time, or
    the span. `effort` counts items placed by the search, `proof` CP-SAT's deterministic seconds.
    """

    num_ranks: int
    num_microbatches: int
    costs: Costs = field(default_factory=lambda: Costs((StageCosts(),)))
    limit: float | tuple[float, ...] = math.inf
    limit_in_bytes: bool = False
    until_weights: float = 1.0
    stages: int = 2
    copies: int = 2
    exchanged: bool = True
    goal: Goal = "flush"
    seed: int = 0
    effort: int | None = None
    proof: float = 5.0

    @property
    def limits(self) -> list[float]:
        """Of each rank. Raises ScheduleError where they are of another number."""
        return limits_by_rank(self.limit, self.num_ranks)

    def costs_of(self, stages: int) -> Costs | None:
        """The costs with this many stages a rank; None where they are of another number."""
        p, given = self.num_ranks, self.costs
        if len(given.stages) == p * stages:
            return given
        if len(given.stages) != 1:
            return None
        (one,) = given.stages
        whole = (one.F, one.I, one.W, one.U, one.activation_bytes, one.hidden)
        part = StageCosts(*(x / stages for x in whole))
        return replace(given, stages=(part,) * (p * stages))

    def weights_of(self, stages: int, costs: Costs) -> list[float]:
        """What a microbatch holds at each stage, in the unit of the limit."""
        if self.limit_in_bytes:
            return [stage.activation_bytes for stage in costs.stages]
        return [1 / stages] * (self.num_ranks * stages)


@dataclass(frozen=True)
class Synthesis:
    """A schedule, its flush time (or span, where that is the goal) at the task's costs, and what no
    schedule on the placements tried undercuts (of two ways, with as many microbatches each)."""

    schedule: Schedule
    costs: Costs
    makespan: float
    lower_bound: float
    seconds: float

    @property
    def gap(self) -> float:
        """How much slower than the bound, as a fraction of it."""
        return self.makespan / self.lower_bound - 1 if self.lower_bound else 0.0

    @property
    def proven(self) -> bool:
        """Whether nothing on the placements tried is faster."""
        return self.gap <= EPSILON


@dataclass
class _Place:
    """One placement: its flow, the best orders so far, and its bound."""

    flow: Flow
    costs: Costs
    offset: float = 0.0  # what the flow's makespan counts too much, for the span
    pool: list[tuple[float, str, Orders]] = field(default_factory=list)
    bound: float = 0.0

    @property
    def best(self) -> tuple[float, str, Orders]:
        """The fastest of the pool; named ones first where alike."""
        return min(self.pool, key=lambda entry: entry[0])

    @property
    def is_named(self) -> bool:
        """Whether a named schedule lies on it."""
        return any(name != seeds.AT_A_TIME for _, name, _ in self.pool)

    @property
    def time(self) -> float:
        """What is wanted small."""
        return self.best[0] - self.offset

    def is_open(self, best: float) -> bool:
        """Whether something on it may be faster than `best`."""
        return self.bound - self.offset < best * (1 - EPSILON)

    def add(self, schedule: Schedule) -> None:
        """Takes the schedule into the pool where it runs and fits."""
        orders = orders_of(self.flow, schedule)
        if fits(self.flow, orders):
            times = starts_of(self.flow, orders)
            assert times is not None, f"{schedule.name} runs"
            self.pool.append((times[0], schedule.name, orders))

    def offer(self, found: tuple[float, Orders]) -> None:
        """Takes improved orders where they are faster."""
        if found[0] < self.best[0] * (1 - EPSILON):
            self.pool.append((found[0], "", found[1]))


def synthesise(task: Task) -> Synthesis:
    """The best schedule for the task. Deterministic for a seed. Raises ScheduleError where no order of any
    placement fits the limit, or there would be more than MOST_ITEMS."""
    began = time.perf_counter()
    _hold_to_time(task)
    places = [place for place in _places(task) if place.pool]
    if not places:
        _raise_too_small(task)
    for place in places:
        place.bound = lower_bound(place.flow)
    spent = _begin(task, places)
    _search(task, places, spent)
    _prove(task, places)
    best = min(places, key=lambda place: place.time)
    took = best.time
    bound = min(place.bound - place.offset for place in places)
    found = schedule_of(best.flow, best.best[2], "auto")
    made = Synthesis(found, best.costs, took, min(bound, took), time.perf_counter() - began)
    return _beside(task, places, made) if hides(task.costs) else made


def _beside(task: Task, places: list[_Place], made: Synthesis) -> Synthesis:
    """What was found, or a named schedule whose pairs hide more than that; with the bound of both."""
    p, m = task.num_ranks, task.num_microbatches
    for stages in range(1, task.stages + 1):
        costs = task.costs_of(stages)
        if costs is not None:
            all_of = list(seeds.named(p, m, stages, task.copies, limited=False))
            weights = task.weights_of(stages, costs)
            other = fastest(all_of, costs, task.goal, task.limits, weights)
            if other is not None and other[0] < made.makespan * (1 - EPSILON):
                found = replace(other[1], name="auto")
                made = replace(made, schedule=found, costs=costs, makespan=other[0])
    bound = min(lower_bound(shortest(at.flow, at.costs)) - at.offset for at in places)
    return replace(made, lower_bound=min(bound, made.makespan))


def _hold_to_time(task: Task) -> None:
    p, m, most = task.num_ranks, task.num_microbatches, task.stages
    if most < 1:
        raise ScheduleError(f"auto: {most} stages a rank; it must be at least 1")
    items = sum(3 * p * v * m for v in range(1, most + 1) if task.costs_of(v) is not None)
    if items > MOST_ITEMS:
        raise ScheduleError(
            f"auto on {p} ranks with {m} microbatches and up to {most} stages a rank would place {items:,} "
            f"actions to begin with; its time is for {MOST_ITEMS:,}: fewer microbatches or stages"
        )


def _begin(task: Task, places: list[_Place]) -> int:
    """A first good order on each placement that could still win, those of the lowest bounds first: the best
    seeds justified; where no named schedule lies, of a few building blocks. Answers items placed: of the
    usual effort half at most."""
    spent, most = 0, _USUAL // 2 if task.effort is None else math.inf
    for place in sorted(places, key=lambda place: place.bound - place.offset):
        if not place.is_open(min(other.time for other in places)):
            continue
        size = sum(place.flow.count)
        effort = _effort(task, place) // _FIRST
        if not place.is_named and effort and spent + max(effort, _LEAST * size) <= most:
            effort = max(effort, _LEAST * size)
            made = from_blocks(place.flow, place.bound, effort, task.seed)
            spent += effort
            if made is not None:
                place.offer(made)
        seeded = sorted(place.pool, key=lambda entry: entry[0])
        for _, _, orders in seeded[: _JUSTIFIED if place.is_named else 1]:
            items = _ROUND * _ROUNDS * size
            if place.best[0] > place.bound * (1 + EPSILON) and spent + items <= most:
                rules = (AS_BEFORE, WEIGHTS_LAST)
                place.offer(justified(place.flow, orders, rules, rounds=_ROUNDS))
                spent += items
    return spent


def _places(task: Task) -> Iterator[_Place]:
    for stages in range(1, max(task.stages, 1) + 1):
        costs = task.costs_of(stages)
        if costs is None:
            continue
        weights = task.weights_of(stages, costs)
        limits = task.limits
        found: dict[object, _Place] = {}
        for schedule in _seeds(task, stages, costs, limits, weights):
            key = schedule.placement
            if key not in found:
                held = Held(weights, task.until_weights)
                flow = flow_like(schedule, costs, limits, held)
                found[key] = _place(task, flow, costs)
            found[key].add(schedule)
        yield from found.values()


def _place(task: Task, flow: Flow, costs: Costs) -> _Place:
    if task.goal == "flush":
        return _Place(flow, costs)
    heads = heads_of(flow)
    first = [min(heads[x][0] for x in flow.streams_of(r)) for r in range(flow.num_ranks)]
    return _Place(flow.for_span(first), costs, max(first))


def _seeds(
    task: Task, stages: int, costs: Costs, limits: list[float], weights: list[float]
) -> Iterator[Schedule]:
    p, m = task.num_ranks, task.num_microbatches
    yield from seeds.named(p, m, stages, task.copies, any(map(math.isfinite, limits)))
    yield seeds.one_at_a_time(p, m, (loop_placement(p, stages),))
    if stages > 1:
        yield seeds.one_at_a_time(p, m, (wave_placement(p, stages),))
    copies = task.copies if m > 1 else 1  # one microbatch goes one way
    for ways in more_ways(p, stages, copies, costs, task.exchanged):
        yield seeds.one_at_a_time(p, m, ways)
    if stages == 1:
        rooms = seeds.rooms_of(limits, weights)
        if min(rooms) >= 1:
            yield from seeds.lines(m, rooms, task.until_weights, costs)


def _search(task: Task, places: list[_Place], spent: int) -> None:
    """Half of the effort on building blocks on each placement that could still win, half on shaking the best
    orders of those that are then nearly as fast as the fastest; walks of each begin anew. What is `spent` is
    of the usual effort."""
    for place, effort in _near(task, places, 1.25, spent):
        for seed in _seeds_of(task, _BLOCK_WALKS):
            made = from_blocks(place.flow, place.bound, effort // _BLOCK_WALKS, seed)
            if made is not None:
                place.offer(made)
    for place, effort in _near(task, places, 1.05, spent):
        start = place.best[2]
        for seed in _seeds_of(task, _SHAKEN_WALKS):
            part = effort // _SHAKEN_WALKS
            place.offer(improved(place.flow, start, place.bound, part, seed))


def _seeds_of(task: Task, walks: int) -> range:
    return range(task.seed * walks, (task.seed + 1) * walks)


def _near(task: Task, places: list[_Place], within: float, spent: int) -> list[tuple[_Place, int]]:
    """The placements that could still win and are `within` so many times the fastest, each with its part of
    half the effort."""
    best = min(place.time for place in places)
    near = [place for place in places if place.is_open(best) and place.time < best * within]
    left = _USUAL - spent if task.effort is None else task.effort
    return [(place, min(_effort(task, place), left) // (2 * len(near))) for place in near]


def _effort(task: Task, place: _Place) -> int:
    usual = min(_USUAL, 3_000 * sum(place.flow.count))
    return usual if task.effort is None else task.effort


def _prove(task: Task, places: list[_Place]) -> None:
    """CP-SAT on each placement whose bound is below the best so far, as long as its budget lasts."""
    budget = task.proof
    for place in sorted(places, key=lambda place: place.time):
        if budget > 0 and place.is_open(min(other.time for other in places)):
            proof = optimum(place.flow, place.best[2], place.bound, budget)
            if proof is not None:
                budget -= proof.spent
                place.offer((proof.makespan, proof.orders))
                place.bound = max(place.bound, proof.bound)


def _raise_too_small(task: Task) -> None:
    least: list[tuple[float, float]] = []  # of each placement the rank that lacks most
    for stages in range(1, max(task.stages, 1) + 1):
        costs = task.costs_of(stages)
        if costs is not None:
            weights = task.weights_of(stages, costs)
            for make in (loop_placement, wave_placement):
                placement = make(task.num_ranks, stages)
                held = [0.0] * task.num_ranks
                for stage, rank in enumerate(placement):
                    held[rank] += weights[stage]
                least.append(max(zip(held, task.limits, strict=True), key=lambda of: of[0] - of[1]))
    unit = "bytes of activations" if task.limit_in_bytes else "activations a rank"
    if not least:
        raise ScheduleError(
            f"auto on {task.num_ranks} ranks needs costs of {task.num_ranks} or {2 * task.num_ranks} "
            f"stages; {len(task.costs.stages)} were given"
        )
    held_there, limit = min(least, key=lambda of: of[0] - of[1])
    raise ScheduleError(
        f"auto on {task.num_ranks} ranks: one microbatch holds {held_there:.6g} {unit}, the limit is "
        f"{limit:.6g}; no order holds less"
    )

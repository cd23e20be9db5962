"""A clock for schedules: durations in, Spans out, and the numbers read off them.

In order: each rank runs its list strictly in order, and an action starts when its rank is free and
its inputs are there. Nothing else defines time. A result that crosses ranks takes `send` more.

    makespan (flush time)  first start to last end over all ranks: a step that a barrier ends
    span                   the largest of each rank's own last end minus own first start: what a step
                           costs when the next one may start rank by rank (the zero-bubble papers)
    bubble overhead        time / work of the busiest rank - 1; GPipe and 1F1B: (p-1)/m
    steady overhead        the same, of the span
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from partita.base.errors import ScheduleError, UsageError
from partita.record.span import Span
from partita.schedule.ir import Action, Schedule, makes, needs

Pair = Literal["sequence", "block"]


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Seconds of one microbatch at one stage: F, I and W (B = I + W), U; and the bytes it keeps."""

    F: float = 1.0
    I: float = 1.0  # noqa: E741 (the field's name of the input-gradient half)
    W: float = 1.0
    U: float = 0.0
    activation_bytes: float = 0.0

    def of(self, kind: str) -> float:
        """Seconds of one action of this kind."""
        return self.I + self.W if kind == "B" else getattr(self, kind)


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of every stage; `send` is the seconds a result needs from rank to rank."""

    stages: tuple[StageCosts, ...]
    send: float = 0.0

    @staticmethod
    def equal(
        schedule: Schedule,
        F: float = 1.0,
        I: float = 1.0,  # noqa: E741
        W: float = 1.0,
        send: float = 0.0,
    ) -> Costs:
        """F, I, W are of a rank's whole share: each of its v stages pays 1/v."""
        v = schedule.virtual_stages
        return Costs((StageCosts(F / v, I / v, W / v),) * schedule.num_stages, send)


@dataclass
class _Clock:
    """The state of one run: where each rank stands, and when each result is there."""

    schedule: Schedule
    costs: Costs
    pair: Pair
    at: list[int] = field(init=False)
    free: list[float] = field(init=False)
    done: dict[Action, tuple[float, int]] = field(init=False, default_factory=dict)
    spans: list[Span] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.at = [0] * len(self.schedule.ranks)
        self.free = [0.0] * len(self.schedule.ranks)

    def block(self, rank: int) -> tuple[Action, ...]:
        """What the rank starts next: one action, or an overlapped pair taken as one block."""
        actions, at = self.schedule.ranks[rank], self.at[rank]
        both = self.pair == "block" and actions[at] in self.schedule.paired
        return actions[at : at + 2] if both else actions[at : at + 1]

    def inputs(self, block: Sequence[Action]) -> list[Action]:
        """Results the block waits for, its own left out."""
        own = {r for a in block for r in makes(a)}
        stages = self.schedule.num_stages
        return [need for a in block for need in needs(a, stages) if need not in own]

    def missing(self, rank: int) -> list[Action]:
        """Inputs of the rank's next block that are not there."""
        return [need for need in self.inputs(self.block(rank)) if need not in self.done]

    def run(self, rank: int) -> list[Action]:
        """Runs the rank's next block, whose inputs are there; the results it leaves."""
        block = self.block(rank)
        start = self.free[rank]
        for need in self.inputs(block):
            end, where = self.done[need]
            start = max(start, end + (self.costs.send if where != rank else 0.0))
        times = [self.costs.stages[a.stage].of(a.kind) for a in block]
        end = start + sum(times)
        for action, seconds in zip(block, times, strict=True):
            stop = start + seconds
            self.spans.append(
                Span(
                    rank,
                    "compute",
                    action.kind,
                    str(action),
                    start,
                    stop,
                    action.stage,
                    action.microbatch,
                )
            )
            start = stop
        results = [r for a in block for r in makes(a)]
        for result in results:
            self.done[result] = (end, rank)
        self.free[rank] = end
        self.at[rank] += len(block)
        return results


def clock(schedule: Schedule, costs: Costs | None = None, pair: Pair = "sequence") -> list[Span]:
    """When each action of the schedule runs, sorted by rank and start.

    `costs` are 1, 1, 1 and send 0 unless given. An overlapped pair runs F then B; `pair="block"`
    takes it as one block of the summed length with both results at its end. Raises UsageError where
    the costs are of another number of stages, ScheduleError where no rank can move.
    """
    costs = costs or Costs.equal(schedule)
    if len(costs.stages) != schedule.num_stages:
        raise UsageError(
            f"costs of {len(costs.stages)} stages for {schedule.name} with {schedule.num_stages}; "
            "give one entry for each stage"
        )
    state = _Clock(schedule, costs, pair)
    waiting: defaultdict[Action, list[int]] = defaultdict(list)
    ready = list(range(len(schedule.ranks)))
    while ready:
        rank = ready.pop()
        while state.at[rank] < len(schedule.ranks[rank]):
            missing = state.missing(rank)
            if missing:
                waiting[missing[0]].append(rank)
                break
            for result in state.run(rank):
                ready += waiting.pop(result, [])
    _raise_deadlock(state)
    return sorted(state.spans, key=lambda s: (s.rank, s.start_s, s.end_s))


def _raise_deadlock(state: _Clock) -> None:
    ranks = state.schedule.ranks
    blocked = [r for r, actions in enumerate(ranks) if state.at[r] < len(actions)]
    if not blocked:
        return
    makers = {result: a for a in state.schedule.actions() for result in makes(a)}
    lines = []
    for rank in blocked:
        names = " ".join(str(makers.get(need, need)) for need in state.missing(rank))
        lines.append(f"\n  rank {rank}: {state.block(rank)[0]} waits for {names}")
    raise ScheduleError(f"{state.schedule.name}: deadlock{''.join(lines)}")


def makespan(spans: Sequence[Span]) -> float:
    """First start to last end over all ranks (flush time)."""
    if not spans:
        return 0.0
    return max(s.end_s for s in spans) - min(s.start_s for s in spans)


def span(spans: Sequence[Span]) -> float:
    """The largest of each rank's own last end minus own first start."""
    return max((makespan(own) for own in _by_rank(spans).values()), default=0.0)


def _by_rank(spans: Sequence[Span]) -> dict[int, list[Span]]:
    out: dict[int, list[Span]] = {}
    for s in spans:
        out.setdefault(s.rank, []).append(s)
    return out


def busiest(spans: Sequence[Span]) -> float:
    """Seconds of work of the rank that has most."""
    return max((sum(s.duration_s for s in own) for own in _by_rank(spans).values()), default=0.0)


def bubble_overhead(spans: Sequence[Span]) -> float:
    """makespan / work of the busiest rank - 1; 0 where there is no work."""
    work = busiest(spans)
    return makespan(spans) / work - 1 if work else 0.0


def steady_bubble_overhead(spans: Sequence[Span]) -> float:
    """span / work of the busiest rank - 1; 0 where there is no work."""
    work = busiest(spans)
    return span(spans) / work - 1 if work else 0.0


def peak_activations(schedule: Schedule) -> list[int]:
    """For each rank, the most chunks (stage-microbatches) it holds at once.

    A chunk is held from F until B, or until W where halves are split: a weight half still needs the
    stage's input. Forward alone holds none.
    """
    return [int(peak) for peak in _peaks(schedule, [1.0] * schedule.num_stages)]


def peak_share(schedule: Schedule) -> list[float]:
    """The same in units of a rank's whole share: v chunks are one."""
    return [peak / schedule.virtual_stages for peak in peak_activations(schedule)]


def peak_activation_bytes(schedule: Schedule, costs: Costs) -> list[float]:
    """For each rank, the most bytes its chunks hold at once."""
    return _peaks(schedule, [s.activation_bytes for s in costs.stages])


def _peaks(schedule: Schedule, size: Sequence[float]) -> list[float]:
    freed = {(a.stage, a.microbatch) for a in schedule.actions() if a.kind in "BW"}
    peaks = []
    for actions in schedule.ranks:
        held = peak = 0.0
        for stage, kind, microbatch in actions:
            if kind == "F" and (stage, microbatch) in freed:
                held += size[stage]
                peak = max(peak, held)
            elif kind in "BW":
                held -= size[stage]
        peaks.append(peak)
    return peaks

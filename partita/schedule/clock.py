"""A clock for schedules: durations in, Spans out, and the numbers read off them.

In order: each rank runs its list strictly in order, and an action starts when its rank is free and
its inputs are there. Nothing else defines time. A result that crosses ranks takes `send` more; a rank's
results leave it one after the other, each `wire` after the one before it at the soonest.

    makespan (flush time)  first start to last end over all ranks: a step that a barrier ends
    span                   the largest of each rank's own last end minus own first start: what a step
                           costs when the next one may start rank by rank (the zero-bubble papers)
    bubble overhead        time / work of the busiest rank - 1; GPipe and 1F1B: (p-1)/m
    steady overhead        the same, of the span
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from partita.base.errors import ScheduleError, UsageError
from partita.record.span import Span
from partita.schedule.ir import Action, Schedule, makes, needs

Pair = Literal["sequence", "block"]


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Seconds of one microbatch at one stage: F, I and W (B = I + W), U; and the bytes it keeps. `hidden`: by
    how much a B is shorter that overlaps with the forward before it."""

    F: float = 1.0
    I: float = 1.0  # noqa: E741 (the field's name of the input-gradient half)
    W: float = 1.0
    U: float = 0.0
    activation_bytes: float = 0.0
    hidden: float = 0.0

    def of(self, kind: str, beside: bool = False) -> float:
        """Seconds of one action of this kind; of a B `beside` a forward."""
        whole = self.I + self.W if kind == "B" else getattr(self, kind)
        return max(whole - self.hidden, 0.0) if beside else whole


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of every stage; `send` is the seconds a result needs from rank to rank, `wire` those of them in
    which the link out of its rank carries nothing else (its bytes / bandwidth; 0: a delay alone)."""

    stages: tuple[StageCosts, ...]
    send: float = 0.0
    wire: float = 0.0

    def seconds(self, action: Action, schedule: Schedule) -> float:
        """Of one action of a schedule."""
        return self.stages[action.stage].of(action.kind, action in schedule.beside)

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


@dataclass(slots=True)
class _Block:
    """What a rank starts at once: an action, or an overlapped pair. Results are numbered."""

    actions: tuple[Action, ...]
    needs: list[tuple[int, bool]]  # results, and whether another rank makes them
    makes: list[int]
    leaves: list[int]  # of those made, what another rank needs
    seconds: float


class _Clock:
    """The state of one run: where each rank stands, and when each result is there."""

    def __init__(self, schedule: Schedule, costs: Costs, pair: Pair) -> None:
        self.schedule, self.costs = schedule, costs
        self._row = {kind: i * schedule.num_stages for i, kind in enumerate("FBW")}
        kinds = {action[:2] for actions in schedule.ranks for action in actions}
        self._rules = {kind: self._rule(*kind) for kind in kinds}
        self.blocks = [
            [self._block(rank, actions) for actions in _blocks(schedule, rank, pair)]
            for rank in range(len(schedule.ranks))
        ]
        self.at = [0] * len(self.blocks)
        every = 3 * schedule.num_stages * schedule.num_microbatches
        self.ends: list[float | None] = [None] * every
        self.there = [0.0] * every  # when what leaves has come

    def number(self, result: Action) -> int:
        """The place of a result among all."""
        stage, kind, microbatch = result
        return (self._row[kind] + stage) * self.schedule.num_microbatches + microbatch

    def result(self, number: int) -> Action:
        """The result at a place."""
        row, microbatch = divmod(number, self.schedule.num_microbatches)
        kind, stage = divmod(row, self.schedule.num_stages)
        return Action(stage, "FBW"[kind], microbatch)

    def _rule(self, stage: int, kind: str) -> tuple[list[int], list[tuple[int, int]]]:
        """What an action of microbatch 0 makes, and what it needs with the stage that makes it."""
        action = Action(stage, kind, 0)
        wants = needs(action, self.schedule.num_stages)
        return [self.number(r) for r in makes(action)], [(self.number(n), n.stage) for n in wants]

    def _block(self, rank: int, actions: tuple[Action, ...]) -> _Block:
        made, leaves, wants, seconds = [], [], [], 0.0
        for action in actions:
            results, _ = self._rules[action[:2]]
            made += [result + action.microbatch for result in results]
            if self._leaves(rank, action):
                leaves.append(made[-len(results)])
            seconds += self.costs.seconds(action, self.schedule)
        for action in actions:
            k = action.microbatch
            for need, stage in self._rules[action[:2]][1]:
                if need + k not in made:
                    wants.append((need + k, self.schedule.rank_of(stage, k) != rank))
        return _Block(actions, wants, made, leaves, seconds)

    def _leaves(self, rank: int, action: Action) -> bool:
        """Whether another rank needs what it makes."""
        to = action.stage + (1 if action.kind == "F" else -1)
        inside = action.kind in "FBI" and 0 <= to < self.schedule.num_stages
        return inside and self.schedule.rank_of(to, action.microbatch) != rank

    def run(self) -> list[list[float]]:
        """When each block of each rank starts; those that never do are left out."""
        starts: list[list[float]] = [[] for _ in self.blocks]
        free, ends, there = [0.0] * len(self.blocks), self.ends, self.there
        wires, send, wire = [0.0] * len(self.blocks), self.costs.send, self.costs.wire
        waiting: dict[int, list[int]] = {}
        ready = list(range(len(self.blocks)))
        while ready:
            rank = ready.pop()
            blocks, at, now = self.blocks[rank], self.at[rank], free[rank]
            while at < len(blocks):
                block, start = blocks[at], now
                for need, far in block.needs:
                    end = ends[need]
                    if end is None:
                        waiting.setdefault(need, []).append(rank)
                        break
                    if far:
                        end = there[need]
                    if end > start:
                        start = end
                else:
                    now = start + block.seconds
                    starts[rank].append(start)
                    for result in block.leaves:
                        left = max(now, wires[rank])
                        wires[rank], there[result] = left + wire, left + send
                    for result in block.makes:
                        ends[result] = now
                        if result in waiting:
                            ready += waiting.pop(result)
                    at += 1
                    continue
                break
            self.at[rank], free[rank] = at, now
        return starts


def _blocks(schedule: Schedule, rank: int, pair: Pair) -> Iterator[tuple[Action, ...]]:
    actions, i = schedule.ranks[rank], 0
    while i < len(actions):
        both = pair == "block" and actions[i] in schedule.paired
        yield actions[i : i + 2] if both else actions[i : i + 1]
        i += 2 if both else 1


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
    spans = []
    for rank, starts in enumerate(state.run()):
        for start, block in zip(starts, state.blocks[rank], strict=False):
            at = start
            for action in block.actions:
                stage, kind, microbatch = action
                alone = len(block.actions) == 1
                end = at + (block.seconds if alone else costs.seconds(action, schedule))
                spans.append(Span(rank, "compute", kind, str(action), at, end, stage, microbatch))
                at = end
    _raise_deadlock(state)
    return spans


def schedule_starts(
    schedule: Schedule, costs: Costs, ranks: Sequence[Sequence[Action]]
) -> list[list[float]]:
    """When each of these actions starts, as far as they run: the beginnings of a schedule's lists."""
    part = replace(schedule, ranks=tuple(map(tuple, ranks)), paired=frozenset())
    return _Clock(part, costs, "sequence").run()


def _raise_deadlock(state: _Clock) -> None:
    blocked = [r for r, blocks in enumerate(state.blocks) if state.at[r] < len(blocks)]
    if not blocked:
        return
    makers = {result: a for a in state.schedule.actions() for result in makes(a)}
    lines = []
    for rank in blocked:
        block = state.blocks[rank][state.at[rank]]
        missing = [state.result(n) for n, _ in block.needs if state.ends[n] is None]
        names = " ".join(str(makers.get(result, result)) for result in missing)
        lines.append(f"\n  rank {rank}: {block.actions[0]} waits for {names}")
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
    one, none = [1.0] * schedule.num_stages, [0.0] * schedule.num_stages
    return [int(held) for held, _ in peaks_with_gradients(schedule, one, none)]


def held_over_time(
    schedule: Schedule,
    spans: Sequence[Span],
    sizes: Sequence[float] | None = None,
    deferred: Sequence[float] = (),
) -> list[list[tuple[float, float]]]:
    """For each rank the (time, held from then on) of its activations; `sizes[stage]`: 1/v unless given;
    `deferred[stage]` as above."""
    size = sizes or [1 / schedule.virtual_stages] * schedule.num_stages
    freed = {(a.stage, a.microbatch) for a in schedule.actions() if a.kind in "BW"}
    curves: list[list[tuple[float, float]]] = [[] for _ in schedule.ranks]
    held = [0.0] * len(schedule.ranks)
    for s in spans:
        if s.kind == "F" and (s.stage, s.microbatch) in freed:
            held[s.rank] += size[s.stage]
            curves[s.rank].append((s.start_s, held[s.rank]))
        elif s.kind == "I":
            held[s.rank] += _more(size, deferred, s.stage)
            curves[s.rank].append((s.start_s, held[s.rank]))
        elif s.kind in ("B", "W"):
            held[s.rank] -= size[s.stage] + (
                _more(size, deferred, s.stage) if s.kind == "W" else 0.0
            )
            curves[s.rank].append((s.end_s, held[s.rank]))
    return curves


def peak_share(schedule: Schedule) -> list[float]:
    """The same in units of a rank's whole share: v chunks are one."""
    return [peak / schedule.virtual_stages for peak in peak_activations(schedule)]


def peaks_with_gradients(
    schedule: Schedule, kept: Sequence[float], gradients: Sequence[float]
) -> list[tuple[float, float]]:
    """For each rank its activations and gradients where their sum is largest. `kept[stage]` is of a chunk;
    `gradients[stage]` come, block by block, as the first backward (W, where split) lets go of that."""
    return [rank_peak(actions, kept, gradients) for actions in schedule.ranks]


def rank_peak(
    actions: Sequence[Action],
    kept: Sequence[float],
    gradients: Sequence[float],
    deferred: Sequence[float] = (),
) -> tuple[float, float]:
    """The same of one rank's actions. `deferred[stage]`: what a W reads, from its I on, where that is more
    than F kept."""
    freed = {(stage, m) for stage, kind, m in actions if kind in "BW"}
    held, shards, most, found, there = 0.0, 0.0, 0.0, (0.0, 0.0), set[int]()
    for stage, kind, microbatch in actions:
        if kind in "FI":
            if kind == "F" and (stage, microbatch) in freed:
                held += kept[stage]
            elif kind == "I":
                held += _more(kept, deferred, stage)
            if held + shards > most:
                most, found = held + shards, (held, shards)
        elif kind in "BW":
            goes = kept[stage] + (_more(kept, deferred, stage) if kind == "W" else 0.0)
            if stage not in there:
                there.add(stage)
                during = shards + max(gradients[stage] - goes, 0.0)
                if held + during > most:
                    most, found = held + during, (held, during)
                shards += gradients[stage]
            held -= goes
    return found


def _more(kept: Sequence[float], deferred: Sequence[float], stage: int) -> float:
    return max(deferred[stage] - kept[stage], 0.0) if deferred else 0.0

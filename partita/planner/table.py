"""Block answers that bounds are made of: the blocks of a model in order with what each costs, and what a
schedule says of itself on a short step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from partita.schedule.ir import Schedule
from partita.spec.plan import has_fixed_stages


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a microbatch by part, and bytes: kept activations, states by category."""

    forward: float
    input: float
    weight: float
    kept: int = 0
    states: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward + self.input + self.weight

    def __add__(self, other: Cost) -> Cost:
        states = tuple(a + b for a, b in zip(self.states, other.states, strict=True))
        return Cost(
            self.forward + other.forward, self.input + other.input, self.weight + other.weight,
            self.kept + other.kept, states,  # type: ignore[arg-type]
        )  # fmt: skip


NOTHING = Cost(0.0, 0.0, 0.0)


class Proportions:
    """Numbers that a cache may key by: their hash is worked out once."""

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values, self._hash = values, hash(values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proportions) and self.values == other.values


@dataclass(frozen=True)
class Table:
    """The blocks of a model in order, each with its cost, and the FLOPs by which stages are balanced."""

    blocks: tuple[Cost, ...]
    flops: tuple[float, ...]
    unit: float = 0.0  # of a layer's weights, in its largest flat unit: what ZeRO lends at once

    @cached_property
    def proportions(self) -> Proportions:
        """The FLOPs of the blocks by that of a layer."""
        return Proportions(tuple(round(f / self.flops[1], 9) for f in self.flops))

    @cached_property
    def total(self) -> Cost:
        """All blocks."""
        return sum(self.blocks, NOTHING)

    @cached_property
    def _prefix(self) -> list[Cost]:
        return list(accumulate(self.blocks, initial=NOTHING))

    def stages(self, split: Sequence[int]) -> list[Cost]:
        """The cost of each stage of a split of the layers."""
        found, at = [], 1
        for i, layers in enumerate(split):
            low = 0 if i == 0 else at
            at += layers
            high = at + 1 if i == len(split) - 1 else at
            a, b = self._prefix[low], self._prefix[high]
            states = tuple(y - x for x, y in zip(a.states, b.states, strict=True))
            found.append(
                Cost(
                    b.forward - a.forward, b.input - a.input, b.weight - a.weight,
                    b.kept - a.kept, states,  # type: ignore[arg-type]
                )
            )  # fmt: skip
        return found


@dataclass(frozen=True)
class Probe:
    """What a schedule says of itself on a short step: who holds which stage, chunks held at once."""

    held: tuple[tuple[int, ...], ...]  # stages of each rank
    share: tuple[float, ...]  # of the microbatches, that each of a rank's copies runs
    peaks: tuple[tuple[Counter[int], ...], ...]  # for each rank, chunks of each stage at its peaks
    split: bool  # backward in halves

    @cached_property
    def num_stages(self) -> int:
        """Stages of the schedule."""
        return 1 + max(s for held in self.held for s in held)


def pipeline_bound(stages: Sequence[Cost], probe: Probe, m: int) -> float:
    """No schedule with these stages on these ranks ends sooner."""
    before_f = list(accumulate((s.forward for s in stages), initial=0.0))
    back = [s.input if probe.split else s.input + s.weight for s in stages]
    before_b = list(accumulate(back, initial=0.0))
    worst = 0.0
    for held, share in zip(probe.held, probe.share, strict=True):
        work = halves = 0.0
        for s in sorted(held, reverse=True):  # this stage and those behind it on the rank
            work += m * share * stages[s].seconds
            halves += m * share * (stages[s].forward + stages[s].input)
            through = before_f[s] + (halves if probe.split else work) + before_b[s]
            worst = max(worst, through, before_f[s] + work)
    return worst


HALVES = ("zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "interleaved_zb", "dualpipe", "dualpipev")


class Rough:
    """`pipeline_bound` of a schedule for many microbatch sizes at once, where costs grow with the samples:

        step >= max over ranks and stages of  micro * (head + tail) + samples * work

    From where its stages lie alone, which needs no schedule to be made: in a line or a loop, in a vee, or,
    for dualpipe, a copy at either end.
    """

    def __init__(self, schedule: str, ranks: int, virtual: int) -> None:
        self.split = schedule in HALVES
        self.num_stages = ranks * virtual
        at = np.arange(ranks)
        rows = [at + i * ranks for i in range(virtual)]
        if has_fixed_stages(schedule) and virtual == 2:
            rows = [at, 2 * ranks - 1 - at]
        both = schedule == "dualpipe" and ranks > 1
        rows = [at, ranks - 1 - at] if both else rows
        self.held = -np.sort(-np.stack(rows, 1), 1)
        self.share = 0.5 if both else 1.0

    def __call__(self, stages: np.ndarray, micros: np.ndarray, samples: int) -> np.ndarray:
        """Seconds at least for each size; `stages` [stage, 3]: F, I, W of a sample."""
        forward, back, weight = stages.T
        through = back if self.split else back + weight
        before_f = (np.cumsum(forward) - forward)[self.held]
        before_b = (np.cumsum(through) - through)[self.held]
        work = samples * np.cumsum(stages.sum(1)[self.held] * self.share, 1)
        halves = work
        if self.split:
            halves = samples * np.cumsum((forward + back)[self.held] * self.share, 1)
        first = before_f[..., None] * micros + work[..., None]
        second = (before_f + before_b)[..., None] * micros + halves[..., None]
        return np.maximum(first, second).max((0, 1))


def probe_of(schedule: Schedule) -> Probe:
    """Reads a schedule."""
    held, share, peaks = [], [], []
    kinds = {a.kind for a in schedule.actions()}
    for rank, actions in enumerate(schedule.ranks):
        mine = tuple(dict.fromkeys(a.stage for a in actions if a.kind == "F"))
        count = Counter(a.stage for a in actions if a.kind == "F")
        held.append(mine)
        share.append(min(count.values()) / schedule.num_microbatches)
        peaks.append(_peaks(actions))
        assert rank < schedule.num_ranks
    return Probe(tuple(held), tuple(share), tuple(peaks), "W" in kinds)


def _peaks(actions: Sequence[object]) -> tuple[Counter[int], ...]:
    """The chunks a rank holds where it holds most, and the most of each stage."""
    now: Counter[int] = Counter()
    found: list[Counter[int]] = []
    most = 0
    for stage, kind, _ in actions:  # type: ignore[misc]
        if kind == "F":
            now[stage] += 1
            if now.total() > most:
                most, found = now.total(), [Counter(now)]
        elif kind in "BW":
            now[stage] -= 1
    return tuple(found)

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

Three = tuple[float, ...]  # parameters, gradients, optimizer


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a microbatch by part, and bytes: kept activations; states by category, of experts and of the
    rest; of each layer's largest unit parameters and gradients, of the rest and of experts."""

    forward: float
    input: float
    weight: float
    kept: float = 0.0
    states: Three = (0.0, 0.0, 0.0)
    experts: Three = (0.0, 0.0, 0.0)
    units: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward + self.input + self.weight

    @property
    def row(self) -> tuple[float, ...]:
        """All numbers in one row."""
        parts = (self.forward, self.input, self.weight, self.kept)
        return (*parts, *self.states, *self.experts, *self.units)

    @staticmethod
    def of_row(row: Sequence[float]) -> Cost:
        """From a row, or a sum of rows."""
        return Cost(*row[:4], tuple(row[4:7]), tuple(row[7:10]), tuple(row[10:]))


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

    @cached_property
    def proportions(self) -> Proportions:
        """The FLOPs of the blocks by that of a layer."""
        return Proportions(tuple(round(f / self.flops[1], 9) for f in self.flops))

    @cached_property
    def total(self) -> Cost:
        """All blocks."""
        return Cost.of_row(self._prefix[-1].tolist())

    @cached_property
    def layers(self) -> list[tuple[Cost, int]]:
        """Each kind of layer, and how many there are."""
        kinds = {id(b): b for b in self.blocks[1:-1]}
        count = Counter(map(id, self.blocks[1:-1]))
        return [(b, count[key]) for key, b in kinds.items()]

    @cached_property
    def _prefix(self) -> np.ndarray:
        """[blocks + 1, numbers]: sums of the rows before each block."""
        rows = {id(b): b.row for b in self.blocks}
        every = np.array([rows[id(b)] for b in self.blocks])
        return np.concatenate([np.zeros((1, every.shape[1])), np.cumsum(every, 0)])

    def stages(self, split: Sequence[int]) -> list[Cost]:
        """The cost of each stage of a split of the layers."""
        ends = np.cumsum((1, *split))
        ends[0], ends[-1] = 0, len(self.blocks)
        rows = self._prefix[ends[1:]] - self._prefix[ends[:-1]]
        return [Cost.of_row(row) for row in rows.tolist()]


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

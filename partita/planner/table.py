"""Block answers that bounds are made of: the blocks of a model in order with what each costs, and what a
schedule says of itself on a short step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from partita.schedule.ir import Action, Schedule
from partita.simulate.links import SLOW
from partita.spec.plan import has_fixed_stages

Three = tuple[float, ...]  # parameters, gradients, optimizer


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a microbatch by part, and bytes: kept activations; states by category, of experts and of the
    rest; of each layer's largest unit parameters and gradients, of the rest and of experts; seconds that
    rows `travel` to experts and back; what lives `inside` one op of a block, which does not add up; of
    forward and of backward the compute, with what it waits for (`rooms`: more may run beside that); and what
    forward, backward and its weight half take at `least`, however few the tokens are: the host starts every
    kernel, weights are read, their gradients written."""

    forward: float
    input: float
    weight: float
    kept: float = 0.0
    states: Three = (0.0, 0.0, 0.0)
    experts: Three = (0.0, 0.0, 0.0)
    units: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    travel: float = 0.0
    inside: float = 0.0
    rooms: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    least: Three = (0.0, 0.0, 0.0)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward + self.input + self.weight

    def beside(self, forward: float, backward: float) -> tuple[float, float]:
        """By how much forward and backward are longer, at least, where collectives that take so long run
        beside all of their compute: it slows down, and ends no sooner than they do (simulate/links.py)."""
        compute_f, path_f, compute_b, path_b = self.rooms
        there = max(path_f + SLOW * min(forward, compute_f), forward) - self.forward
        back = max(path_b + SLOW * min(backward, compute_b), backward) - self.input - self.weight
        return max(there, 0.0), max(back, 0.0)

    @property
    def row(self) -> tuple[float, ...]:
        """What adds up in one row, as the columns below name it."""
        parts = (self.forward, self.input, self.weight, self.kept)
        return (*parts, *self.states, *self.experts, *self.units, self.travel, *self.least)


# columns of a row, or of rows of stages
TIMES, KEPT, REST, EXPERTS, UNITS = slice(0, 3), 3, slice(4, 7), slice(7, 10), slice(10, 14)
TRAVEL, LEAST = 14, slice(15, 18)


@dataclass(frozen=True, slots=True)
class Shards:
    """Into how many parts ZeRO cuts the states of experts, and at most those of the rest. `narrow`: cut
    parameters may be no more than their masters."""

    rest: int
    experts: int
    narrow: bool = False

    def states(self, rows: np.ndarray, zero: int) -> np.ndarray:
        """[..., 3]: parameters, gradients and optimizer of a rank at least, of [..., numbers]."""
        cut = np.array((zero >= 3, zero >= 2, zero >= 1))

        def ways(n: int) -> np.ndarray:
            return np.where(cut, (np.inf if self.narrow else n, n, n), 1)

        return rows[..., REST] / ways(self.rest) + rows[..., EXPERTS] / ways(self.experts)

    def standing(self, rows: np.ndarray, zero: int) -> np.ndarray:
        """[...]: bytes of those that are there all the time: a gradient that is cut comes with a backward, as
        activations go."""
        parameters, gradients, optimizer = np.moveaxis(self.states(rows, zero), -1, 0)
        return parameters + optimizer + (gradients if zero < 2 else 0.0)

    def whole(self, zero: int) -> np.ndarray:
        """[4]: which of a layer's units a rank has whole for a while, as a block's cost names them: weights
        under ZeRO 3, gradients from 2 on; experts' where they are cut."""
        made = (zero == 3, zero >= 2)
        return np.array((*made, *(x and self.experts > 1 for x in made)), float)


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
    def total(self) -> np.ndarray:
        """[numbers] of all blocks."""
        return self._prefix[-1]

    @cached_property
    def layers(self) -> list[tuple[Cost, int]]:
        """Each kind of layer, and how many there are."""
        kinds = {id(b): b for b in self.blocks[1:-1]}
        count = Counter(map(id, self.blocks[1:-1]))
        return [(b, count[key]) for key, b in kinds.items()]

    @cached_property
    def inside(self) -> np.ndarray:
        """[kind of layer]: bytes that live inside one op."""
        return np.array([b.inside for b, _ in self.layers])

    @cached_property
    def units(self) -> np.ndarray:
        """[kind of layer, 4]: bytes of the largest units, where a rank may have one of two layers."""
        return np.array([b.units for b, _ in self.layers]) * (len(self.blocks) > 3)

    @cached_property
    def kinds(self) -> Proportions:
        """The largest units of each kind of layer."""
        return Proportions(tuple(x for layer, _ in self.layers for x in layer.units))

    @cached_property
    def _prefix(self) -> np.ndarray:
        """[blocks + 1, numbers]: sums of the rows before each block."""
        rows = {id(b): b.row for b in self.blocks}
        return _prefix_of(np.array([rows[id(b)] for b in self.blocks]))

    def stages(self, split: Sequence[int]) -> np.ndarray:
        """[stage, numbers] of a split of the layers."""
        return _between(self._prefix, split)


def _prefix_of(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, 0)])


def _between(prefix: np.ndarray, split: Sequence[int]) -> np.ndarray:
    ends = np.cumsum((1, *split))
    ends[0], ends[-1] = 0, len(prefix) - 1
    return prefix[ends[1:]] - prefix[ends[:-1]]


def spread(rows: np.ndarray, split: Sequence[int]) -> np.ndarray:
    """[stage, numbers]: sums of [block, numbers] over the stages of a split of the layers."""
    return _between(_prefix_of(rows), split)


@dataclass(frozen=True)
class Probe:
    """What a schedule says of itself on a short step: `held` [rank, stage of its own] who holds which stage;
    `share` of the microbatches, that each of a rank's copies runs; `chunks` [rank, stage] at once where a
    rank holds most, and `later`, behind a first backward of all its stages; whether backward is in halves."""

    held: np.ndarray
    share: tuple[float, ...]
    chunks: np.ndarray
    later: np.ndarray
    split: bool

    def most(self, kept: np.ndarray, coming: np.ndarray) -> np.ndarray:
        """[rank] bytes of activations, and of gradients that come with a first backward, at least: `kept`
        [stage] of a chunk, `coming` [rank]."""
        return np.maximum(self.chunks @ kept, coming + self.later @ kept)


HALVES = ("zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "interleaved_zb", "dualpipe", "dualpipev")


HIDES = 1 - SLOW  # of what travels under compute
PAIRED = (
    "dualpipe",
    "dualpipev",
)  # a backward beside a forward: rows travel under the other's compute


class Rough:
    """No schedule of this kind ends sooner, for many microbatch sizes at once:

        step >= max over ranks and stages of  micro * (head + tail) + samples * work

    From where its stages lie alone, which needs no schedule to be made: in a line or a loop, in a vee, or,
    for dualpipe, a copy at either end.
    """

    def __init__(self, schedule: str, ranks: int, virtual: int) -> None:
        self.split = schedule in HALVES
        self.num_stages = ranks * virtual
        at, vee = np.arange(ranks), has_fixed_stages(schedule) and virtual == 2
        rows = [at + i * ranks for i in range(virtual)]
        if vee:
            rows = [at, 2 * ranks - 1 - at]
        both = schedule == "dualpipe" and ranks > 1
        rows = [at, ranks - 1 - at] if both else rows
        self.held = -np.sort(-np.stack(rows, 1), 1)
        self.share = 0.5 if both else 1.0
        self.paired = schedule in PAIRED
        self.kind = (
            virtual,
            vee,
            both,
            self.paired,
        )  # of those with the same bounds, but for `split`

    def times(self, stages: np.ndarray) -> np.ndarray:
        """[stage, 6]: F, I, W of stages at least, where another microbatch's compute hides what it can; and
        what forward, backward and its weight half of any microbatch take."""
        found = np.concatenate([stages[:, TIMES], stages[:, LEAST]], 1)
        if self.paired:
            found[:, 1] -= HIDES * stages[:, TRAVEL]
            found[stages[:, TRAVEL] > 0, 4:] = 0.0
        return found

    def __call__(self, stages: np.ndarray, micros: np.ndarray, samples: int) -> np.ndarray:
        """Seconds at least for each size; `stages` [stage, 6]: F, I, W of a sample, and what a
        microbatch takes at least."""
        first, whole, halves = self.bounds(stages, micros, samples)
        return np.maximum(first, halves) if self.split else whole

    def bounds(
        self, stages: np.ndarray, micros: np.ndarray, samples: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three: all of a rank's work behind its first forward; the same and the tail behind it, where
        backwards are whole (never below the first); and where weight halves are apart what of it is not one
        of them, between the head and the tail."""
        f, i, w, least_f, least_b, least_w = stages.T[..., None]
        forward, back = np.maximum(f * micros, least_f), i * micros
        whole = np.maximum(np.maximum((i + w) * micros, back + least_w), least_b)  # [stage, size]
        head = (forward.cumsum(0) - forward)[self.held]
        times = samples / micros * self.share
        first = times * (forward + whole)[self.held].cumsum(1)
        first += head
        second = times * (forward + back)[self.held].cumsum(1)
        second += head + (back.cumsum(0) - back)[self.held]
        tail = (whole.cumsum(0) - whole)[self.held]
        return first.max((0, 1)), (first + tail).max((0, 1)), second.max((0, 1))

    def fewest(self, split: Sequence[int]) -> float:
        """Layers that a microbatch meets on the rank with fewest, over those of an even split."""
        layers = np.array(split)[self.held].sum(1) * self.share
        return float(layers.min() * len(layers) / sum(split))


def probe_of(schedule: Schedule) -> Probe:
    """Reads a schedule."""
    held, share, chunks, later = [], [], [], []
    kinds = {a.kind for a in schedule.actions()}
    for actions in schedule.ranks:
        count = Counter(a.stage for a in actions if a.kind == "F")
        held.append(sorted(count, reverse=True))
        share.append(min(count.values()) / schedule.num_microbatches)
        for most, into in ((_most(actions), chunks), (_most(actions, count), later)):
            into.append([most[s] for s in range(schedule.num_stages)])
    return Probe(np.array(held), tuple(share), np.array(chunks), np.array(later), "W" in kinds)


def _most(actions: Sequence[Action], before: Iterable[int] = ()) -> Counter[int]:
    """The chunks of each stage that a rank holds where it holds most, behind a first backward of the stages
    `before`."""
    now, found, most, waits = Counter[int](), Counter[int](), 0, set(before)
    for stage, kind, _ in actions:
        if kind == "F":
            now[stage] += 1
            if now.total() > most and not waits:
                most, found = now.total(), Counter(now)
        elif kind in "BW":
            now[stage] -= 1
            waits.discard(stage)
    return found

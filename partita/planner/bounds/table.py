"""Block answers that bounds are made of: the blocks of a model in order with what each costs, and what a
schedule says of itself on a short step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from partita.cost.empirical import SLOW
from partita.planner.bounds.columns import AWAY, EXPERTS, REST, TIMES, TRAVEL
from partita.schedule.ir import Schedule

Three = tuple[float, ...]  # parameters, gradients, optimizer


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a microbatch by part, and bytes: kept activations, and what a weight half reads, which is
    held from its input half on; states by category, of experts and of the rest, and of the optimizer's those
    that lie `away` from the device, of the rest and of experts; of each layer's largest unit
    parameters and gradients, of the rest and of experts; seconds that rows `travel` to experts and back; what
    lives `inside` one op of a block, and what of it would be `sent` to a next stage, which do not add up; of
    forward and of backward the compute, with what it waits for (`rooms`: more may run beside that); and what
    forward and backward take at `least`, however few the tokens are: the host starts every kernel, weights
    are read. `lines` (starts.py): of forward, input half and thrice weight half what a microbatch takes
    beside its tokens, and what these add; and of what its rows travel the first. `lanes`: of an
    endless microbatch (rings.py)."""

    forward: float
    input: float
    weight: float
    kept: float = 0.0
    read: float = 0.0
    states: Three = (0.0, 0.0, 0.0)
    experts: Three = (0.0, 0.0, 0.0)
    units: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    travel: float = 0.0
    inside: float = 0.0
    sent: float = 0.0
    rooms: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    least: tuple[float, float] = (0.0, 0.0)
    away: tuple[float, float] = (0.0, 0.0)
    lines: tuple[float, ...] = (0.0,) * 11
    lanes: tuple[tuple[Any, ...], ...] = ()

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
        parts = (self.forward, self.input, self.weight, self.kept, self.read)
        return (
            *parts,
            *self.states,
            *self.experts,
            *self.units,
            self.travel,
            *self.least,
            *self.away,
            *self.lines,
        )


@lru_cache(maxsize=4096)
def _parts(n: int, narrow: bool, zero: int) -> np.ndarray:
    """[3]: into how many parts parameters, gradients and optimizer are cut, n at most."""
    return np.where((zero >= 3, zero >= 2, zero >= 1), (np.inf if narrow else n, n, n), 1)


@dataclass(frozen=True, slots=True)
class Shards:
    """Into how many parts ZeRO cuts the states of experts, and at most those of the rest. `narrow`: cut
    parameters may be no more than their masters."""

    rest: int
    experts: int
    narrow: bool = False

    def states(self, rows: np.ndarray, zero: int) -> np.ndarray:
        """[..., 3]: parameters, gradients and optimizer of a rank at least, of [..., numbers]."""
        rest, experts = (_parts(n, self.narrow, zero) for n in (self.rest, self.experts))
        return rows[..., REST] / rest + rows[..., EXPERTS] / experts

    def away(self, rows: np.ndarray, zero: int) -> np.ndarray:
        """[...]: bytes of a rank's optimizer states elsewhere, at least, of [..., numbers]."""
        return (rows[..., AWAY] / ((self.rest, self.experts) if zero else (1, 1))).sum(-1)

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

    def __init__(self, values: tuple[object, ...]) -> None:
        self.values, self._hash = values, hash(values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proportions) and self.values == other.values


@dataclass(frozen=True, eq=False)
class Table:
    """The blocks of a model: the cost of each kind, and the FLOPs by which stages are balanced; `at` [block]
    of which kind each is, in order."""

    kinds: tuple[Cost, ...]
    weights: tuple[float, ...]
    at: np.ndarray

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what follows from it."""
        return Table, (self.kinds, self.weights, self.at)

    def is_like(self, other: object) -> bool:
        """Whether that says the same."""
        if not isinstance(other, Table) or self.kinds != other.kinds:
            return False
        return self.weights == other.weights and bool((self.at == other.at).all())

    @staticmethod
    def of(blocks: Sequence[Cost], flops: Sequence[float]) -> Table:
        """From each block's; of the same object its numbers are compared once."""
        found, known, at = (
            dict[tuple[Cost, float], int](),
            dict[tuple[int, float], int](),
            list[int](),
        )
        for pair in zip(blocks, flops, strict=True):
            key = id(pair[0]), pair[1]
            if key not in known:
                known[key] = found.setdefault(pair, len(found))
            at.append(known[key])
        return Table(tuple(b for b, _ in found), tuple(f for _, f in found), np.array(at))

    def mixed(self, other: Table, every: int) -> Table:
        """One of every so many layers, from the first one on, and what is no layer, of the other."""
        theirs = np.arange(len(self.at)) % every == 1
        theirs[[0, -1]] = True
        at = np.where(theirs, other.at + len(self.kinds), self.at)
        return Table((*self.kinds, *other.kinds), (*self.weights, *other.weights), at)

    @property
    def blocks(self) -> tuple[Cost, ...]:
        """The cost of each block."""
        return tuple(self.kinds[i] for i in self.at)

    @cached_property
    def flops(self) -> tuple[float, ...]:
        """Those of each block."""
        return tuple(self.weights[i] for i in self.at)

    @cached_property
    def ends(self) -> tuple[Cost, Cost]:
        """What is no layer: embedding and head."""
        return self.kinds[self.at[0]], self.kinds[self.at[-1]]

    @cached_property
    def proportions(self) -> Proportions:
        """The FLOPs of the blocks by that of a layer."""
        one = self.weights[self.at[1]]
        return Proportions((*(round(f / one, 9) for f in self.weights), self.at.tobytes()))

    @cached_property
    def total(self) -> np.ndarray:
        """[numbers] of all blocks."""
        return self.count @ self.rows

    @cached_property
    def count(self) -> np.ndarray:
        """[kind]: how many blocks are of it."""
        return np.bincount(self.at, minlength=len(self.kinds))

    @cached_property
    def even(self) -> tuple[float, float]:
        """Seconds of all blocks, and those that rows travel."""
        return float(self.total[TIMES].sum()), float(self.total[TRAVEL])

    @cached_property
    def layers(self) -> list[tuple[Cost, int]]:
        """Each kind of layer, and how many there are."""
        count = np.bincount(self.at[1:-1], minlength=len(self.kinds)).tolist()
        return [(b, n) for b, n in zip(self.kinds, count, strict=True) if n]

    @cached_property
    def layers_at(self) -> np.ndarray:
        """[kind of layer]: its row."""
        return np.array([self.kinds.index(layer) for layer, _ in self.layers])

    @cached_property
    def counts(self) -> np.ndarray:
        """[kind of layer]: how many there are."""
        return np.array([float(n) for _, n in self.layers])

    @cached_property
    def rooms(self) -> np.ndarray:
        """[number, kind of layer, 1]: the rooms of a cost."""
        return np.array([layer.rooms for layer, _ in self.layers]).T[..., None]

    @cached_property
    def sent(self) -> float:
        """Bytes from stage to stage, at least."""
        return min(b.sent for b, _ in self.layers)

    @cached_property
    def inside(self) -> np.ndarray:
        """[2, kind of layer]: bytes that live inside one op of a stage that has such a layer, at least; of
        the last stage, where what the head keeps is not there then."""
        each, head = np.array([b.inside for b, _ in self.layers]), self.ends[1]
        return np.array([each, np.maximum(each - head.kept, head.inside)])

    def worst(self, split: Sequence[int], halves: bool) -> np.ndarray:
        """[stage]: bytes beyond what a stage's blocks keep, as `simulate.memory.worst_moment` says it, at
        least: but for gradients that ZeRO cuts. `halves`: backward is in halves."""
        kept = np.array([b.kept - halves * min(b.read, b.kept) for b in self.kinds])[self.at]
        behind, inside = kept.cumsum(), np.array([b.inside for b in self.kinds])[self.at]
        ends = ends_of(split, len(self.at))
        found = np.maximum.reduceat(inside + behind, ends[:-1]) - behind[ends[1:] - 1]
        if not halves:
            return found
        more = np.array([b.read - b.kept for b in self.kinds])[self.at]
        before = more.cumsum()  # of a stage where weight halves read more than was kept
        first = before[ends[:-1]] - more[ends[:-1]]
        late = np.maximum.reduceat(inside - before, ends[:-1]) + first
        return np.where(before[ends[1:] - 1] > first, np.maximum(late, 0.0), found)

    @cached_property
    def units(self) -> np.ndarray:
        """[kind of layer, 4]: bytes of the largest units, where a rank may have one of two layers."""
        return np.array([b.units for b, _ in self.layers]) * (len(self.at) > 3)

    def whole(self, split: Sequence[int], parts: np.ndarray) -> np.ndarray:
        """[way, stage]: bytes of a layer's units, of which these `parts` [way, 4] are whole for a while, at
        least."""
        sizes = self.block_units @ parts.T
        return np.maximum.reduceat(sizes, ends_of(split, len(self.at))[:-1]).T

    @cached_property
    def block_units(self) -> np.ndarray:
        """[block, 4]: the same of each block, of those that are layers."""
        found = np.zeros((len(self.at), 4))
        found[1:-1] = np.array([b.units for b in self.kinds])[self.at[1:-1]] * (len(self.at) > 3)
        return found

    @cached_property
    def largest(self) -> Proportions:
        """The largest units of each kind of layer."""
        return Proportions(tuple(x for layer, _ in self.layers for x in layer.units))

    @cached_property
    def rows(self) -> np.ndarray:
        """[kinds, numbers]."""
        return np.array([b.row for b in self.kinds])

    @cached_property
    def prefix(self) -> np.ndarray:
        """[blocks + 1, numbers]: sums of the rows before each block."""
        return _prefix_of(self.rows[self.at])

    def stages(self, split: Sequence[int]) -> np.ndarray:
        """[stage, numbers] of a split of the layers."""
        return _between(self.prefix, split)


def _prefix_of(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, 0)])


def ends_of(split: Sequence[int], blocks: int) -> np.ndarray:
    """[stage + 1]: where the blocks of each stage begin; the first and the last have what is no layer."""
    ends = np.cumsum((1, *split))
    ends[0], ends[-1] = 0, blocks
    return ends


def _between(prefix: np.ndarray, split: Sequence[int]) -> np.ndarray:
    ends = ends_of(split, len(prefix) - 1)
    return prefix[ends[1:]] - prefix[ends[:-1]]


def spread(rows: np.ndarray, split: Sequence[int]) -> np.ndarray:
    """[stage, numbers]: sums of [block, numbers] over the stages of a split of the layers."""
    return _between(_prefix_of(rows), split)


@dataclass(frozen=True)
class Probe:
    """What a schedule says of itself on a short step: `held` [rank, stage of its own] who holds which stage;
    `share` of the microbatches, that each of a rank's copies runs; `chunks` [moment, rank, stage] at once,
    and those of them that `wait` for their weight half, where a rank holds most as one or the other weighs
    more; `later` [rank, stage] where it does behind a first backward of all its stages; whether backward is
    in halves."""

    schedule: Schedule
    held: np.ndarray
    share: tuple[float, ...]
    chunks: np.ndarray
    wait: np.ndarray
    later: np.ndarray
    split: bool

    def most(self, kept: np.ndarray, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[rank] bytes of activations at once, and where gradients come with a first backward, at least:
        `kept` [stage] of a chunk, `read` by its weight half."""
        held = self.chunks @ kept + self.wait @ np.maximum(read - kept, 0.0)
        return np.maximum.reduce(held, 0), self.later @ kept


# of a chunk that waits for its weight half: what recomputes keeps little before
WEIGHTS = 0, 1, 16
# by the letter of an action: chunks that are held, those that wait, whether a backward ends
HELD, WAITING, ENDS = np.zeros((3, 128), int)
HELD[[ord(kind) for kind in "FBW"]] = 1, -1, -1
WAITING[[ord(kind) for kind in "IW"]] = 1, -1
ENDS[[ord(kind) for kind in "BW"]] = 1


def probe_of(schedule: Schedule) -> Probe:
    """Reads a schedule."""
    held, share, later = [], [], []
    split, stages = "W" in schedule.kinds, schedule.num_stages
    weights = np.array(WEIGHTS[: 1 + 2 * split])
    chunks, wait = np.zeros((2, len(weights), len(schedule.ranks), stages), int)
    for rank, actions in enumerate(schedule.ranks):
        numbers, kinds, _ = zip(*actions, strict=True)
        at, letters = np.array(numbers), np.frombuffer("".join(kinds).encode(), np.uint8)
        runs = np.bincount(at[letters == ord("F")], minlength=stages)
        own = runs.nonzero()[0][::-1]
        held.append(own.tolist())
        share.append(int(runs[own].min()) / schedule.num_microbatches)
        changes = HELD[letters], WAITING[letters]
        now, waits = (np.cumsum(x) for x in changes)
        for i, weight in enumerate(weights):
            end = _first_most(now + weight * waits)
            chunks[i, rank], wait[i, rank] = (_sums(at, x, end, stages) for x in changes)
        ended, last = at[ENDS[letters] > 0], len(at)
        if len(firsts := np.unique(ended, return_index=True)[1]) == len(own):
            last = int((ENDS[letters] > 0).nonzero()[0][firsts.max()])
        end = _first_most(np.where(np.arange(len(at)) < last, 0, now))
        later.append(_sums(at, changes[0], end, stages))
    return Probe(schedule, np.array(held), tuple(share), chunks, wait, np.array(later), split)


def _first_most(held: np.ndarray) -> int:
    """Behind how many of its actions a rank first holds most; none where it never holds anything."""
    at = int(held.argmax())
    return at + 1 if held[at] > 0 else 0


def _sums(at: np.ndarray, changes: np.ndarray, end: int, stages: int) -> np.ndarray:
    """[stage]: the sum of what its first actions change."""
    return np.bincount(at[:end], changes[:end], stages).astype(int)

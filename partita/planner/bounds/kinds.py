"""All kinds of schedules of a pipeline at once: the bounds of rough.Rough, of all ranks and of all of their
stages, in one pass over arrays. They cut most schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from partita.planner.bounds.rough import HIDES, Rough, halves
from partita.planner.bounds.table import Table, ends_of

Bounds3 = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Runs:
    """Neighbouring rows of arrays that belong together: the first row of each run, and of each row's."""

    first: np.ndarray
    of_row: np.ndarray

    @staticmethod
    def of(lengths: Sequence[int]) -> _Runs:
        first = np.array([0, *accumulate(lengths)][:-1])
        return _Runs(first, np.repeat(first, lengths))

    def before(self, rows: np.ndarray) -> np.ndarray:
        """[row, size]: the sum of the rows of its run before each."""
        sums = rows.cumsum(0)
        sums -= rows
        return sums - sums[self.of_row]


class Kinds:
    """The kinds of some schedules, each with a split of a model's layers, whose blocks are of these `kinds`
    [block]; `place[kind]` of each."""

    def __init__(
        self, roughs: Sequence[Rough], splits: Sequence[Sequence[int]], kinds: np.ndarray
    ) -> None:
        first = {r.kind: i for i, r in reversed(list(enumerate(roughs)))}
        self.place: dict[object, int] = {kind: k for k, kind in enumerate(first)}
        mine = [(roughs[i], splits[i]) for i in first.values()]
        rows, held, hops = list[tuple[int, ...]](), list[np.ndarray](), list[np.ndarray]()
        for rough, split in mine:
            ends = ends_of(split, len(kinds))
            for a, b in pairwise(ends.tolist()):
                count = np.bincount(kinds[a:b], minlength=int(kinds.max()) + 1)
                rows.append((int(rough.paired), *count.tolist()))
            held.append(rough.held)
            hops.append(rough.hops)
        alike = {row: i for i, row in enumerate(dict.fromkeys(rows))}  # stages that cost the same
        each = np.array(list(alike))
        self._hides, self._counts = HIDES * each[:, 0], each[:, 1:]
        self._row = np.array([alike[row] for row in rows])
        self._stages = _Runs.of([len(h) for h in hops])
        self._ranks = _Runs.of([h.shape[1] for h in held for _ in h])
        sizes = [h.size for h in held]
        self._held = np.concatenate(
            [h.ravel() + at for h, at in zip(held, self._stages.first.tolist(), strict=True)]
        )
        self._first, self._hops = _Runs.of(sizes).first, np.concatenate(hops)
        self._share = np.repeat([r.share for r, _ in mine], sizes)[:, None]
        self.fewest = np.array([r.fewest(s) for r, s in mine])[:, None]

    def __call__(
        self, table: Table, scale: float, micros: np.ndarray, samples: int, send: np.ndarray | float
    ) -> Bounds3:
        """[kind, size]: the three bounds of `Rough.bounds`; a sample takes `scale` of the table's seconds."""
        told = halves(self._counts @ table.rows, scale * micros, self._hides)
        forward, back, whole = (x[self._row] for x in told[:3])
        messages, held, before = self._hops * send, self._held, self._stages.before
        head = (before(forward) + messages)[held]
        times = samples / micros * self._share
        first = (forward + whole)[held]
        first = times * (self._ranks.before(first) + first) + head
        second = (forward + back)[held]
        second = times * (self._ranks.before(second) + second)
        second += head
        second += (before(back) + messages)[held]
        most, at = np.maximum.reduceat, self._first
        tail = first + (before(whole) + messages)[held]
        return most(first, at), most(tail, at), most(second, at)

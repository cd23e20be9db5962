"""All kinds of schedules of a pipeline at once, as its last rank sees them: of the bounds of rough.Rough the
one of that rank and all of its stages, wherever these may lie. It cuts most schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.planner.rough import HIDES, Rough, halves
from partita.planner.table import Table

Bounds3 = tuple[np.ndarray, np.ndarray, np.ndarray]


class Kinds:
    """The kinds of some schedules, each with a split of the layers; `place[kind]` of each."""

    def __init__(self, roughs: Sequence[Rough], splits: Sequence[Sequence[int]]) -> None:
        first = {r.kind: i for i, r in reversed(list(enumerate(roughs)))}
        self.place: dict[object, int] = {kind: k for k, kind in enumerate(first)}
        mine = [(roughs[i], splits[i]) for i in first.values()]
        blocks = sum(splits[0]) + 2
        self._before = np.zeros(len(mine), int)  # [kind]: blocks of the stages before the rank's
        self._own = np.zeros((len(mine), blocks + 1))  # [kind, block]: what sums up the rank's own
        for k, (rough, split) in enumerate(mine):
            ends = np.cumsum((1, *split))
            ends[0], ends[-1] = 0, blocks
            stages = rough.held[-1]
            self._before[k] = ends[stages[-1]]
            for stage in stages:
                self._own[k, ends[stage + 1]] += 1
                self._own[k, ends[stage]] -= 1
        column = [(r.share, r.fewest(s), r.hops[r.held[-1, -1], 0], r.paired) for r, s in mine]
        self.share, self.fewest, self.hops, paired = np.array(column, float).T[..., None]
        self._hides = HIDES * paired[:, 0]

    def __call__(
        self, table: Table, scale: float, micros: np.ndarray, samples: int, send: np.ndarray | float
    ) -> Bounds3:
        """[kind, size]: the three bounds of `Rough.bounds`; a sample takes `scale` of the table's seconds."""
        share = scale * micros
        before = halves(table.prefix[self._before], share, self._hides)
        own = halves(self._own @ table.prefix, share, self._hides)
        messages = self.hops * send
        times = samples / micros * self.share
        first = times * (own.forward + own.whole) + before.forward + messages
        second = times * (own.forward + own.back) + before.forward + before.back + 2 * messages
        return first, first + before.whole + messages, second

"""Which rank is slow: its own time of a step, without its waits, beside that of ranks with equal work.

    peers          the other ranks of its place on pp; `ratio` is its time over the median of theirs
    without any    its time over its own median of HISTORY steps, over what that is of the others

Named is who stays above RATIO, and GAP_S above what is held against it, for STEPS steps in a row: one slow
step is noise. A rank is through when it has stayed below as long. What is read is in the mapped file, or
exchanged, anyway: nothing more is sent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import median

from partita.base.units import format_seconds

RATIO, GAP_S, STEPS = 1.5, 0.01, 5
WARM_UP, HISTORY = 3, 8  # steps of a start: not looked at, then of a lone rank's own median


@dataclass(frozen=True)
class Straggler:
    """A slow rank: how many times as long as its peers (or itself before) it takes for a step."""

    rank: int
    ratio: float
    busy_s: float
    peers_s: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} takes {self.ratio:.1f} times as long for a step as ranks with its work do "
            f"({format_seconds(self.busy_s)}, not {format_seconds(self.peers_s)}), {STEPS} steps in a row"
        )


class Stragglers:
    """Watches the ranks of a run; `places` says of each which others have equal work."""

    def __init__(self, places: Sequence[Hashable]) -> None:
        self._peers = [
            [other for other, at in enumerate(places) if at == place and other != rank]
            for rank, place in enumerate(places)
        ]
        self._seen = 0
        self._history: list[list[float]] = [[] for _ in places]
        self._above = [0] * len(places)  # steps in a row; negative: below
        self._ratios: list[list[float]] = [[] for _ in places]
        self.found: dict[int, Straggler] = {}

    def see(self, busy_s: Sequence[float]) -> tuple[list[Straggler], list[int]]:
        """Every rank's seconds of a step (0: not known yet): who is named now, and who is through."""
        self._seen += 1
        if self._seen <= WARM_UP or not all(busy_s):
            return [], []
        for past, busy in zip(self._history, busy_s, strict=True):
            if len(past) < HISTORY:
                past.append(busy)
        named, through = [], []
        for rank, busy in enumerate(busy_s):
            expected = self._expected(rank, busy_s)
            above = busy > RATIO * expected and busy - expected > GAP_S
            run = self._above[rank]
            self._above[rank] = max(run, 0) + 1 if above else min(run, 0) - 1
            self._ratios[rank] = [*self._ratios[rank][1 - STEPS :], busy / expected]
            if self._above[rank] >= STEPS:
                if rank not in self.found:
                    named.append(rank)
                ratio = median(self._ratios[rank])
                self.found[rank] = Straggler(rank, ratio, busy, expected)
            elif self._above[rank] <= -STEPS and self.found.pop(rank, None):
                through.append(rank)
        return [self.found[r] for r in named], through

    @property
    def worst(self) -> Straggler | None:
        """The slowest of those that are named."""
        return max(self.found.values(), key=lambda s: s.ratio, default=None)

    def _expected(self, rank: int, busy_s: Sequence[float]) -> float:
        """Seconds that a rank would take if it were as the others are."""
        peers = self._peers[rank]
        if peers:
            return median(busy_s[r] for r in peers)
        past = self._history
        others = [busy_s[r] / median(past[r]) for r in range(len(past)) if r != rank]
        return median(past[rank]) * median(others)

"""Collectives that run side by side share the links they cross (processor sharing).

Two lanes of which one at least runs beside compute are on a link together for a part of the block's time
T: lane a for s_a of it, lane b for s_b, so s_a s_b / T where neither waits for the other. While both are
there each has half the link, so each takes that much longer; the bytes are the same. Lanes that compute
waits for run one after the other and never meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations


@dataclass
class Lane:
    """Seconds of a lane's collectives in a block, alone on their links: by axis, and by link. `room`:
    seconds of compute it may run beside, 0 where compute waits for it."""

    room: float
    by_axis: dict[str, float] = field(default_factory=dict)
    by_link: dict[str, float] = field(default_factory=dict)

    def add(self, axis: str, link: str, seconds: float) -> None:
        """One more collective."""
        self.by_axis[axis] = self.by_axis.get(axis, 0.0) + seconds
        self.by_link[link] = self.by_link.get(link, 0.0) + seconds

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.by_axis.values())


def lengthened(lanes: Mapping[str, Lane], compute_s: float) -> dict[str, float]:
    """How many times as long each lane takes, sharing its links with the others of a block that computes
    so long."""
    waited = sum(x.seconds for x in lanes.values() if not x.room)
    whole = compute_s + waited
    more = dict.fromkeys(lanes, 0.0)
    for (a, one), (b, other) in combinations(lanes.items(), 2):
        if not (one.room or other.room):
            continue
        for link in one.by_link.keys() & other.by_link.keys():
            s, t = one.by_link[link], other.by_link[link]
            together = min(s * t / whole, s, t)
            more[a] += together
            more[b] += together
    return {n: 1 + more[n] / x.seconds if x.seconds else 1.0 for n, x in lanes.items()}

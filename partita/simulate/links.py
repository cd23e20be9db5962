"""Collectives that run side by side: what of them a block sees, on links that they share.

A block computes for c seconds; it waits for some lanes, one after the other (w in all), and others run beside
it, each with some compute as its room. Its time is the longest of

    the path    c + w + what w takes longer on shared links + SLOW of what is hidden
    a lane      its own seconds and the compute that it may not run beside
    a link      the seconds of all lanes that cross it, since it carries one byte at a time

Processor sharing: a lane of s seconds that is waited for meets those beside it (t on its link) for a part
t / (c + w) of them; while both are there each has half the link, so it takes that much longer, never more
than s. More bandwidth or faster compute never makes a block slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from partita.cost.empirical import SLOW


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


def seen_seconds(lanes: Mapping[str, Lane], compute_s: float) -> dict[str, float]:
    """What a block that computes so long takes longer for each lane; what none but the longest lane or the
    fullest link explains is counted for the lane with most on it."""
    beside = {n: x for n, x in lanes.items() if x.room}
    waited = {n: x for n, x in lanes.items() if not x.room}
    base = compute_s + sum(x.seconds for x in waited.values())
    links: dict[str, float] = defaultdict(float)
    for lane in beside.values():
        for link, s in lane.by_link.items():
            links[link] += s
    found = {n: x.seconds + _longer(x, links, base) for n, x in waited.items()}
    found |= {n: SLOW * min(x.seconds, x.room) for n, x in beside.items()}
    path = compute_s + sum(found.values())
    bounds = {n: x.seconds + compute_s - x.room for n, x in beside.items()}
    for link, s in links.items():
        total = s + sum(x.by_link.get(link, 0.0) for x in waited.values())
        most = max(beside, key=lambda n: beside[n].by_link.get(link, 0.0))
        bounds[most] = max(bounds[most], total)
    if bounds:
        longest = max(bounds, key=lambda n: bounds[n])
        found[longest] += max(bounds[longest] - path, 0.0)
    return {n: s for n, s in found.items() if s}


def path_seconds(lanes: Mapping[str, Lane], compute_s: float) -> float:
    """What a block takes at least, whichever lane or link is longest: the path, on links of their own."""
    waited = (SLOW * min(x.seconds, x.room) if x.room else x.seconds for x in lanes.values())
    return compute_s + sum(waited)


def _longer(lane: Lane, links: Mapping[str, float], base: float) -> float:
    """Seconds that a lane that is waited for takes longer beside others on its links."""
    return sum(
        min(s * links[link] / base, s)
        for link, s in lane.by_link.items()
        if links.get(link) and base
    )


def one_ahead(compute_s: float, travel_s: float, sizes: Sequence[float]) -> float:
    """Seconds for which a layer's tensors travel under its compute, where each does beside what is computed
    with the one before, and both take as long as its size:

        sum over tensors of min(compute_s * own share, travel_s * next share)
    """
    whole = sum(sizes)
    following = (*sizes[1:], *sizes[:1])
    pairs = zip(sizes, following, strict=True)
    return sum(min(compute_s * a / whole, travel_s * b / whole) for a, b in pairs)

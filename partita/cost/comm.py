"""Seconds of a collective, by size, group, algorithm and link.

Measured links (`partita calibrate`), alpha-beta with ring algorithms (Hockney; Thakur et al. 2005), n
ranks, `size` bytes that a rank hands in, alpha seconds a message, beta seconds a byte:

    all_reduce      2 (n-1) alpha + 2 (n-1)/n size beta
    reduce_scatter    (n-1) alpha +   (n-1)/n size beta
    all_gather        (n-1) alpha +   (n-1)   size beta      size is the shard
    all_to_all        (n-1) alpha +   (n-1)/n size beta
    broadcast         (n-1) alpha +           size beta
    send                    alpha +           size beta

Published links (`Group`): a group has `inside` ranks on each of `nodes` nodes. A ring leaves a node over
as many adapters as the group has ranks there, so its rate is min(inner, inside * outer): groups that run
side by side share the node's adapters by construction. Inside a node a ring of n ranks reaches n / (n + FILL)
of the link, since it is filled and drained once a call. Latency: BASE for a call, HOP for each step inside
a node, and for each step between nodes of a ring, or of a tree (2 log2 nodes) where that is sooner. An
all_to_all sends the part for its own node over the inner link and the rest over each rank's adapter. One that
moves rows to `top_k` experts may send a row once to each node, however many of its experts lie there, and
there once to each rank over the inner link (DeepEP, HybridEP; back, what a rank's experts made of it is added
before it leaves). Of rows sent one by one, to experts chosen evenly, that is, for nodes and for ranks alike,

    n (1 - (1 - 1/n)^top_k) / top_k

Switches that add (a link that `reduces`: NVLink SHARP inside a node, SHARP between nodes; Graham et al. 2016,
Klenk et al. 2020) shorten an all_reduce, which takes the sooner of that and a ring or tree: of `inside` ranks
each sends all it has once, receives its share's sum, sends that once and receives all sums; between nodes a
share of 1/inside goes up and its sum comes down, one hop each, while the node adds and spreads:

    inside a node      2 hops      (1 + 1/inside) size / inner     in place of 2 (inside-1)/inside size
    between nodes      2 hops      max(that, size / inside / outer)

Their rate is taken to be the same fraction of the link's as a ring's.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf, log2

from partita.cost.empirical import BASE, FILL, HOP


@dataclass(frozen=True, slots=True)
class AlphaBeta:
    """A link: seconds a message and bytes a second, per direction and device."""

    latency_s: float
    bytes_per_s: float
    reduces: bool = False  # its switches add what passes through them


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that meet: `inside` on each of `nodes` nodes, and the links they cross."""

    inside: int
    nodes: int
    inner: AlphaBeta
    outer: AlphaBeta

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.inside * self.nodes

    @property
    def rate(self) -> float:
        """Bytes a second of a ring through the group, per rank."""
        if self.nodes == 1:
            return self.inner.bytes_per_s * self.inside / (self.inside + FILL)
        out = self.inside * self.outer.bytes_per_s
        return min(self.inner.bytes_per_s, out) if self.inside > 1 else out


def steps_and_bytes(collective: str, n: int, size: float) -> tuple[float, float]:
    """Messages in a row, and bytes through a rank's link."""
    if collective == "all_reduce":
        return 2 * (n - 1), 2 * (n - 1) / n * size
    if collective in ("reduce_scatter", "all_to_all"):
        return n - 1, (n - 1) / n * size
    if collective == "all_gather":
        return n - 1, (n - 1) * size
    return (n - 1 if collective == "broadcast" else 1), size


def seconds(collective: str, n: int, size: float, link: AlphaBeta) -> float:
    """Time of one collective over n ranks of a measured link; 0 for a rank alone."""
    if n <= 1:
        return 0.0
    messages, through = steps_and_bytes(collective, n, size)
    return messages * link.latency_s + through / link.bytes_per_s


def group_seconds(collective: str, group: Group, size: float, top_k: int = 1) -> float:
    """Time of one collective over a group on published links; 0 for a rank alone. `top_k`: an all_to_all
    sends a row once to a node that holds several of so many experts."""
    n = group.size
    if n <= 1:
        return 0.0
    link = group.outer if group.nodes > 1 else group.inner
    if collective == "send":
        return link.latency_s + size / link.bytes_per_s
    messages, through = steps_and_bytes(collective, n, size)
    rounds = messages / (n - 1)
    base = BASE * link.latency_s
    if collective == "all_to_all":
        return base + HOP * link.latency_s * log2(n) + _all_to_all(group, size, top_k)
    within = rounds * HOP * group.inner.latency_s * (group.inside - 1)
    added = _added_on_the_way(group, size) if collective == "all_reduce" else inf
    if group.nodes == 1:
        return base + min(within + through / group.rate, added)
    ring = rounds * HOP * link.latency_s * (group.nodes - 1) + through / group.rate
    tree = rounds * HOP * link.latency_s * 2 * ceil(log2(group.nodes)) + through / group.rate
    return base + min(within + min(ring, tree), added)


def wire_seconds(group: Group, size: float) -> float:
    """Seconds in which a message takes the link out of its rank, of those that group_seconds tells of it."""
    link = group.outer if group.nodes > 1 else group.inner
    return size / link.bytes_per_s if group.size > 1 else 0.0


def _added_on_the_way(group: Group, size: float) -> float:
    """Seconds beyond the base of an all-reduce whose outermost switches add; infinite where they do not."""
    inside, inner, outer = group.inside, group.inner, group.outer
    alone = group.nodes == 1
    if not (inner if alone else outer).reduces:
        return inf
    if inner.reduces:
        hops, times = 2.0, 1 + 1 / inside
    else:
        hops, times = 2.0 * (inside - 1), 2 * (inside - 1) / inside
    near = times * size / (group.rate if alone else inner.bytes_per_s) if inside > 1 else 0.0
    wait = hops * HOP * inner.latency_s if inside > 1 else 0.0
    if alone:
        return wait + near
    return wait + 2 * HOP * outer.latency_s + max(near, size / inside / outer.bytes_per_s)


def _all_to_all(group: Group, size: float, top_k: int) -> float:
    n, nodes = group.size, group.nodes
    inner = (group.inside - 1) * (nodes if top_k > 1 else 1)  # copies are made where they arrive
    own = inner / n * size * _once(n, top_k) / group.inner.bytes_per_s
    away = (n - group.inside) / n * size * _once(nodes, top_k) / group.outer.bytes_per_s
    return max(own, away)


def _once(places: int, top_k: int) -> float:
    """Of rows sent once to each of top_k experts, those that are sent once to each place that has one."""
    return places * (1 - (1 - 1 / places) ** top_k) / top_k

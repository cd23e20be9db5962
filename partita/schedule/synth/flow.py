"""A pipeline as streams, which is what a search works on.

Microbatches are alike, so those of one direction may be renamed where their paths cross: nothing is lost
by letting every stage take them in order. A schedule is then, for each rank, an interleaving of a few
*streams*, one a (stage, direction, kind F, I or W), whose k-th items are the microbatches 0, 1, 2 ... of
the direction; B is I with W right behind it, which is never slower. `orders[rank]` is a list of stream
numbers, and the k-th occurrence of a number is the stream's k-th item.

Read backwards in time a flow is again a flow: needs point the other way, W takes memory and F gives it
back, and messages share the link into a rank. So what improves the start of a schedule improves its end too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from partita.schedule.clock import Costs
from partita.schedule.ir import Action, Placement, Schedule

Orders = list[list[int]]
EPSILON = 1e-9  # relative to the costs' scale: times closer than that are one


@dataclass(frozen=True)
class Flow:
    """The streams: `names[x]` = (stage, direction, kind); `needs[x]` = (stream, seconds on the way)
    whose item of the same number comes first; `held[x]` is taken when an item starts (> 0) or given back
    when it ends (< 0); `limits` caps what a rank holds. A rank begins at `release` or later and its end
    counts `tail` later: both 0 for the flush time (see `for_span`). Messages out of a rank (into it, where
    `inward`) leave in the order in which they were made, each `wire` behind the one before at the soonest; 0
    where that can delay none. `far[x]`: the stream on another rank that x's items go to, and the seconds."""

    placements: tuple[Placement, ...]
    direction: tuple[int, ...] | None
    names: tuple[tuple[int, int, str], ...]
    rank: tuple[int, ...]
    seconds: tuple[float, ...]
    needs: tuple[tuple[tuple[int, float], ...], ...]
    held: tuple[float, ...]
    count: tuple[int, ...]
    limits: tuple[float, ...]
    release: tuple[float, ...]
    tail: tuple[float, ...]
    wire: float = 0.0
    inward: bool = False
    feeds: tuple[tuple[tuple[int, float], ...], ...] = field(init=False)
    far: tuple[tuple[int, float] | None, ...] = field(init=False)

    def __post_init__(self) -> None:
        feeds: list[list[tuple[int, float]]] = [[] for _ in self.names]
        far: list[tuple[int, float] | None] = [None] * len(self.names)
        for x, needs in enumerate(self.needs):
            for need, lag in needs:
                feeds[need].append((x, lag))
                if self.rank[need] != self.rank[x]:
                    far[need] = x, lag
        object.__setattr__(self, "feeds", tuple(map(tuple, feeds)))
        object.__setattr__(self, "far", tuple(far))

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.limits)

    def streams_of(self, rank: int) -> list[int]:
        """The streams that run on the rank."""
        return [x for x, r in enumerate(self.rank) if r == rank]

    def reversed(self) -> Flow:
        """The same read backwards in time."""
        back = tuple(-h for h in self.held)
        return replace(
            self,
            needs=self.feeds,
            held=back,
            release=self.tail,
            tail=self.release,
            inward=not self.inward,
        )

    def come(self, x: int, end: float, links: list[float]) -> float:
        """When a result of x that ends then is on its other rank; `links`: until when each rank's is taken
        (-inf to begin with), which this moves on."""
        far = self.far[x]
        assert far is not None, "it goes to another rank"
        if self.inward:
            link = self.rank[far[0]]
            links[link] = max(end + far[1], links[link] + self.wire)
            return links[link]
        left = max(end, links[self.rank[x]])
        links[self.rank[x]] = left + self.wire
        return left + far[1]

    def for_span(self, heads: Sequence[float]) -> Flow:
        """The same with each rank's end counted from `heads[rank]`, its first possible start: its
        makespan is the span plus the latest of them."""
        latest = max(heads)
        return replace(self, tail=tuple(latest - head for head in heads))


@dataclass(frozen=True)
class Held:
    """What a microbatch holds from F on at each stage, in the unit of the limits, and the fraction of it
    that the weight half still needs: the rest is given back when I ends."""

    sizes: Sequence[float]
    until_weights: float = 1.0


def flow_of(
    placements: Sequence[Placement],
    num_microbatches: int,
    costs: Costs,
    limits: Sequence[float],
    direction: tuple[int, ...] | None = None,
    held: Held | None = None,
) -> Flow:
    """The flow of a placement (two of them with `direction`); `held`: one activation a stage unless told."""
    stages = len(placements[0])
    at = {
        (s, way, kind): i
        for i, (way, s, kind) in enumerate(
            (way, s, kind)
            for way in range(len(placements))
            for s in range(stages)
            for kind in "FIW"
        )
    }
    needs = []
    for s, way, kind in at:
        before = {"F": [(s - 1, "F")], "I": [(s, "F"), (s + 1, "I")], "W": [(s, "I")]}[kind]
        place = placements[way]
        needs.append(
            tuple(
                (at[q, way, k], costs.send if place[q] != place[s] else 0.0)
                for q, k in before
                if 0 <= q < stages
            )
        )
    kept = held.until_weights if held else 1.0
    sign = {"F": 1.0, "I": kept - 1.0, "W": -kept}
    counts = [num_microbatches] if direction is None else [direction.count(w) for w in (0, 1)]
    # A rank makes no two results sooner one after the other than the quickest takes
    quickest = min((costs.stages[s].of(kind) for s, _, kind in at if kind != "W"), default=0.0)
    return Flow(
        placements=tuple(placements),
        direction=direction,
        names=tuple(at),
        rank=tuple(placements[way][s] for s, way, _ in at),
        seconds=tuple(costs.stages[s].of(kind) for s, _, kind in at),
        needs=tuple(needs),
        held=tuple(sign[kind] * (held.sizes[s] if held else 1.0) for s, _, kind in at),
        count=tuple(counts[way] for _, way, _ in at),
        limits=tuple(limits),
        release=(0.0,) * len(limits),
        tail=(0.0,) * len(limits),
        wire=costs.wire if costs.wire > quickest else 0.0,
    )


def flow_like(
    schedule: Schedule,
    costs: Costs,
    limits: Sequence[float],
    held: Held | None = None,
) -> Flow:
    """The flow that a schedule is an order of."""
    m = schedule.num_microbatches
    return flow_of(schedule.placements, m, costs, limits, schedule.direction, held)


def orders_of(flow: Flow, schedule: Schedule) -> Orders:
    """The schedule's lists as streams; a B is I and W."""
    at = {name: x for x, name in enumerate(flow.names)}
    way = schedule.direction or (0,) * schedule.num_microbatches
    return [
        [
            at[a.stage, way[a.microbatch], kind]
            for a in actions
            for kind in ("IW" if a.kind == "B" else a.kind)
            if kind != "U"
        ]
        for actions in schedule.ranks
    ]


def schedule_of(flow: Flow, orders: Orders, name: str) -> Schedule:
    """The schedule of the orders, every item named by its microbatch."""
    direction = flow.direction or (0,) * flow.count[0]
    of_way = [[k for k, w in enumerate(direction) if w == way] for way in (0, 1)]
    ranks = []
    for order in orders:
        made = [0] * len(flow.names)
        row = []
        for x in order:
            stage, way, kind = flow.names[x]
            row.append(Action(stage, kind, of_way[way][made[x]]))
            made[x] += 1
        ranks.append(tuple(row))
    down, up = flow.placements[0], flow.placements[-1]
    placement = (down, up) if flow.direction is not None else down
    stages, m = len(down), len(direction)
    return Schedule(
        name,
        flow.num_ranks,
        stages,
        m,
        placement,
        tuple(ranks),
        direction=flow.direction,
    )


def starts_of(flow: Flow, orders: Orders) -> tuple[float, list[list[float]]] | None:
    """(makespan with tails, start of each item in each rank's order), ranks in order; None in a deadlock. Of
    a flow read backwards messages share no link here: which comes first its orders alone do not say."""
    ends: list[list[float]] = [[] for _ in flow.names]
    shares = flow.wire > 0 and not flow.inward
    comes, links = comes_of(flow, ends, shares), [-math.inf] * len(orders)
    starts: list[list[float]] = [[] for _ in orders]
    free = list(flow.release)
    waiting: dict[int, list[int]] = {}
    ready = list(range(len(orders)))
    streams = [
        (
            ends[x], flow.seconds[x], comes[x] if comes[x] is not ends[x] else None,
            [(there, lag, need) for there, lag, need in reads(flow, x, ends, comes)],
        )
        for x in range(len(flow.names))
    ]  # fmt: skip
    while ready:
        r = ready.pop()
        order, now, own = orders[r], free[r], starts[r]
        for i in range(len(own), len(order)):
            x = order[i]
            mine, seconds, leaves, needs = streams[x]
            k, start = len(mine), now
            for there, lag, need in needs:
                if len(there) <= k:
                    waiting.setdefault(need, []).append(r)
                    break
                if there[k] + lag > start:
                    start = there[k] + lag
            else:
                own.append(start)
                now = start + seconds
                mine.append(now)
                if leaves is not None:
                    leaves.append(flow.come(x, now, links))
                if x in waiting:
                    ready += waiting.pop(x)
                continue
            break
        free[r] = now
    if any(len(own) < len(order) for own, order in zip(starts, orders, strict=True)):
        return None
    return max(f + t for f, t in zip(free, flow.tail, strict=True)), starts


def comes_of(flow: Flow, ends: list[list[float]], shares: bool) -> list[list[float]]:
    """Where it is noted when results have come to other ranks: lists of their own where messages share links,
    else those of when they end, and the way is added to these."""
    return [
        [] if shares and far is not None else mine for mine, far in zip(ends, flow.far, strict=True)
    ]


def reads(
    flow: Flow, x: int, ends: list[list[float]], comes: list[list[float]]
) -> list[tuple[list[float], float, int]]:
    """Of each need of x: where it is noted when that is made, or has come; what the way adds; the need."""
    found = []
    for need, lag in flow.needs[x]:
        shared = comes[need] is not ends[need] and flow.rank[need] != flow.rank[x]
        found.append((comes[need], 0.0, need) if shared else (ends[need], lag, need))
    return found


def peaks_of(flow: Flow, orders: Orders) -> list[float]:
    """The most that each rank holds at once."""
    peaks = []
    for order in orders:
        now = peak = 0.0
        for x in order:
            now += flow.held[x]
            peak = max(peak, now)
        peaks.append(peak)
    return peaks


def fits(flow: Flow, orders: Orders) -> bool:
    """Whether every rank stays within its limit."""
    slack = EPSILON * max(map(abs, flow.held), default=1.0)
    return all(p <= q + slack for p, q in zip(peaks_of(flow, orders), flow.limits, strict=True))

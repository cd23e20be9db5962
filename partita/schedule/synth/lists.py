"""List scheduling on streams, forwards and backwards in time, within a memory limit.

`listed` takes an order that fits its limit and lets every rank start, whenever it is free, the ready
item of best priority, if that can be done *safely*: a stream that takes memory may be drawn forward only
if the rest of the old order, run behind it, still fits. So the result always exists and always fits.

`justified` does so forwards and backwards in turn (forward-backward improvement, Li and Willis 1992):
idle time is pushed out of the start, then out of the end.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from partita.schedule.synth.flow import EPSILON, Flow, Orders, comes_of, reads, starts_of

LAST = 1e9  # an offset beyond every place in an order


@dataclass(frozen=True, slots=True)
class Rule:
    """What is preferred among ready items: the place in the old order plus an offset of the kind and of the
    stream; an item that is ready within `patience` seconds is waited for."""

    F: float = 0.0
    I: float = 0.0  # noqa: E741 (the field's name of the input-gradient half)
    W: float = 0.0
    patience: float = 0.0
    streams: tuple[float, ...] = ()

    def offset(self, flow: Flow, x: int) -> float:
        """What is added to the place of the stream's items."""
        own = self.streams[x] if self.streams else 0.0
        return own + {"F": self.F, "I": self.I, "W": self.W}[flow.names[x][2]]


AS_BEFORE = Rule()
WEIGHTS_LAST = Rule(W=LAST)


class _Rank:
    """One rank's old order, and which of its items are taken."""

    def __init__(
        self,
        flow: Flow,
        rank: int,
        order: Sequence[int],
        rule: Rule,
        noted: tuple[list[list[float]], list[list[float]]],
    ) -> None:
        self.order, self.held, self.limit = order, flow.held, flow.limits[rank]
        places: dict[int, list[int]] = {x: [] for x in flow.streams_of(rank)}
        self.occurrence = []
        for i, x in enumerate(order):
            self.occurrence.append(len(places[x]))
            places[x].append(i)
        # a stream, the places of its items, its offset, and when what it needs ends, or has come
        self.streams = [
            (
                x,
                own,
                rule.offset(flow, x),
                [(there, lag) for there, lag, _ in reads(flow, x, *noted)],
            )
            for x, own in places.items()
        ]
        self.taken = [0] * len(flow.names)
        self.head, self.holds = 0, 0.0
        self.free, self.new = flow.release[rank], []
        self.slack = EPSILON * max(map(abs, flow.held))

    def safe(self, x: int, place: int) -> bool:
        """Whether x, from its place, may run next and the rest of the old order behind it."""
        w = self.held[x]
        if w <= 0:
            return True
        held, taken, order, occurrence = self.held, self.taken, self.order, self.occurrence
        room = self.limit + self.slack - w
        now = self.holds
        if now > room:
            return False
        for i in range(self.head, place):
            y = order[i]
            if occurrence[i] >= taken[y]:
                now += held[y]
                if now > room:
                    return False
        return True

    def choice(self, now: float, patience: float) -> tuple[int, float]:
        """(stream, when it is ready) of best priority among those ready and safe; -1 for none."""
        best, best_key, best_ready, taken = -1, 0.0, 0.0, self.taken
        for x, places, offset, needs in self.streams:
            k = taken[x]
            if k >= len(places):
                continue
            key = places[k] + offset
            if best >= 0 and key >= best_key:
                continue
            ready = 0.0
            for there, lag in needs:
                if len(there) <= k:
                    break
                if there[k] + lag > ready:
                    ready = there[k] + lag
            else:
                if ready <= now + patience and self.safe(x, places[k]):
                    best, best_key, best_ready = x, key, ready
        return best, best_ready

    def take(self, x: int, end: float) -> None:
        """Runs x until `end`."""
        self.holds += self.held[x]
        self.taken[x] += 1
        self.new.append(x)
        self.free = end
        order, occurrence, taken, head = self.order, self.occurrence, self.taken, self.head
        while head < len(order) and occurrence[head] < taken[order[head]]:
            head += 1
        self.head = head


def listed(flow: Flow, orders: Orders, rule: Rule = AS_BEFORE) -> Orders:
    """New orders, as the module says. `orders` must run and fit."""
    ends: list[list[float]] = [[] for _ in flow.names]
    comes, links = comes_of(flow, ends, flow.wire > 0), [-math.inf] * len(orders)
    ranks = [_Rank(flow, r, order, rule, (ends, comes)) for r, order in enumerate(orders)]
    scale = max(flow.seconds, default=1.0) or 1.0
    eps = EPSILON * scale
    events = [(release, r) for r, release in enumerate(flow.release)]
    heapq.heapify(events)
    while events:
        now, r = heapq.heappop(events)
        rank = ranks[r]
        if rank.free > now + eps:
            continue
        best, start = rank.choice(now + eps, rule.patience)
        if best < 0:
            continue
        end = max(start, now) + flow.seconds[best]
        rank.take(best, end)
        ends[best].append(end)
        heapq.heappush(events, (end, r))
        if (far := flow.far[best]) is not None:
            come, to = end + far[1], flow.rank[far[0]]
            if comes[best] is not ends[best]:
                come = flow.come(best, end, links)
                comes[best].append(come)
            heapq.heappush(events, (come, to))
            if rule.patience:
                heapq.heappush(events, (max(now, come - rule.patience), to))
    return [rank.new for rank in ranks]


def justified(
    flow: Flow, orders: Orders, rules: Sequence[Rule] = (AS_BEFORE,), rounds: int = 6
) -> tuple[float, Orders]:
    """(makespan, orders) of the best found going forwards and backwards from `orders`, for each rule.

    Stops a rule when a round there and back brings nothing.
    """
    back = flow.reversed()
    first = starts_of(flow, orders)
    assert first is not None, "orders that run are asked for"
    best = first[0], orders
    for rule in rules:
        now, last = orders, float("inf")
        for _ in range(rounds):
            found = last
            for way, others in ((flow, now), (back, None)):
                if others is None:
                    turned = listed(way, [o[::-1] for o in now], rule)
                    now = [o[::-1] for o in turned]
                else:
                    now = listed(way, now, rule)
                times = starts_of(flow, now)
                assert times is not None, "list scheduling keeps what runs running"
                found = min(found, times[0])
                if times[0] < best[0] - EPSILON * best[0]:
                    best = times[0], now
            if found >= last - EPSILON * best[0]:
                break
            last = found
    return best

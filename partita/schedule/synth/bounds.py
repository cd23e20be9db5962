"""How long any order of a flow takes at least.

Four bounds, all of relaxations:
    path      every item behind the item before it of its stream, behind what it needs and, where memory is
              limited, F_k behind the W_(k-K) that makes room (K: what fits of one stream alone), and a
              message behind the one before it of its stream; the longest such path there (heads) and back
              (tails)
    machine   a rank does one thing at a time: Jackson's preemptive schedule of its items between their
              heads and tails (Carlier 1982)
    link      the link out of a rank carries one message at a time, between their heads and tails
    memory    a microbatch at a stage takes room from F to W for as long as its path there and back takes;
              room times time is limited
"""

from __future__ import annotations

import heapq
import math

from partita.schedule.synth.flow import EPSILON, Flow


def lower_bound(flow: Flow) -> float:
    """Seconds that no order of the flow within its limits can undercut."""
    heads, tails = heads_of(flow), _tails(flow)
    found = 0.0
    for rank in range(flow.num_ranks):
        streams = flow.streams_of(rank)
        items = [
            (heads[x][k], flow.seconds[x], tails[x][k])
            for x in streams
            for k in range(flow.count[x])
        ]
        found = max(found, _one_machine(items), _room(flow, rank, heads, tails))
        if flow.wire:
            found = max(found, _one_machine(_messages(flow, rank, heads, tails)))
    return found


def _messages(
    flow: Flow, rank: int, heads: list[list[float]], tails: list[list[float]]
) -> list[tuple[float, float, float]]:
    """(when it can leave, seconds on the link, least time behind that) of each message out of the rank."""
    found = []
    for x in flow.streams_of(rank):
        if (far := flow.far[x]) is not None:
            fed, lag = far
            rest = lag - flow.wire + flow.seconds[fed]
            found += [
                (heads[x][k] + flow.seconds[x], flow.wire, rest + tails[fed][k])
                for k in range(flow.count[x])
            ]
    return found


def _tails(flow: Flow) -> list[list[float]]:
    """For each item the least time from its end to the end of everything."""
    return [row[::-1] for row in heads_of(flow.reversed())]


def heads_of(flow: Flow) -> list[list[float]]:
    """The earliest start of each item: of its stream's one before, its needs, and the room it takes."""
    most = [math.inf] * len(flow.names)
    giver = {}
    for taker, first, total in _windows(flow):
        room = flow.limits[flow.rank[taker]]
        giver[taker] = first
        if math.isfinite(room) and total > 0:
            most[taker] = math.floor(room / total + EPSILON)
    heads: list[list[float]] = [[] for _ in flow.names]
    come = [-math.inf] * len(flow.names)  # the last item of each on its other rank
    order = _topological(flow)
    for k in range(max(flow.count, default=0)):
        for x in order:
            if k >= flow.count[x]:
                continue
            at = heads[x][k - 1] + flow.seconds[x] if k else flow.release[flow.rank[x]]
            for need, lag in flow.needs[x]:
                far = flow.rank[need] != flow.rank[x]
                there = come[need] if far else heads[need][k] + flow.seconds[need] + lag
                at = max(at, there)
            if k >= most[x]:
                y = giver[x]
                at = max(at, heads[y][k - int(most[x])] + flow.seconds[y])
            heads[x].append(at)
            if (far := flow.far[x]) is not None:
                come[x] = max(at + flow.seconds[x] + far[1], come[x] + flow.wire)
    return heads


def _windows(flow: Flow) -> list[tuple[int, int, float]]:
    """For each stage and direction (last stream that takes room, first that gives some back, all that is
    taken): between the two a microbatch holds everything."""
    last: dict[tuple[int, int], int] = {}
    total: dict[tuple[int, int], float] = {}
    first: dict[tuple[int, int], int] = {}
    for x in _topological(flow):
        place, held = flow.names[x][:2], flow.held[x]
        if held > 0:
            last[place] = x
            total[place] = total.get(place, 0.0) + held
        elif held < 0:
            first.setdefault(place, x)
    return [(last[place], first[place], total[place]) for place in last if place in first]


def _topological(flow: Flow) -> list[int]:
    order: list[int] = []
    left = [len(needs) for needs in flow.needs]
    ready = [x for x, n in enumerate(left) if n == 0]
    while ready:
        x = ready.pop()
        order.append(x)
        for fed, _ in flow.feeds[x]:
            left[fed] -= 1
            if left[fed] == 0:
                ready.append(fed)
    return order


def _one_machine(items: list[tuple[float, float, float]]) -> float:
    """Makespan of Jackson's preemptive schedule of (head, seconds, tail): always run the ready item of
    longest tail."""
    items = sorted(items)
    ready: list[list[float]] = []  # [-tail, seconds left]
    now = best = 0.0
    i = 0
    while i < len(items) or ready:
        if not ready:
            now = max(now, items[i][0])
        while i < len(items) and items[i][0] <= now:
            heapq.heappush(ready, [-items[i][2], items[i][1]])
            i += 1
        until = items[i][0] if i < len(items) else math.inf
        step = min(ready[0][1], until - now)
        now += step
        ready[0][1] -= step
        if ready[0][1] <= 0:
            best = max(best, now - heapq.heappop(ready)[0])
    return best


def _room(flow: Flow, rank: int, heads: list[list[float]], tails: list[list[float]]) -> float:
    """Room times time: from the rank's first item on, what its microbatches hold for as long as each must."""
    limit = flow.limits[rank]
    if not math.isfinite(limit) or limit <= 0:
        return 0.0
    used = 0.0
    streams = flow.streams_of(rank)
    for x in streams:
        for y in streams:
            if flow.held[x] > 0 > flow.held[y] and flow.names[x][:2] == flow.names[y][:2]:
                life = _shortest(flow, x, y) + flow.seconds[y]
                used -= flow.held[y] * life * flow.count[x]
    start = min(heads[x][0] for x in streams)
    end = min(tails[x][-1] for x in streams)
    return start + used / limit + end


def _shortest(flow: Flow, x: int, y: int) -> float:
    """The least time from the start of an item of x to the start of y's of the same number: the longest
    path between them."""
    longest = {x: 0.0}
    for z in _topological(flow):
        if z in longest:
            for fed, lag in flow.feeds[z]:
                at = longest[z] + flow.seconds[z] + lag
                longest[fed] = max(longest.get(fed, 0.0), at)
    return longest.get(y, 0.0)

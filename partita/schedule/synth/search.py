"""Local search on orders: priorities are shaken, list scheduling makes them feasible again.

A round takes the best orders, adds a random offset to the priority of every stream, schedules forwards and
then backwards in time, and keeps what is not slower. Rounds are counted in items placed, not in seconds,
so that a seed gives the same answer on every machine.
"""

from __future__ import annotations

from random import Random

from partita.schedule.synth.flow import EPSILON, Flow, Orders, starts_of
from partita.schedule.synth.lists import LAST, Rule, listed


def improved(
    flow: Flow, orders: Orders, bound: float, effort: int, seed: int = 0
) -> tuple[float, Orders]:
    """(makespan, orders) of the best found from `orders` with `effort` items placed; stops at `bound`."""
    random, back = Random(seed), flow.reversed()
    first = starts_of(flow, orders)
    assert first is not None, "orders that run are asked for"
    best, now, time_now = (first[0], orders), orders, first[0]
    size = sum(map(len, orders))
    period = max(1.0, size / len(orders) / max(max(flow.count), 1))  # items of a rank a microbatch
    spent = stale = 0
    while spent + 2 * size <= effort and best[0] > bound * (1 + EPSILON):
        turned = [o[::-1] for o in listed(flow, now, _shaken(flow, random, period))]
        new = [o[::-1] for o in listed(back, turned, _shaken(back, random, period))]
        spent += 2 * size
        times = starts_of(flow, new)
        assert times is not None, "list scheduling keeps what runs running"
        if times[0] <= time_now * (1 + EPSILON):
            stale = 0 if times[0] < time_now * (1 - EPSILON) else stale + 1
            now, time_now = new, times[0]
        else:
            stale += 1
        if times[0] < best[0] * (1 - EPSILON):
            best = times[0], new
        if stale > 12:  # a plateau: go on from a neighbour, or back from the best
            now, time_now = (new, times[0]) if stale % 2 else (best[1], best[0])
            stale = 0
    return best


def _shaken(flow: Flow, random: Random, period: float) -> Rule:
    """A rule with offsets of up to a microbatch or so; weight halves often wait for all else."""
    spread = period * random.choice((0.0, 0.3, 1.0, 2.0))
    streams = tuple(random.gauss(0.0, spread) if spread else 0.0 for _ in flow.names)
    weights = LAST if random.random() < 0.4 else 0.0
    longest = max(flow.seconds)
    patience = random.choice((0.0, 0.0, 0.25, 0.6)) * longest
    return Rule(W=weights, patience=patience, streams=streams)

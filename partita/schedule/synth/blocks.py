"""Orders from a building block: the moments at which one microbatch passes every stage, repeated every T.

Qi et al. 2024 (arXiv 2405.15362) name V schedules by such a block at F = I = W. Here it is made at the costs
asked for: a microbatch walks leg by leg (forward or backward through one chunk of every rank), from stage to
stage in `stretch` times what that takes at least, waits `gap` before each leg, and its weight halves follow
their input halves `delay` later. T is the least for which the order by moments fits the limits. A walk over
stretches, gaps and delays looks for the block whose order is fastest once justified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from partita.schedule.synth.flow import EPSILON, Flow, Orders, fits, starts_of
from partita.schedule.synth.lists import AS_BEFORE, justified

_STRETCHES = (1.0, 1.0, 1.0, 1.25, 1.5, 2.0, 3.0)
_SLOWEST = 8  # T is at most so many times the busiest rank's work on a microbatch
_HALVINGS = 7


@dataclass(frozen=True)
class _Block:
    """Of each leg: how much slower than it could be a microbatch walks, and how long it waits before; of each
    chunk: when weight halves follow; of two ways: how much later the second begins. Times are fractions of
    the busiest rank's work on a microbatch."""

    stretch: tuple[float, ...]
    gap: tuple[float, ...]
    delay: tuple[float, ...]
    later: tuple[float, ...] = ()

    def shaken(self, random: Random) -> _Block:
        """One or two of its numbers drawn anew."""
        made = self
        for _ in range(random.choice((1, 1, 2))):
            what = random.choice(("stretch", "gap", "delay", "later")[: 4 if self.later else 3])
            values = list(getattr(made, what))
            value = random.choice(_STRETCHES) if what == "stretch" else random.random() ** 2
            values[random.randrange(len(values))] = (
                0.0 if random.random() < 0.2 and what != "stretch" else value
            )
            made = replace(made, **{what: tuple(values)})
        return made


def from_blocks(
    flow: Flow, bound: float, effort: int, seed: int = 0
) -> tuple[float, Orders] | None:
    """(makespan, orders) of the best block found with `effort` items placed; None where none fits the limits.
    Stops at `bound`. Of two ways the second walks the same block."""
    random, size = Random(seed), sum(flow.count)
    chunks = len(flow.placements[0]) // flow.num_ranks
    later = (0.0,) if flow.direction is not None else ()
    now = _Block((1.0,) * 2 * chunks, (0.0,) * 2 * chunks, (0.0,) * chunks, later)
    best, spent, time_now, tried = None, 0, float("inf"), now
    while spent + (_HALVINGS + 5) * size <= effort:
        spent += (_HALVINGS + 5) * size
        orders = _orders(flow, tried)
        if orders is not None:
            found = justified(flow, orders, (AS_BEFORE,), rounds=2)
            if found[0] <= time_now * (1 + EPSILON):
                now, time_now = tried, found[0]
            if best is None or found[0] < best[0] * (1 - EPSILON):
                best = found
                if best[0] <= bound * (1 + EPSILON):
                    break
        tried = now.shaken(random)
    return best


def _orders(flow: Flow, block: _Block) -> Orders | None:
    """The block's order at the least T that fits; None where none does, or some would wait for ever."""
    m = len(flow.direction) if flow.direction is not None else flow.count[0]
    work = [
        sum(flow.seconds[x] * flow.count[x] for x in flow.streams_of(r)) / m
        for r in range(flow.num_ranks)
    ]
    moments = _moments(flow, block, max(work))
    links = [
        sum(flow.wire * flow.count[x] for x in flow.streams_of(r) if flow.far[x]) / m
        for r in range(flow.num_ranks)
    ]
    low, high = max(*work, *links), max(*work, *links) * _SLOWEST
    best = _at(flow, moments, low)
    if not fits(flow, best):
        best = _at(flow, moments, high)
        if not fits(flow, best):
            return None
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            made = _at(flow, moments, middle)
            if fits(flow, made):
                best, high = made, middle
            else:
                low = middle
    return best if starts_of(flow, best) is not None else None


def _at(flow: Flow, moments: list[float], period: float) -> Orders:
    """The order by moments, a microbatch every `period`."""
    orders: Orders = []
    each = period * len(flow.placements)
    for rank in range(flow.num_ranks):
        items = [
            (moments[x] + k * each, x) for x in flow.streams_of(rank) for k in range(flow.count[x])
        ]
        orders.append([x for _, x in sorted(items)])
    return orders


def _moments(flow: Flow, block: _Block, work: float) -> list[float]:
    """When the first microbatch of its way starts at each stream."""
    at = {name: x for x, name in enumerate(flow.names)}
    stages, p = len(flow.placements[0]), flow.num_ranks
    chunks = stages // p
    out = [0.0] * len(flow.names)
    walk = [(s, "F") for s in range(stages)] + [(s, "I") for s in reversed(range(stages))]
    for way, now in enumerate((0.0, *(later * work for later in block.later))):
        leg = -1
        for stage, kind in walk:
            x = at[stage, way, kind]
            mine = stage // p if kind == "F" else 2 * chunks - 1 - stage // p
            if mine != leg:
                leg, now = mine, now + block.gap[mine] * work
            lag = max((lag for _, lag in flow.feeds[x]), default=0.0)
            out[x] = now
            now += block.stretch[leg] * (flow.seconds[x] + lag)
            if kind == "I":
                out[at[stage, way, "W"]] = out[x] + flow.seconds[x] + block.delay[stage // p] * work
    return out

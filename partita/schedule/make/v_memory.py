"""V schedules of a stated memory: V-Half, V-Min and what lies between and above (Qi et al. 2024, arXiv
2405.15362).

A *building block* says in which slots of a rank F0, F1, I1, I0 of one microbatch start (0, 1: the rank's
chunk); a W takes the next free slot, oldest first. Repeated every 6 slots it is a steady state whose
memory is the block's lifetime / 6. Squeezed (run in order), then warm-up and drain are reordered by
`justified` without raising the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from partita.schedule.clock import Costs, clock, makespan, peak_share
from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import require, vee
from partita.schedule.make.zb_v import zb_v
from partita.schedule.synth.flow import flow_like, flow_of, orders_of, schedule_of, starts_of
from partita.schedule.synth.lists import justified

Block = Callable[[int], tuple[int, int, int, int]]  # rank -> slots of F0, F1, I1, I0
_PERIOD = 6
_STEADY = 8  # of p microbatches: more of them change neither warm-up nor drain


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """V-Half: half of 1F1B's memory on every rank. Two stages a rank, in a vee; valid for every m >= 1.

    Block of rank r: [2r, 3p-r-2, 3p+g+2r-1, 6p+g-r-2], g = 3 if p is even, else 0. Holds at most
    (p+2) div 2 whole shares until W. Flush - mt at F=I=W and m >= 2p, t = F+I+W: 0.5, 2.5, 8.5 F for
    p = 2, 4, 8 (published: bubble B/2). The steady state needs W+2I >= 2F and W+2F >= 2I.

    >>> from partita.plots.timeline import draw
    >>> print(draw(v_half(2, 3), F=2, I=2, W=2))
    rank 0 | 0F0 0F1     3F0 3I0 0F2 3W0 3F1 3I1 0I0 0W0 3W1 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    rank 1 |     1F0 2F0 1F1 2F1 2I0 2W0 1I0 1W0 1F2 2F2 2I1 2W1 1I1 1W1 2I2 1I2 2W2 1W2
    """
    return _within("v_half", num_ranks, num_microbatches, _half, (num_ranks + 2) // 2)


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """V-Min: a third of 1F1B's memory on every rank. Two stages a rank, in a vee; every m >= 1.

    Block of rank r: [r, 2p-1-r, 2p+g+r, 4p+g-1-r], g = 2 if p % 3 == 0, else 0. Holds at most (p+4) div 3
    whole shares until W. Flush - mt at F=I=W and m >= 2p: 0.5, 5.5, 11.5 F for p = 2, 4, 8 (published:
    bubble 2B/3 + O(p)). It loses time on every microbatch as soon as F, I, W differ, and on latency.

    >>> from partita.plots.timeline import draw
    >>> print(draw(v_min(3, 2), F=2, I=2, W=2))
    rank 0 | 0F0 0F1             5F0 5I0 5F1 5I1 5W0 5W1 0I0 0W0     0I1 0W1
    rank 1 |     1F0 1F1     4F0     4F1 4I0 4W0 4I1 1I0 1W0     1I1 4W1 1W1
    rank 2 |         2F0 3F0 2F1 3F1         3I0 2I0 3W0 3I1 2I1 2W0 3W1 2W1
    """
    return _within("v_min", num_ranks, num_microbatches, _min, (num_ranks + 4) // 3)


def v_share(num: int, den: int, num_ranks: int, num_microbatches: int) -> Schedule:
    """v_<num>_<den>: a stated share of 1F1B's memory, 1/3 <= num/den <= 1. Two stages a rank, in a vee.

    Holds at most ceil(p num/den) + 1 whole shares until W: V-Min's block, its warm-up and drain reordered
    within that memory at F=I=W, or V-Min, V-Half or ZB-V where it fits and flushes sooner. (Blocks of
    other slopes and gaps, 256 of them tried at p <= 8, flush no sooner once reordered.)

    >>> from partita.schedule.clock import peak_share
    >>> peak_share(v_share(2, 3, 6, 12))
    [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]
    """
    name, p, m = f"v_{num}_{den}", num_ranks, num_microbatches
    require(3 * num >= den >= num, name, f"p={p}, m={m}", "1/3 <= num/den <= 1")
    shares = -(-p * num // den) + 1
    makers = [lambda p, m: _within(name, p, m, _min, shares), v_min, v_half, zb_v]
    short = [make(p, min(m, _STEADY * p)) for make in makers]
    fit = [(makespan(clock(s)), i) for i, s in enumerate(short) if max(peak_share(s)) <= shares]
    return replace(makers[min(fit)[1]](p, m), name=name)


def _half(p: int) -> Block:
    g = 3 if p % 2 == 0 else 0
    return lambda r: (2 * r, 3 * p - r - 2, 3 * p + g + 2 * r - 1, 6 * p + g - r - 2)


def _min(p: int) -> Block:
    g = 2 if p % 3 == 0 else 0
    return lambda r: (r, 2 * p - 1 - r, 2 * p + g + r, 4 * p + g - 1 - r)


def _repeated(name: str, p: int, m: int, block: Block) -> Schedule:
    return vee(name, p, m, lambda rank: _rank(rank, p, m, block(rank)))


def _rank(rank: int, p: int, m: int, starts: tuple[int, int, int, int]) -> list[Action]:
    stages = (rank, 2 * p - 1 - rank, 2 * p - 1 - rank, rank)
    slots = {
        start + _PERIOD * k: Action(stage, kind, k)
        for k in range(m)
        for start, stage, kind in zip(starts, stages, "FFII", strict=True)
    }
    out: list[Action] = []
    owed: list[Action] = []
    for slot in range(max(slots) + 1):
        if slot in slots:
            out.append(slots[slot])
            owed += [slots[slot]._replace(kind="W")] if slots[slot].kind == "I" else []
        elif owed:
            out.append(owed.pop(0))
    return out + owed


@lru_cache(maxsize=16)  # v_share asks for its neighbours again and again
def _within(name: str, p: int, m: int, block: Callable[[int], Block], shares: int) -> Schedule:
    """The block repeated and squeezed, warm-up and drain reordered within `shares`."""
    limits = (2 * shares,) * p
    if m > _STEADY * p:
        longer = _lengthened(_within(name, p, _STEADY * p, block, shares), m, limits)
        if longer is not None:
            return longer
    made = _repeated(name, p, m, block(p))
    flow = flow_like(made, Costs.equal(made), limits)
    return schedule_of(flow, justified(flow, orders_of(flow, made))[1], name)


def _lengthened(short: Schedule, m: int, limits: tuple[int, ...]) -> Schedule | None:
    """The schedule with m microbatches, where every rank's steady state is one that can last: what it does in
    the middle of its order done so many times more, in as much time each."""
    more = m - short.num_microbatches
    flow = flow_of(short.placements, m, Costs.equal(short), limits)
    orders, steady = orders_of(flow, short), True
    for r, order in enumerate(orders):
        half = len(order) // 2
        again = order[half - _PERIOD : half]
        steady = steady and len(set(again)) == _PERIOD
        orders[r] = order[:half] + again * more + order[half:]
    times = starts_of(flow, orders) if steady else None
    at_most = makespan(clock(short)) + _PERIOD / 2 * more
    return schedule_of(flow, orders, short.name) if times and times[0] <= at_most else None

"""Where a search begins: every named schedule, lines of any warm-up that fits, and one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from partita.base.errors import ScheduleError
from partita.schedule.clock import Costs
from partita.schedule.ir import Action, Placement, Schedule
from partita.schedule.make.chimera import chimera
from partita.schedule.make.dualpipe import dualpipe, dualpipev
from partita.schedule.make.families import line
from partita.schedule.make.gpipe import gpipe
from partita.schedule.make.interleaved import interleaved_1f1b
from partita.schedule.make.interleaved_zb import interleaved_zb
from partita.schedule.make.looped_bfs import looped_bfs
from partita.schedule.make.one_f_one_b import one_f_one_b
from partita.schedule.make.v_memory import v_half, v_min, v_share
from partita.schedule.make.zb_v import zb_v
from partita.schedule.make.zero_bubble import warmed_up, zb_h1, zb_h2

AT_A_TIME = "one at a time"
_LINES = (zb_h1, zb_h2, one_f_one_b, gpipe)
_LOOPS = (interleaved_zb, interleaved_1f1b, looped_bfs)
_VEES = (zb_v, v_half, v_min, dualpipev)
_BOTH_WAYS = (dualpipe, chimera)
LARGE = 500  # stage-microbatches
_SHARES = ((1, 3), (1, 2), (2, 3), (3, 4), (1, 1))


def named(p: int, m: int, stages: int, copies: int, limited: bool = True) -> Iterator[Schedule]:
    """Every synchronous named schedule of this many stages a rank that exists for p and m; two copies of
    the stages only where `copies` allows. Where memory is not `limited`, vees of a stated share of it are
    left out of more than LARGE stage-microbatches: they take longest to make, and end later than ZB-V."""
    makers = [lambda make=make: make(p, m, stages) for make in _LOOPS]
    if stages == 1:
        makers += [lambda make=make: make(p, m) for make in _LINES]
        makers += [lambda make=make: make(p, m) for make in (_BOTH_WAYS if copies == 2 else ())]
    if stages == 2:
        makers += [lambda make=make: make(p, m) for make in _VEES]
        shares = _SHARES if limited or 2 * p * m <= LARGE else ()
        makers += [lambda share=share: v_share(share[0], share[1], p, m) for share in shares]
    for make in makers:
        try:
            yield make()
        except ScheduleError:
            continue


def lines(m: int, rooms: Sequence[float], until_weights: float, costs: Costs) -> Iterator[Schedule]:
    """Lines of every warm-up that could pay and fits; `rooms[r]` microbatches fit on rank r.

    Rank r warms up with 1 + slope (p-1-r) forwards (ZB-H1 has slope 1, ZB-H2 2; at unequal costs the way
    to the last rank and back is worth (F + I + 2c) / F forwards a rank) and defers as many weight halves
    as fill the same at the end, where there is room.
    """
    p = len(rooms)
    f, i, w = (sum(s.of(kind) for s in costs.stages) / p for kind in "FIW")
    there_and_back = f + i + 2 * costs.send
    most = [int(min(room, m)) for room in rooms]
    for slope in sorted({1.0, 2.0, there_and_back / f if f else 2.0, float(m)}):
        warm, now = [], m
        for r in range(p):  # a rank never warms up with more than the one before it
            now = max(1, min(now, most[r], 1 + math.ceil(slope * (p - 1 - r) - 1e-9)))
            warm.append(now)
        for back in sorted({slope, there_and_back / w if w else slope}):
            deferred = [
                min(
                    m,
                    math.ceil(back * r),
                    int((min(room, 2 * m) - warm[r]) / max(until_weights, 1e-9)),
                )
                for r, room in enumerate(rooms)
            ]
            yield line(
                f"line {slope:g} {back:g}", p, m,
                lambda r, warm=warm, deferred=deferred: warmed_up(r, m, warm[r], deferred[r]),
            )  # fmt: skip


def one_at_a_time(p: int, m: int, ways: tuple[Placement, ...]) -> Schedule:
    """Every rank finishes a microbatch before it begins the next: the least memory there is. Of two ways
    microbatches take them in turn."""
    direction = None if len(ways) == 1 else tuple(k % 2 for k in range(m))

    def rank_list(rank: int) -> Iterator[Action]:
        for k in range(m):
            way = ways[k % len(ways)]
            mine = [stage for stage, place in enumerate(way) if place == rank]
            yield from (Action(stage, "F", k) for stage in mine)
            yield from (Action(stage, kind, k) for stage in reversed(mine) for kind in "IW")

    ranks = tuple(tuple(rank_list(rank)) for rank in range(p))
    placement = ways[0] if direction is None else (ways[0], ways[-1])
    return Schedule(AT_A_TIME, p, len(ways[0]), m, placement, ranks, direction=direction)


def rooms_of(limits: list[float], weights: list[float]) -> list[float]:
    """How many microbatches fit on each rank of a line."""
    return [
        math.floor(limit / weight + 1e-9) if weight > 0 and math.isfinite(limit) else math.inf
        for limit, weight in zip(limits, weights, strict=True)
    ]

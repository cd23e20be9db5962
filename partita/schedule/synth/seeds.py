"""Where a search begins: every named schedule, lines of any warm-up that fits, and one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

from partita.base.errors import ScheduleError
from partita.schedule.ir import Action, Schedule
from partita.schedule.make.chimera import chimera
from partita.schedule.make.dualpipe import dualpipe, dualpipev
from partita.schedule.make.families import line, loop, vee
from partita.schedule.make.gpipe import gpipe
from partita.schedule.make.interleaved import interleaved_1f1b
from partita.schedule.make.interleaved_zb import interleaved_zb
from partita.schedule.make.looped_bfs import looped_bfs
from partita.schedule.make.one_f_one_b import one_f_one_b
from partita.schedule.make.v_memory import v_half, v_min, v_share
from partita.schedule.make.zb_v import zb_v
from partita.schedule.make.zero_bubble import warmed_up, zb_h1, zb_h2

_LINES = (zb_h1, zb_h2, one_f_one_b, gpipe)
_LOOPS = (interleaved_zb, interleaved_1f1b, looped_bfs)
_VEES = (zb_v, v_half, v_min, dualpipev)
_BOTH_WAYS = (dualpipe, chimera)
_SHARES = ((1, 3), (1, 2), (2, 3), (3, 4), (1, 1))


def named(p: int, m: int, stages: int, copies: int) -> Iterator[Schedule]:
    """Every synchronous named schedule of this many stages a rank that exists for p and m; two copies of
    the stages only where `copies` allows."""
    makers = [lambda make=make: make(p, m, stages) for make in _LOOPS]
    if stages == 1:
        makers += [lambda make=make: make(p, m) for make in _LINES]
        makers += [lambda make=make: make(p, m) for make in (_BOTH_WAYS if copies == 2 else ())]
    if stages == 2:
        makers += [lambda make=make: make(p, m) for make in _VEES]
        makers += [lambda share=share: v_share(share[0], share[1], p, m) for share in _SHARES]
    for make in makers:
        try:
            yield make()
        except ScheduleError:
            continue


def lines(p: int, m: int, rooms: list[float]) -> Iterator[Schedule]:
    """Lines whose rank r warms up with as many forwards as fit and fills its room with deferred weight
    halves; `rooms[r]` is how many microbatches fit on it."""
    most = [int(min(room, m)) for room in rooms]
    for slope, less in ((1, 0), (2, 1), (m, 0)):
        warm, now = [], m
        for r in range(p):  # a rank never warms up with more than the one before it
            now = max(1, min(now, most[r], slope * (p - r) - less))
            warm.append(now)
        deferred = [max(0, min(most[r] - warm[r], slope * r)) for r in range(p)]
        yield line(
            f"line {slope}", p, m,
            lambda r, warm=warm, deferred=deferred: warmed_up(r, m, warm[r], deferred[r]),
        )  # fmt: skip


def one_at_a_time(p: int, m: int, stages: int, in_a_vee: bool) -> Schedule:
    """Every rank finishes a microbatch before it begins the next: the least memory there is."""

    def rank_list(rank: int) -> list[Action]:
        chunks = [rank, 2 * p - 1 - rank] if in_a_vee else [c * p + rank for c in range(stages)]
        forward = [Action(s, "F", 0) for s in chunks]
        backward = [Action(s, kind, 0) for s in reversed(chunks) for kind in "IW"]
        return [a._replace(microbatch=k) for k in range(m) for a in (*forward, *backward)]

    if in_a_vee:
        return vee("one at a time", p, m, rank_list)
    return loop("one at a time", p, m, stages, rank_list)


def rooms_of(limits: list[float], weights: list[float]) -> list[float]:
    """How many microbatches fit on each rank of a line."""
    return [
        math.floor(limit / weight + 1e-9) if weight > 0 and math.isfinite(limit) else math.inf
        for limit, weight in zip(limits, weights, strict=True)
    ]

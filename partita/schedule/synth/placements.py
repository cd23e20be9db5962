"""Placements beyond the named ones: both ways through a wave, and those of lighter busiest ranks.

Two ways through a wave of v >= 2 stages a rank: DualPipe's and Chimera's idea with the turns of a vee. Every
stage lies on ranks r and p-1-r; a microbatch of either way reaches a middle rank after p/2 - 1 stages of 1/v
each, so that at F = I = W no rank waits longer than (p/2 - 1)F/v for its first forward (a vee alone:
(p - 1)F/v), and a rank with a dear end runs half of the microbatches at the middle stages. p even, the
parameters twice.

Where stages cost unlike (an embedding first, a head last) a vee puts both ends on rank 0: the stages of its
last leg change places, near ones first, as long as the busiest rank gets lighter.
"""

from __future__ import annotations

from partita.schedule.clock import Costs
from partita.schedule.ir import Placement
from partita.schedule.make.families import wave_placement

Ways = tuple[Placement, ...]
_WORTH = 0.99  # a placement's busiest rank must have less than this part of the named one's work


def more_ways(p: int, stages: int, copies: int, costs: Costs, exchanged: bool = True) -> list[Ways]:
    """The placements to try beside those of the named schedules: one way, or two where `copies` is 2;
    `exchanged`: with stages that changed places too."""
    if stages < 2 or p < 2:
        return []
    wave = wave_placement(p, stages)
    if not exchanged:
        return [] if copies < 2 or p % 2 else [(wave, mirrored(wave, p))]
    one = [(way,) for way in _lighter(wave, p, costs, False)]
    if copies < 2 or p % 2:
        return [*one]
    return [*one, *((way, mirrored(way, p)) for way in (wave, *_lighter(wave, p, costs, True)))]


def mirrored(way: Placement, p: int) -> Placement:
    """The second way: from the other end of the ranks."""
    return tuple(p - 1 - rank for rank in way)


def _lighter(way: Placement, p: int, costs: Costs, both: bool) -> list[Placement]:
    """The placement with stages of its last leg exchanged until that makes no rank's load more even; none
    where the busiest rank gains too little. `both`: half of the microbatches go the mirrored way."""
    found, leg = way, range(len(way) - p, len(way))
    load = first = _loads(way, p, costs, both)
    while True:
        busy = {rank for rank, work in enumerate(load) if work == max(load)}
        moved = [_exchanged(found, a, b) for a in leg if found[a] in busy for b in leg if a != b]
        tried = [
            (_evenness(_loads(other, p, costs, both)), _far(other, way), other) for other in moved
        ]
        best = min(tried)
        if best[0] >= _evenness(load):
            return [found] if max(load) < _WORTH * max(first) else []
        found, load = best[2], _loads(best[2], p, costs, both)


def _exchanged(way: Placement, a: int, b: int) -> Placement:
    last = list(way)
    last[a], last[b] = last[b], last[a]
    return tuple(last)


def _far(way: Placement, from_: Placement) -> int:
    """Ranks that stages moved over, added up."""
    return sum(abs(a - b) for a, b in zip(way, from_, strict=True))


def _evenness(loads: list[float]) -> tuple[float, float]:
    """The busiest rank's work, then the sum of squares over ranks: the smaller, the better."""
    return max(loads), round(sum(work * work for work in loads), 9)


def _loads(way: Placement, p: int, costs: Costs, both: bool) -> list[float]:
    """Each rank's work on a microbatch (on two, where `both`), in that of the dearest stage."""
    ranks, works = [0.0] * p, [sum(each.of(kind) for kind in "FIW") for each in costs.stages]
    unit = max(works) or 1.0
    for stage, rank in enumerate(way):
        work = works[stage] / unit
        ranks[rank] += work
        if both:
            ranks[p - 1 - rank] += work
    return [round(work, 9) for work in ranks]

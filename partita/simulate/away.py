"""Bytes that blocks keep for backward, action by action, where they leave in between (parallel/offload).

Kept tensors of a stage are there one block at a time while it runs forward, two while it runs backward,
beside what lives inside the one that runs: where that is most need not be where most is kept. Of a microbatch
under way there stay its data, and, where its backward is next, what the last block keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from partita.parallel.laid import Laid, Stage
from partita.parallel.offload.rules import arena_of
from partita.parallel.read import kept_bytes, leaving_bytes, tensor_bytes
from partita.schedule.ir import Action, Schedule
from partita.schedule.residence import with_offload
from partita.simulate.inside import transient_bytes


@dataclass(frozen=True)
class Level:
    """Kept bytes around one compute action: the most on the device while it runs, what is there behind it,
    and what is away behind it; and the most with what lives inside the block that runs, which need not be
    when most is kept."""

    action: Action
    during: int
    after: int
    away: int
    full: int


def leaves(laid: Laid) -> bool:
    """Whether the plan has activations elsewhere."""
    return arena_of(laid.request.plan, "activations") != "device"


def levels(laid: Laid, place: int, schedule: Schedule) -> list[Level]:
    """Of a place's compute actions that run forward or backward, in order."""
    sizes = laid.sizes
    parts = {
        s.index: [
            (kept_bytes(b, sizes), leaving_bytes(b, sizes), transient_bytes(b, sizes, False))
            for b in s.blocks
        ]
        for s in laid.stages_of(place)
    }
    for s in laid.stages_of(place):  # pictures are never away, and counted as the step's
        kept, leaving, inside = parts[s.index][0]
        parts[s.index][0] = kept - pictures_kept(laid, s), leaving, inside
    here = away = 0
    found: list[Level] = []
    for action in (schedule.ranks if schedule.is_asynchronous else with_offload(schedule.ranks))[
        place
    ]:
        blocks, kind = parts[action.stage], action.kind
        last, before, whole = blocks[-1][1], here, sum(part[0] for part in blocks)
        if kind == "F":
            during, full, gone = _forward(blocks)
            here, away = here + whole - gone, away + gone
        elif kind in ("OFFLOAD", "RELOAD"):
            here, away = (
                (here - last, away + last) if kind == "OFFLOAD" else (here + last, away - last)
            )
            if found and kind == "OFFLOAD":
                found[-1] = replace(found[-1], after=here, away=away)
            continue
        elif kind in ("B", "I"):
            back = sum(part[1] for part in blocks[:-1])
            during, full = _backward(blocks, kind == "B")
            here, away = here + back - (whole if kind == "B" else 0), away - back
        elif kind == "W":
            during, full, here = 0, max(part[2] for part in blocks), here - whole
        else:
            continue
        found.append(Level(action, before + during, here, away, before + full))
    return found


def pictures_kept(laid: Laid, stage: Stage) -> int:
    """Of what a microbatch keeps those pictures that a step holds anyway: neither cut nor converted."""
    first = stage.blocks[0]
    x = first.tensors[first.input]
    same = stage.index == 0 and x.role == "data" and first.input in first.kept
    is_picture = laid.request.model.image is not None and x.dtype == "fp32"
    return tensor_bytes(x, laid.sizes) if same and is_picture else 0


Parts = Sequence[tuple[int, int, int]]  # of each block: kept, leaving, and what lives inside it


def _forward(blocks: Parts) -> tuple[int, int, int]:
    """(most at once, the same with what lives inside blocks, what has left at the end)."""
    most = full = stays = gone = 0
    for at, (kept, leaving, inside) in enumerate(blocks):
        most, full = max(most, stays + kept), max(full, stays + kept + inside)
        if at < len(blocks) - 1:
            stays, gone = stays + kept - leaving, gone + leaving
    return most, full, gone


def _backward(blocks: Parts, frees: bool) -> tuple[int, int]:
    """The most at once, beyond what is there when it begins, and the same with what lives inside blocks;
    `frees`: each block lets go of what it keeps, else weight halves do."""
    most = full = more = 0
    for at in range(len(blocks) - 1, -1, -1):
        more += blocks[at - 1][1] if at else 0
        most, full = max(most, more), max(full, more + blocks[at][2])
        more -= blocks[at][0] if frees else 0
    return most, full


def peak(laid: Laid, place: int, schedule: Schedule) -> int:
    """The most that is on the device at once."""
    return max(level.during for level in levels(laid, place, schedule))


def full_peak(laid: Laid, place: int, schedule: Schedule) -> int:
    """The same with what lives inside the block that runs then."""
    return max(level.full for level in levels(laid, place, schedule))


def away_peak(laid: Laid, place: int, schedule: Schedule) -> int:
    """The most that is away at once."""
    return max(level.away for level in levels(laid, place, schedule))


def slots(laid: Laid, place: int) -> list[int]:
    """Bytes of each piece that may be away at once: a stage's blocks, for as many microbatches as it has
    under way. A file has room for all from the start."""
    most = Counter[int]()
    under_way = Counter[int]()
    for stage, kind, _ in laid.schedule.ranks[place]:
        under_way[stage] += {"F": 1, "B": -1, "I": -1}.get(kind, 0)
        most[stage] = max(most[stage], under_way[stage])
    stages = laid.stages_of(place)
    found = [leaving_bytes(b, laid.sizes) for s in stages for b in s.blocks * most[s.index]]
    return [size for size in found if size]

"""Bytes that blocks keep for backward, action by action, where they leave in between (parallel/offload).

Kept tensors of a stage are there one block at a time while it runs forward, two while it runs backward. Of a
microbatch under way there stay its data, and, where its backward is next, what the last block keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from partita.parallel.laid import Laid
from partita.parallel.offload.rules import arena_of
from partita.parallel.read import kept_bytes, leaving_bytes
from partita.schedule.ir import Action, Schedule
from partita.schedule.residence import with_offload


@dataclass(frozen=True)
class Level:
    """Kept bytes around one compute action: the most on the device while it runs, what is there behind it,
    and what is away behind it."""

    action: Action
    during: int
    after: int
    away: int


def leaves(laid: Laid) -> bool:
    """Whether the plan has activations elsewhere."""
    return arena_of(laid.request.plan, "activations") != "device"


def levels(laid: Laid, place: int, schedule: Schedule) -> list[Level]:
    """Of a place's compute actions that run forward or backward, in order."""
    sizes = laid.sizes
    parts = {
        s.index: [(kept_bytes(b, sizes), leaving_bytes(b, sizes)) for b in s.blocks]
        for s in laid.stages_of(place)
    }
    here = away = 0
    found: list[Level] = []
    for action in (schedule.ranks if schedule.is_asynchronous else with_offload(schedule.ranks))[
        place
    ]:
        blocks, kind = parts[action.stage], action.kind
        last = blocks[-1][1]
        during = 0
        if kind == "F":
            during, gone = _forward(blocks)
            here, away, during = here + sum(k for k, _ in blocks) - gone, away + gone, here + during
        elif kind in ("OFFLOAD", "RELOAD"):
            here, away = (
                (here - last, away + last) if kind == "OFFLOAD" else (here + last, away - last)
            )
            if found and kind == "OFFLOAD":
                found[-1] = Level(found[-1].action, found[-1].during, here, away)
            continue
        elif kind in ("B", "I"):
            back = sum(part[1] for part in blocks[:-1])
            whole = sum(k for k, _ in blocks)
            during = here + (back if kind == "I" else _backward(blocks))
            here, away = here + back - (whole if kind == "B" else 0), away - back
        elif kind == "W":
            during, here = here, here - sum(k for k, _ in blocks)
        else:
            continue
        found.append(Level(action, during, here, away))
    return found


Parts = Sequence[tuple[int, int]]  # of each block: kept, and leaving


def _forward(blocks: Parts) -> tuple[int, int]:
    """(most at once, what has left at the end)."""
    most = stays = gone = 0
    for kept, leaving in blocks[:-1]:
        most = max(most, stays + kept)
        stays, gone = stays + kept - leaving, gone + leaving
    return max(most, stays + blocks[-1][0]), gone


def _backward(blocks: Parts) -> int:
    """The most at once, beyond what is there when it begins."""
    most = more = 0
    for at in range(len(blocks) - 1, -1, -1):
        more += blocks[at - 1][1] if at else 0
        most = max(most, more)
        more -= blocks[at][0]
    return most


def peak(laid: Laid, place: int, schedule: Schedule) -> int:
    """The most that is on the device at once."""
    return max(level.during for level in levels(laid, place, schedule))


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

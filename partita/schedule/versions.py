"""Which weights a microbatch sees in an asynchronous schedule, and how many versions a stage keeps.

Version v of a stage is its weights after v updates; update j (from 0) makes version j+1. The rule is
`Schedule.versions`; a step of a synchronous schedule has one version, 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from partita.schedule.ir import Action, Schedule

Chunk = tuple[int, int]  # stage, microbatch


def versions_used(schedule: Schedule) -> dict[Chunk, int]:
    """For each (stage, microbatch), the version that its F and its B use."""
    newest = _newest(schedule)
    if schedule.versions == "vertical":
        return {(s, k): newest[0, k] for s, k in newest}
    if schedule.versions == "previous":
        ends = sorted({a.microbatch for a in schedule.actions() if a.kind == "U"})
        return {(s, k): max(0, bisect_left(ends, k) - 1) for s, k in newest}
    return newest


def _newest(schedule: Schedule) -> dict[Chunk, int]:
    newest: dict[Chunk, int] = {}
    for actions in schedule.ranks:
        updates: dict[int, int] = {}
        for stage, kind, microbatch in actions:
            if kind == "F":
                newest[stage, microbatch] = updates.get(stage, 0)
            elif kind == "U":
                updates[stage] = updates.get(stage, 0) + 1
    return newest


def versions_held(schedule: Schedule) -> list[int]:
    """For each stage, the most versions it keeps at once: the newest and those that a microbatch in
    flight, or one still to come, uses."""
    used = versions_used(schedule)
    held = [1] * schedule.num_stages
    for actions in schedule.ranks:
        newest: dict[int, int] = {}
        waiting = {(a.stage, a.microbatch) for a in actions if a.kind == "F"}
        for stage, kind, microbatch in actions:
            needed = {used[c] for c in waiting if c[0] == stage}
            now = newest.get(stage, 0)
            held[stage] = max(held[stage], len({now, *(v for v in needed if v <= now)}))
            if kind in ("B", "W"):
                waiting.discard((stage, microbatch))
            elif kind == "U":
                newest[stage] = now + 1
    return held


def staleness(schedule: Schedule) -> list[int]:
    """For each stage, the most updates between the weights a gradient is taken at and those it changes."""
    used, worst = versions_used(schedule), [0] * schedule.num_stages
    for actions in schedule.ranks:
        updates: dict[int, int] = {}
        pending: dict[int, list[int]] = {}
        for stage, kind, microbatch in actions:
            if kind in ("B", "W"):
                pending.setdefault(stage, []).append(used[stage, microbatch])
            elif kind == "U":
                oldest = min(pending.pop(stage))
                worst[stage] = max(worst[stage], updates.get(stage, 0) - oldest)
                updates[stage] = updates.get(stage, 0) + 1
    return worst


def anew(actions: Iterable[Action]) -> Iterator[Action]:
    """The first B, or W, and the first behind each update: those that gradients start anew with."""
    fresh = True
    for action in actions:
        if action.kind in ("B", "W") and fresh:
            yield action
        fresh = action.kind == "U" or (fresh and action.kind not in ("B", "W"))

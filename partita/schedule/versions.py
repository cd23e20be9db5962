"""Which weights a microbatch sees in an asynchronous schedule, and how many versions a stage keeps.

Version v of a stage is its weights after v updates; update j (from 0) makes version j+1. The rule is
`Schedule.versions`; a step of a synchronous schedule has one version, 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache

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
    waiting: list[Counter[int]] = [Counter() for _ in range(schedule.num_stages)]
    for (stage, _), version in used.items():
        waiting[stage][version] += 1
    held, newest = [1] * schedule.num_stages, [0] * schedule.num_stages
    needed = [{0} & set(uses) for uses in waiting]
    for stage, kind, microbatch in schedule.actions():
        now = newest[stage]
        held[stage] = max(held[stage], len(needed[stage] | {now}))
        if kind in ("B", "I"):  # a W multiplies by none of them
            version = used[stage, microbatch]
            waiting[stage][version] -= 1
            if not waiting[stage][version]:
                needed[stage].discard(version)
        elif kind == "U":
            newest[stage] = now + 1
            needed[stage] |= {now + 1} if waiting[stage][now + 1] else set()
    return held


def held_at(schedule: Schedule, stage: int, tied: bool = False) -> int:
    """The same of one stage once steps follow each other (Narayanan et al. 2019, 2020): 1 where a step
    flushes. `tied`: of a table that the first stage holds too: all use its version."""
    if schedule.versions == "stated":
        return _held(schedule)[stage]
    p = schedule.num_ranks
    newest = p if tied else p - stage
    return {"flush": 1, "newest": newest, "vertical": p, "previous": 2}[schedule.versions]


@lru_cache(maxsize=8)
def _held(schedule: Schedule) -> list[int]:
    return versions_held(schedule)


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

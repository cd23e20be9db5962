"""A schedule's actions one after the other, each behind all that it needs: for whoever plays it more than
once, under other durations every time."""

from __future__ import annotations

from dataclasses import dataclass

from partita.schedule.ir import Action, Schedule
from partita.schedule.replay import Replay


@dataclass(frozen=True, slots=True)
class Turn:
    """One action of a rank. `before` is the rank's turn before it (-1: it is the first), `far` are turns of
    other ranks whose results it needs, each by its place among all turns."""

    rank: int
    action: Action
    before: int
    far: tuple[int, ...]


def turns(schedule: Schedule) -> list[Turn]:
    """All compute actions in an order that respects ranks and results: an action starts when its turn
    `before` has ended and those `far` have ended and sent. Raises ScheduleError at a deadlock."""
    replay, found = Replay(schedule), list[Turn]()
    mine = [iter(actions) for actions in schedule.ranks]
    last = [-1] * len(mine)
    for rank, need in zip(replay.ranks, replay.needs, strict=True):
        far = (need,) if need >= 0 else ()
        found.append(Turn(rank, next(mine[rank]), last[rank], far))
        last[rank] = len(found) - 1
    return found

"""A schedule's actions one after the other, each behind all that it needs: for whoever plays it more than
once, under other durations every time."""

from __future__ import annotations

from dataclasses import dataclass

from partita.base.errors import ScheduleError
from partita.schedule.ir import Action, Schedule, makes, needs


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
    made: dict[Action, int] = {}
    found: list[Turn] = []
    at = [0] * len(schedule.ranks)
    last = [-1] * len(schedule.ranks)
    ready = list(range(len(at)))
    waiting: dict[Action, list[int]] = {}
    while ready:
        rank = ready.pop()
        while at[rank] < len(schedule.ranks[rank]):
            action = schedule.ranks[rank][at[rank]]
            wants = list(needs(action, schedule.num_stages))
            missing = next((w for w in wants if w not in made), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            far = tuple(made[w] for w in wants if found[made[w]].rank != rank)
            before, last[rank] = last[rank], len(found)
            for result in makes(action):
                made[result] = len(found)
                ready += waiting.pop(result, ())
            found.append(Turn(rank, action, before, far))
            at[rank] += 1
    if len(found) < sum(map(len, schedule.ranks)):
        raise ScheduleError(f"{schedule.name}: deadlock")
    return found

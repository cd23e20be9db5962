"""A schedule's clock for many costs: what waits for what is worked out once, then replayed.

The order in which results become ready does not depend on what actions cost, only on the lists of the ranks
and on what each action needs of another rank: one result, of the stage before (F) or behind (B, I). So a
replay is one pass over actions sorted that way:

    end = max(end of the action before it on its rank, when what it needs has come) + cost
    come = max(end of what made it, when the link out of that rank is free) + send

A longer action ends nothing sooner: from lower bounds of costs follows a lower bound of every time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat

from partita.base.errors import ScheduleError
from partita.schedule.clock import Costs
from partita.schedule.ir import Schedule

ROWS = {"F": 0, "B": 1, "I": 2, "W": 3, "U": 4}  # of the table of costs
PAIRED_B = len(ROWS)  # a B beside the forward before it
RESULTS = {"F": 0, "B": 1, "I": 1}


@dataclass(frozen=True, slots=True)
class Times:
    """Of one replay: `makespan` over all ranks, `own` the longest of a rank's own last end minus own first
    start, `busy` seconds of work of each rank."""

    makespan: float
    own: float
    busy: tuple[float, ...]


class Replay:
    """The actions of a schedule in an order in which each finds what it needs."""

    def __init__(self, schedule: Schedule) -> None:
        self.num_stages, self.num_ranks = schedule.num_stages, schedule.num_ranks
        self.ranks: list[int] = []
        self.costs: list[int] = []  # place in the table of costs
        self.needs: list[int] = []  # place of the action that makes what is needed, or -1
        self.leaves: list[bool] = []  # whether another rank needs what it makes
        self.first = [-1] * schedule.num_ranks  # place of each rank's first action
        self._sort(schedule)
        self._counts = [Counter[int]() for _ in range(schedule.num_ranks)]
        for rank, cost in zip(self.ranks, self.costs, strict=True):
            self._counts[rank][cost] += 1

    def _sort(self, schedule: Schedule) -> None:
        stages, every = schedule.num_stages, schedule.num_microbatches
        made: dict[int, int] = {}
        waiting: dict[int, list[int]] = {}
        at, ready = [0] * schedule.num_ranks, list(range(schedule.num_ranks))
        while ready:
            rank = ready.pop()
            actions = schedule.ranks[rank]
            while at[rank] < len(actions):
                stage, kind, microbatch = actions[at[rank]]
                result, need = RESULTS.get(kind), -1
                if result is not None:
                    other = stage - 1 if kind == "F" else stage + 1
                    far = 0 <= other < stages and schedule.rank_of(other, microbatch) != rank
                    number = (result * stages + other) * every + microbatch
                    if far and number not in made:
                        waiting.setdefault(number, []).append(rank)
                        break
                    need = made[number] if far else -1
                    own = (result * stages + stage) * every + microbatch
                    made[own] = len(self.ranks)
                    ready += waiting.pop(own, ())
                if at[rank] == 0:
                    self.first[rank] = len(self.ranks)
                self.ranks.append(rank)
                row = PAIRED_B if actions[at[rank]] in schedule.beside else ROWS[kind]
                self.costs.append(row * stages + stage)
                self.needs.append(need)
                at[rank] += 1
        if len(self.ranks) < sum(map(len, schedule.ranks)):
            raise ScheduleError(f"{schedule.name}: deadlock")
        self.leaves = [False] * len(self.needs)
        for need in self.needs:
            if need >= 0:
                self.leaves[need] = True
        self._leaving = {c for c, leaves in zip(self.costs, self.leaves, strict=True) if leaves}

    def __call__(self, costs: Costs) -> Times:
        """The times of the schedule at these costs."""
        table = [stage.of(kind) for kind in ROWS for stage in costs.stages]
        table += [stage.of("B", beside=True) for stage in costs.stages]
        send, wire, none = costs.send, costs.wire, repeat(False, len(self.ranks))
        # A rank makes no two results sooner one after the other than the quickest takes
        queue = self.leaves if wire > min((table[c] for c in self._leaving), default=wire) else none
        free, wires = [0.0] * self.num_ranks, [0.0] * self.num_ranks
        come: list[float] = []  # on the rank that needs it
        add = come.append
        for rank, cost, need, leaves in zip(self.ranks, self.costs, self.needs, queue, strict=True):
            now = free[rank]
            if need >= 0 and (there := come[need]) > now:
                now = there
            now += table[cost]
            free[rank] = now
            if leaves:
                if (left := wires[rank]) > now:
                    now = left
                wires[rank] = now + wire
            add(now + send)
        starts = [come[need] if (need := self.needs[i]) >= 0 else 0.0 for i in self.first]
        own = max(end - start for start, end in zip(starts, free, strict=True))
        return Times(max(free) - min(starts), own, self._busy(table))

    def _busy(self, table: Sequence[float]) -> tuple[float, ...]:
        return tuple(sum(n * table[c] for c, n in count.items()) for count in self._counts)

"""Why ranks stand still: the time of every rank that is not work, by cause.

    warm-up        before the rank's first action
    drain          after its last, until the last rank ends
    waiting        between two, for a result that another rank has not made yet; told by that rank
    communication  between two, for a result that is made and on its way

Work and the four add up to the makespan on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from partita.record.span import Span
from partita.schedule.clock import Pair
from partita.schedule.ir import Action, Schedule, makes, needs


@dataclass
class Idle:
    """Seconds of one rank; `waiting[r]` for rank r."""

    rank: int
    work: float = 0.0
    warm_up: float = 0.0
    drain: float = 0.0
    communication: float = 0.0
    waiting: dict[int, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All that is not work."""
        return self.warm_up + self.drain + self.communication + sum(self.waiting.values())


def idle(schedule: Schedule, spans: Sequence[Span], pair: Pair = "sequence") -> list[Idle]:
    """Each rank's idle time by cause; `spans` are the clock's (or a run's) of the schedule, by rank."""
    if not spans:
        return []
    begin, finish = min(s.start_s for s in spans), max(s.end_s for s in spans)
    made = _results(schedule, spans, pair)
    rows = [Idle(rank) for rank in range(len(schedule.ranks))]
    free: dict[int, float] = {}
    for s in spans:
        row = rows[s.rank]
        gap = s.start_s - free.get(s.rank, begin)
        if s.rank not in free:
            row.warm_up = gap
        elif gap > 0:
            _blame(schedule, s, gap, made, row)
        row.work += s.duration_s
        free[s.rank] = s.end_s
    for row in rows:
        row.drain = finish - free.get(row.rank, begin)
    return rows


def _results(
    schedule: Schedule, spans: Sequence[Span], pair: Pair
) -> dict[Action, tuple[float, int]]:
    """When each result is there, and on which rank; those of a block at its end."""
    made: dict[Action, tuple[float, int]] = {}
    for i, s in enumerate(spans):
        action = Action(s.stage, s.kind, s.microbatch)
        in_block = pair == "block" and action in schedule.paired and i + 1 < len(spans)
        end = spans[i + 1].end_s if in_block else s.end_s
        made.update((result, (end, s.rank)) for result in makes(action))
    return made


def _blame(
    schedule: Schedule, s: Span, gap: float, made: dict[Action, tuple[float, int]], row: Idle
) -> None:
    """The gap before a span: on its way since the latest result was made, waited for until then."""
    wanted = needs(Action(s.stage, s.kind, s.microbatch), schedule.num_stages)
    others = [made[n] for n in wanted if n in made and made[n][1] != s.rank]
    if not others:
        row.waiting[s.rank] = row.waiting.get(s.rank, 0.0) + gap
        return
    end, source = max(others)
    on_its_way = min(gap, max(0.0, s.start_s - end))
    row.communication += on_its_way
    if gap > on_its_way:
        row.waiting[source] = row.waiting.get(source, 0.0) + gap - on_its_way

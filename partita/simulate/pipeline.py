"""The schedule's clock for many microbatches: a long step repeats itself.

Past its warm-up a schedule adds the same time for every few rounds of `num_ranks` microbatches, never less
than the work of its busiest rank. A step of more than FULL actions is therefore played at two lengths,
PERIOD rounds apart, and grows by what those took: exact for equal stages, within 0.5 % for others
(tests/pure/test_simulate_pipeline.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from partita.base.errors import ScheduleError
from partita.record.span import Span
from partita.schedule.clock import Costs, clock
from partita.schedule.ir import Schedule
from partita.schedule.replay import Replay, Times

FULL = 6_000  # actions that are played one by one
WARM = 2  # rounds before a schedule repeats itself
PERIOD = 2  # rounds after which it does
EQUAL_ROUNDS = ("interleaved_zb",)  # whose rounds are longer where ranks do not divide microbatches

Make = Callable[[int], Schedule]


@dataclass(frozen=True)
class Played:
    """`seconds` first start to last end of the whole step; `own` the longest of each rank's own last end
    minus first start; `busy` seconds of work of each rank in the whole step; `whole`: whether all of it
    was played."""

    seconds: float
    own: float
    busy: tuple[float, ...]
    whole: bool
    schedule: Schedule
    costs: Costs

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """What was played."""
        return tuple(clock(self.schedule, self.costs))


class Rehearsal:
    """A step of `make(m)` schedules on `ranks` ranks, which is timed at any costs of its stages."""

    def __init__(self, make: Make, ranks: int, num_microbatches: int, num_stages: int) -> None:
        rounds, long = num_microbatches // ranks, 2 * num_stages * num_microbatches > FULL
        short = _short(make, ranks, num_microbatches) if long and rounds > WARM + PERIOD else []
        self.more = rounds - WARM if short else 0
        self.schedules = short or [make(num_microbatches)]
        self._replays = [_replay(schedule) for schedule in self.schedules]
        self._least: dict[Costs, float] = {}

    def __call__(self, costs: Costs) -> Times:
        """The times of the whole step."""
        times = [replay(costs) for replay in self._replays]
        return times[0] if len(times) == 1 else self._longer(*times)

    def _longer(self, first: Times, second: Times) -> Times:
        """The step from two short ones."""
        work = _each(first.busy, second.busy)
        each = max((second.makespan - first.makespan) / PERIOD, *work)
        own = max((second.own - first.own) / PERIOD, *work)
        busy = tuple(a + self.more * w for a, w in zip(first.busy, work, strict=True))
        return Times(first.makespan + self.more * each, first.own + self.more * own, busy)

    def least(self, costs: Costs) -> float:
        """Seconds of the step at least, where costs are at least these: each short step ends no sooner, and
        then follows at least the work of the busiest rank. Ways to cut states that slow nothing ask alike."""
        if costs not in self._least:
            self._least[costs] = self._shortest([replay(costs) for replay in self._replays])
        return self._least[costs]

    def _shortest(self, times: Sequence[Times]) -> float:
        if len(times) == 1:
            return times[0].makespan
        work = max(_each(times[0].busy, times[1].busy))
        return max(
            times[0].makespan + self.more * work, times[1].makespan + (self.more - PERIOD) * work
        )


def _short(make: Make, ranks: int, num_microbatches: int) -> list[Schedule]:
    """A step of WARM rounds, and one of PERIOD more; none where that changes all rounds."""
    rest = num_microbatches % ranks
    first = WARM * ranks + rest
    try:
        made = [make(m) for m in (first, first + PERIOD * ranks)]
    except ScheduleError:  # a file is of one length
        return []
    return [] if rest and made[0].name in EQUAL_ROUNDS else made


@lru_cache(maxsize=32)
def _replay(schedule: Schedule) -> Replay:
    """The schedule in an order that is replayed; plans that differ in their costs alone share it."""
    return Replay(schedule)


def _each(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """What a round adds to each rank's work."""
    return [(b - a) / PERIOD for a, b in zip(first, second, strict=True)]


def play(make: Make, ranks: int, num_microbatches: int, costs: Costs) -> Played:
    """Plays a step of `make(m)` schedules on `ranks` ranks."""
    step = Rehearsal(make, ranks, num_microbatches, len(costs.stages))
    times, whole = step(costs), not step.more
    return Played(times.makespan, times.own, times.busy, whole, step.schedules[-1], costs)

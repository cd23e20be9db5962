"""The schedule's clock for many microbatches: a long step repeats itself.

Past its warm-up a schedule adds the same time for every few rounds of `num_ranks` microbatches, never less
than the work of its busiest rank. A step of more than FULL actions is therefore played at two lengths,
PERIOD rounds apart, and grows by what those took: exact for equal stages, within 0.5 % for others
(tests/pure/test_simulate_pipeline.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from partita.record.span import Span
from partita.schedule.clock import Costs, clock, makespan, span
from partita.schedule.ir import Schedule

FULL = 6_000  # actions that are played one by one
WARM = 2  # rounds before a schedule repeats itself
PERIOD = 2  # rounds after which it does

Make = Callable[[int], Schedule]


@dataclass(frozen=True)
class Played:
    """`seconds` first start to last end of the whole step; `own` the longest of each rank's own last end
    minus first start; `spans` of what was played, which is the whole step where `whole`; `busy` seconds
    of work of each rank in the whole step."""

    seconds: float
    own: float
    spans: tuple[Span, ...]
    whole: bool
    busy: tuple[float, ...]


def play(make: Make, ranks: int, num_microbatches: int, costs: Costs) -> Played:
    """Plays a step of `make(m)` schedules on `ranks` ranks."""
    size = 2 * len(costs.stages) * num_microbatches
    if size > FULL and num_microbatches // ranks > WARM + PERIOD:
        return _extrapolated(make, ranks, num_microbatches, costs)
    spans = clock(make(num_microbatches), costs)
    return Played(makespan(spans), span(spans), tuple(spans), True, _busy(spans, ranks))


def _extrapolated(make: Make, ranks: int, num_microbatches: int, costs: Costs) -> Played:
    """The step from two short ones."""
    short = WARM * ranks + num_microbatches % ranks
    first = clock(make(short), costs)
    second = clock(make(short + PERIOD * ranks), costs)
    work = [
        (b - a) / PERIOD for a, b in zip(_busy(first, ranks), _busy(second, ranks), strict=True)
    ]
    each = max((makespan(second) - makespan(first)) / PERIOD, *work)
    own = max((span(second) - span(first)) / PERIOD, *work)
    more = (num_microbatches - short) // ranks
    busy = tuple(a + more * w for a, w in zip(_busy(first, ranks), work, strict=True))
    seconds, own = makespan(first) + more * each, span(first) + more * own
    return Played(seconds, own, tuple(second), False, busy)


def _busy(spans: list[Span], ranks: int) -> tuple[float, ...]:
    found = [0.0] * ranks
    for s in spans:
        found[s.rank] += s.duration_s
    return tuple(found)

"""What an engine has done and holds: a value for metrics and health."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0,
)  # fmt: skip


@dataclass(frozen=True)
class Histogram:
    """Counts of seconds up to each bound, and above all of them; with their sum."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds
    sum: float

    @property
    def count(self) -> int:
        """How many were seen."""
        return sum(self.counts)


class Times:
    """A histogram that grows."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BOUNDS_S) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum += seconds

    def seen(self) -> Histogram:
        """As it stands."""
        return Histogram(BOUNDS_S, tuple(self.counts), self.sum)


@dataclass(frozen=True)
class Stats:
    """Gauges: `running` to `max_sequences`, `idle_s` (seconds since the last step, or since work came after
    none) and `failed`, the model's failure that ended the engine. The rest only grows; histograms are of
    seconds. `finished` counts choices by how they ended."""

    running: int
    waiting: int
    pages: int
    pages_free: int
    max_sequences: int
    idle_s: float
    failed: str | None
    steps: int
    preemptions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    requests: int
    finished: Mapping[str, int]
    time_to_first_token: Histogram
    between_tokens: Histogram
    request_time: Histogram

"""How long a call takes: the median forgets moments in which other programs ran."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def median_seconds(call: Callable[[], object], at_least_s: float, repetitions: int = 3) -> float:
    """Median time of a call, repeated for `at_least_s` and at least `repetitions` times."""
    call()
    times: list[float] = []
    end = time.perf_counter() + at_least_s
    while len(times) < repetitions or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

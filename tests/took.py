"""What a piece of work takes of the processor, whatever else this process or machine does."""

import time
from collections.abc import Callable


def least_seconds(
    work: Callable[[], object],
    enough: float,
    tries: int = 5,
    clock: Callable[[], float] = time.thread_time,
) -> float:
    """Processor seconds that `work` took (of its thread, or by another clock), the least of up to `tries`
    runs; ends at the first that took less than `enough`. A collection of garbage or a neighbour disturbs
    some runs, not all."""
    least = float("inf")
    for _ in range(tries):
        start = clock()
        work()
        least = min(least, clock() - start)
        if least < enough:
            break
    return least

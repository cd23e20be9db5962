"""How long a call takes, and what a product so comes to: the median forgets moments in which other programs
ran."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from partita.parallel.kernels.product import PLAIN


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


def matmul_flops(rows: int, inner: int, columns: int, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of x[rows, inner] @ w[columns, inner].T, as a linear layer computes it."""
    x, w = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    return 2 * rows * inner * columns / median_seconds(lambda: PLAIN.forward(x, w), seconds)

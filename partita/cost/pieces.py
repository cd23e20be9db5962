"""Seconds of what was measured by size on this machine: pieces of layers, updates, collectives.

A piece is a stretch of a layer's software (a norm, a rotation, a linear's forward or half of its backward),
with what the host does around its kernels. Its seconds between two measured sizes lie on a line; below the
smallest they are the smallest's, since the host's share stays; beyond the largest every further element takes
what the quickest measured one does, so that no size does better than any that was measured:

    seconds(largest + x) = seconds(largest) + x * min over measured sizes of seconds(size) / size
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log

Seconds = tuple[tuple[float, float], ...]  # (size, seconds), by size; neither ever falls
BACK = ".back"  # of a piece's backward, or of the half of it for its input
WEIGHT = ".weight"  # of a linear's weight gradient
CROWDED = " crowded"  # of a collective, while ranks of other groups take turns with its own
ATTENTION = "attention"  # 'attention 128': with so many keys


def curve(measured: Mapping[str, float]) -> Seconds:
    """Measured seconds by size as a curve. One that took longer than a larger one was disturbed, which only
    ever slows: it takes as long as that."""
    found, least = [], float("inf")
    for size in sorted(measured, key=float, reverse=True):
        least = min(least, measured[size])
        found.append((float(size), least))
    return tuple(reversed(found))


def on_curve(size: float, seconds: Seconds) -> float:
    """Seconds of a size; nothing takes none."""
    if size <= 0:
        return 0.0
    first, last = seconds[0], seconds[-1]
    if size <= first[0]:
        return first[1]
    if size >= last[0]:
        return last[1] + (size - last[0]) * min(s / n for n, s in seconds)
    at = next(i for i, (n, _) in enumerate(seconds) if n >= size)
    (low, least), (high, most) = seconds[at - 1], seconds[at]
    return least + (most - least) * (size - low) / (high - low)


def between(value: float, measured: Mapping[int, Seconds]) -> Seconds:
    """The curve of a parameter between two measured ones, as its inverse goes: what a row of scores costs
    beside its keys is shared by them. Beyond the measured ones theirs stays."""
    low = max((n for n in measured if n <= value), default=min(measured))
    high = min((n for n in measured if n >= value), default=max(measured))
    if low >= high:
        return measured[min(low, high) if value <= low else max(low, high)]
    share = (1 / low - 1 / value) / (1 / low - 1 / high)
    first, last = measured[low], measured[high]
    return tuple(
        (n, (1 - share) * on_curve(n, first) + share * on_curve(n, last))
        for n in sorted({n for n, _ in (*first, *last)})
    )


def nearest(value: float, measured: Mapping[int, Seconds]) -> Seconds:
    """The curve of the nearest measured parameter, as ratios go."""
    return measured[min(measured, key=lambda n: abs(log(n / value)))]

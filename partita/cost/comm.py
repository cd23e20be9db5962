"""Seconds of a collective by alpha-beta (Hockney) with ring algorithms (Thakur et al. 2005).

n ranks, `size` bytes that a rank hands in, alpha seconds a message, beta seconds a byte:

    all_reduce      2 (n-1) alpha + 2 (n-1)/n size beta
    reduce_scatter    (n-1) alpha +   (n-1)/n size beta
    all_gather        (n-1) alpha +   (n-1)   size beta      size is the shard
    all_to_all        (n-1) alpha +   (n-1)/n size beta
    broadcast         (n-1) alpha +           size beta
    send                    alpha +           size beta

Rings are what NCCL takes for large messages; for small ones its trees are faster, so the latency terms
are upper bounds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AlphaBeta:
    """A link: seconds a message and bytes a second, per direction and device."""

    latency_s: float
    bytes_per_s: float


def steps_and_bytes(collective: str, n: int, size: float) -> tuple[float, float]:
    """Messages in a row, and bytes through a rank's link."""
    if collective == "all_reduce":
        return 2 * (n - 1), 2 * (n - 1) / n * size
    if collective in ("reduce_scatter", "all_to_all"):
        return n - 1, (n - 1) / n * size
    if collective == "all_gather":
        return n - 1, (n - 1) * size
    return (n - 1 if collective == "broadcast" else 1), size


def seconds(collective: str, n: int, size: float, link: AlphaBeta) -> float:
    """Time of one collective over n ranks; 0 for a rank alone."""
    if n <= 1:
        return 0.0
    messages, through = steps_and_bytes(collective, n, size)
    return messages * link.latency_s + through / link.bytes_per_s

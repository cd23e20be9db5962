"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import line


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """GPipe (Huang et al. 2018, arXiv 1811.06965): F0..F(m-1), then B0..B(m-1). One stage a rank.

    Flush time (m+p-1)(F+B), exact: bubble overhead (p-1)/m, idle fraction (p-1)/(m+p-1). Every rank
    holds all m activations at the turn. Valid for every m >= 1.

    >>> from partita.plots.timeline import draw
    >>> print(draw(gpipe(3, 4), F=1, I=0.5, W=0.5))
    rank 0 | 0F0 0F1 0F2 0F3                 0B0 0B1 0B2 0B3
    rank 1 |     1F0 1F1 1F2 1F3         1B0 1B1 1B2 1B3
    rank 2 |         2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3
    """
    m = num_microbatches
    return line("gpipe", num_ranks, m, lambda rank: _rank(rank, m))


def _rank(rank: int, m: int) -> list[Action]:
    return [Action(rank, kind, k) for kind in "FB" for k in range(m)]

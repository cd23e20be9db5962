"""Forward only: evaluation and inference."""

from __future__ import annotations

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import loop


def forward(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """F0..F(m-1) of each stage of the rank in turn (stage s lies on rank s mod p).

    Time (m + (p-1)/v) F for m >= p. Nothing is held for backward: peak 0. Valid for every m >= 1.

    >>> from partita.plots.timeline import draw
    >>> print(draw(forward(3, 4)))
    rank 0 | 0F0 0F1 0F2 0F3
    rank 1 |     1F0 1F1 1F2 1F3
    rank 2 |         2F0 2F1 2F2 2F3
    """
    p, m, v = num_ranks, num_microbatches, virtual_stages
    return loop("forward", p, m, v, lambda rank: _rank(rank, p, m, v))


def _rank(rank: int, p: int, m: int, v: int) -> list[Action]:
    return [Action(chunk * p + rank, "F", k) for chunk in range(v) for k in range(m)]

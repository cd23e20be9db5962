"""Breadth-first: all microbatches of a stage before its next one, for ZeRO-3."""

from __future__ import annotations

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import loop


def looped_bfs(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Breadth-first pipeline (Lamy-Poirier 2022, arXiv 2211.05953). v stages a rank, in a loop.

    All microbatches of the rank's first stage, then of its second ...; backward from its last stage,
    microbatches descending. Its point is one ZeRO-3 gather and one gradient reduction a stage and
    step. Flush time (m + (p-1)/v)(F+B) for m >= p, exact. Every rank holds all mv chunks at the turn.
    Valid for every m >= 1; with v = 1 it is GPipe backward from the last microbatch.

    >>> from partita.plots.timeline import draw
    >>> print(draw(looped_bfs(2, 3, 2), F=2, I=1, W=1))
    rank 0 | 0F0 0F1 0F2 2F0 2F1 2F2         2B2 2B1 2B0 0B2 0B1 0B0
    rank 1 |     1F0 1F1 1F2 3F0 3F1 3F2 3B2 3B1 3B0 1B2 1B1 1B0
    """
    p, m, v = num_ranks, num_microbatches, virtual_stages
    return loop("looped_bfs", p, m, v, lambda rank: _rank(rank, p, m, v))


def _rank(rank: int, p: int, m: int, v: int) -> list[Action]:
    forward = [Action(c * p + rank, "F", k) for c in range(v) for k in range(m)]
    return [*forward, *(action._replace(kind="B") for action in reversed(forward))]

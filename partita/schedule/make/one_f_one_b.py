"""1F1B: a backward as early as it can run, so that few activations are held."""

from __future__ import annotations

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import line


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B, PipeDream-Flush (Narayanan et al. 2020, arXiv 2006.09503; Megatron, 2104.04473).

    Rank r runs min(m, p-1-r) forwards, then (F, B) pairs, then the backwards that are left. One stage
    a rank. Flush time (m+p-1)(F+B), exact, as GPipe; but rank r holds min(m, p-r) activations, not m.
    Latency c of a message is not hidden: the steady period is F+B + 2c(p-1)/p. Valid for every m >= 1.

    >>> from partita.plots.timeline import draw
    >>> print(draw(one_f_one_b(3, 4), F=1, I=0.5, W=0.5))
    rank 0 | 0F0 0F1 0F2         0B0 0F3 0B1     0B2     0B3
    rank 1 |     1F0 1F1     1B0 1F2 1B1 1F3 1B2     1B3
    rank 2 |         2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """
    p, m = num_ranks, num_microbatches
    return line("1f1b", p, m, lambda rank: _rank(rank, p, m))


def _rank(rank: int, p: int, m: int) -> list[Action]:
    warmup = min(m, p - 1 - rank)
    f = [Action(rank, "F", k) for k in range(m)]
    b = [Action(rank, "B", k) for k in range(m)]
    steady = [action for pair in zip(f[warmup:], b, strict=False) for action in pair]
    return [*f[:warmup], *steady, *b[m - warmup :]]

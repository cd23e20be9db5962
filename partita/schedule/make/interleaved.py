"""Interleaved 1F1B: several smaller stages a rank divide the bubble by their number."""

from __future__ import annotations

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import loop, require


def interleaved_1f1b(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473). v stages a rank, in a loop.

    The k-th forward of a rank is of chunk (k mod pv) div p and microbatch p (k div pv) + k mod p; the
    k-th backward is of chunk v-1-(..) and the same microbatch. Rank r runs min(mv, 2(p-1-r) + (v-1)p)
    forwards, then (F, B) pairs, then the backwards that are left. Needs m % p == 0.

    Flush time (m + (p-1)/v)(F+B), exact. Rank r holds min(mv, 2(p-1-r) + (v-1)p + 1) chunks, so rank
    0 holds 1 + (p-1)/(pv) of 1F1B's memory; messages are v times as many. With v = 1 it is 1F1B with
    doubled warm-up: it holds 2p-1, and the latency of messages is hidden.

    >>> from partita.plots.timeline import draw
    >>> print(draw(interleaved_1f1b(2, 4, 2), F=2, I=1, W=1))
    rank 0 | 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1     2B2     2B3 0B2 0B3
    rank 1 |     1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """
    p, m, v = num_ranks, num_microbatches, virtual_stages
    below, above = max(m - m % p, p), m - m % p + p
    require(
        m % p == 0, "interleaved_1f1b", f"p={p}, m={m}, v={v}", "m to be a multiple of p",
        f"m={below} or m={above} would do" if below != above else f"m={p} would do",
    )  # fmt: skip
    return loop("interleaved_1f1b", p, m, v, lambda rank: _rank(rank, p, m, v))


def _rank(rank: int, p: int, m: int, v: int) -> list[Action]:
    chunks = [k % (p * v) // p for k in range(m * v)]
    microbatches = [p * (k // (p * v)) + k % p for k in range(m * v)]
    f = [Action(c * p + rank, "F", k) for c, k in zip(chunks, microbatches, strict=True)]
    b = [Action((v - 1 - c) * p + rank, "B", k) for c, k in zip(chunks, microbatches, strict=True)]
    warmup = min(m * v, 2 * (p - 1 - rank) + (v - 1) * p)
    steady = [action for pair in zip(f[warmup:], b, strict=False) for action in pair]
    return [*f[:warmup], *steady, *b[m * v - warmup :]]

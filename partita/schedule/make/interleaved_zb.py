"""Interleaved zero bubble: ZB-H1 with several stages a rank."""

from __future__ import annotations

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import loop, require


def interleaved_zb(num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Schedule:
    """Interleaved zero bubble (Qi et al. 2024, arXiv 2401.10241; the lists are those of torch's
    ScheduleInterleavedZeroBubble). v stages a rank, in a loop; with v = 1 it is ZB-H1.

    Microbatches run in max(1, m div p) rounds of equal size q: m must be a multiple of their number.
    The k-th forward of a rank is of chunk (k div q) mod v; the k-th backward of chunk v-1-(..); within
    a chunk microbatches go in order. Rank r runs min(mv, (v-1)q + p-1-r) forwards; then a forward, an
    input half and, once r input halves are ahead, a weight half; then what is left.

    With v = 2 and p | m, m >= 2p at F=I=W: flush mt + (p-1)/2 F, t = F+I+W. Holds min(mv, (v-1)q + p)
    chunks until W: p whole shares where p | m, so that q = p; more where q is larger.

    >>> from partita.plots.timeline import draw
    >>> print(draw(interleaved_zb(2, 2, 2)))
    rank 0 | 0F0 0F1 2F0 2F1     2I0 2W0 2I1 2W1 0I0 0W0 0I1 0W1
    rank 1 |     1F0 1F1 3F0 3I0 3F1 3I1 3W0 1I0 3W1 1I1 1W0 1W1
    """
    p, m, v = num_ranks, num_microbatches, virtual_stages
    rounds = max(1, m // p)
    require(
        m % rounds == 0, "interleaved_zb", f"p={p}, m={m}, v={v}",
        f"m to be a multiple of m div p = {rounds} rounds", f"m={m - m % p} would do",
    )  # fmt: skip
    return loop("interleaved_zb", p, m, v, lambda rank: _rank(rank, p, m, v, m // rounds))


def _rank(rank: int, p: int, m: int, v: int, q: int) -> list[Action]:
    chunks = [k // q % v for k in range(m * v)]
    back = [(v - 1 - c) * p + rank for c in chunks]
    f = _numbered([c * p + rank for c in chunks], "F")
    i, w = _numbered(back, "I"), _numbered(back, "W")
    warmup = min(m * v, (v - 1) * q + p - 1 - rank)
    out = f[:warmup]
    for k in range(m * v + rank):
        if k + warmup < m * v:
            out.append(f[k + warmup])
        if k < m * v:
            out.append(i[k])
        if k >= rank:
            out.append(w[k - rank])
    return out


def _numbered(stages: list[int], kind: str) -> list[Action]:
    """One action for each entry, microbatches counted up stage by stage."""
    made = dict.fromkeys(stages, 0)
    out = []
    for stage in stages:
        out.append(Action(stage, kind, made[stage]))
        made[stage] += 1
    return out

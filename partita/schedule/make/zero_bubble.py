"""ZB-H1 and ZB-H2: weight halves fill the pipeline's bubble (Qi et al. 2024, arXiv 2401.10241)."""

from __future__ import annotations

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import line, require


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B's memory, a third of its bubble. One stage a rank; valid for every m >= 1.

    Rank r runs min(m, p-r) forwards; then for k = 0..m-1: I_k, W_(k-r) once k >= r, the next F while
    there is one; then the r weight halves that are left.

    With t = F+I+W, m >= p and W <= F: span mt + (p-1)(F+I-W), flush mt + (p-1) max(F, F+I-W), exact;
    for W > F both are lower bounds. No line with as much memory flushes sooner at F=I=W: rank p-1
    cannot start earlier. Every rank holds at most p until W.

    >>> from partita.plots.timeline import draw
    >>> print(draw(zb_h1(3, 4)))
    rank 0 | 0F0 0F1 0F2         0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    rank 1 |     1F0 1F1     1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
    rank 2 |         2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
    """
    p, m = num_ranks, num_microbatches
    return line("zb_h1", p, m, lambda rank: warmed_up(rank, m, p - rank, rank))


def zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H2: no bubble inside the step, for twice the memory. One stage a rank; m >= 2p-1.

    ZB-H1 with min(m, 2(p-r)-1) forwards in the warm-up and 2r weight halves deferred. With t = F+I+W
    and W <= F: span mt + (p-1) max(0, F+I-2W), exact, which is no bubble at F=I=W; flush
    mt + (p-1)F at equal costs, a lower bound else. Every rank holds at most 2p-1 until W.

    >>> from partita.plots.timeline import draw
    >>> print(draw(zb_h2(2, 4)))
    rank 0 | 0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    rank 1 |     1F0 1I0 1F1 1I1 1F2 1I2 1W0 1F3 1I3 1W1 1W2 1W3
    """
    p, m = num_ranks, num_microbatches
    asked, rule = f"p={p}, m={m}", f"m >= 2p-1 = {2 * p - 1}"
    require(m >= 2 * p - 1, "zb_h2", asked, rule, "zb_h1 takes fewer microbatches")
    return line("zb_h2", p, m, lambda rank: warmed_up(rank, m, 2 * (p - rank) - 1, 2 * rank))


def warmed_up(rank: int, m: int, warmup: int, deferred: int) -> list[Action]:
    """A rank of a line: `warmup` forwards first; W_k runs `deferred` input halves after I_k."""
    out = [Action(rank, "F", k) for k in range(min(m, warmup))]
    for k in range(m + deferred):
        if k < m:
            out.append(Action(rank, "I", k))
        if 0 <= k - deferred < m:
            out.append(Action(rank, "W", k - deferred))
        if k + warmup < m:
            out.append(Action(rank, "F", k + warmup))
    return out

"""ZB-V: stages laid down and up again, no bubble with 1F1B's memory."""

from __future__ import annotations

from itertools import chain

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import vee


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-V (Qi et al. 2024, arXiv 2401.10241 sec. 6; V-ZB of 2405.15362). Two stages a rank, in a vee.

    f, i, w are of the rank's second chunk. Rank r runs 2(p-r)-1 x F; r x (f F); (p-r) x (f i w); then
    repeats (F I W f i w), without F once all are done; r x (I i); (p-r) x (I W); then the w, then the
    W that are left. Built for max(m, 2p-1) microbatches and cut to m: valid for every m >= 1.

    For m >= 2p-1 at F=I=W, t = F+I+W: span mt (no bubble), flush mt + (p-1)/2 F. Every rank holds at
    most 2p chunks until W: 1F1B's memory on rank 0, on all ranks.

    >>> from partita.plots.timeline import draw
    >>> print(draw(zb_v(2, 3)))
    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    rank 1 |     1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """
    p, m = num_ranks, num_microbatches
    return vee("zb_v", p, m, lambda rank: _rank(rank, p, m))


def _rank(rank: int, p: int, m: int) -> list[Action]:
    n = max(m, 2 * p - 1)
    stages = (rank, 2 * p - 1 - rank)
    made = dict.fromkeys(chain("FIW", "fiw"), 0)
    out: list[Action] = []

    def run(kinds: str, times: int = 1) -> None:
        for kind in kinds * times:
            if made[kind] < n:
                out.append(Action(stages[kind.islower()], kind.upper(), made[kind]))
                made[kind] += 1

    run("F", 2 * (p - rank) - 1)
    run("fF", rank)
    run("fiw", p - rank)
    while made["f"] < n:
        run("FIWfiw")
    run("Ii", rank)
    run("IW", p - rank)
    run("w", n)
    run("W", n)
    return [action for action in out if action.microbatch < m]

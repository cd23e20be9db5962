"""Chimera: two pipelines in opposite directions fill each other's bubbles."""

from __future__ import annotations

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import bidirectional, require


def chimera(num_ranks: int, num_microbatches: int) -> Schedule:
    """Chimera (Li and Hoefler 2021, arXiv 2107.06925): every stage has two copies, on ranks s and p-1-s.
    Needs p even and m % p == 0.

    Units of p microbatches, the first p/2 of each in direction 0, the others in direction 1. The j-th of
    its direction in unit u runs stage s forward in slot 2pu + s + 2j and backward in slot
    2pu + 2p-1-s + 2j; a rank's list is in the order of slots.

    Time 2m + p-2 at F=B=1; mt + (m/p+1)(p-2) at F=I=W, t = F+I+W, exact: the bubble comes back with
    every unit. A rank holds at most p microbatches, and the parameters twice.

    >>> from partita.plots.timeline import draw
    >>> print(draw(chimera(4, 4), F=1, I=0.5, W=0.5))
    rank 0 | 0F0 0F1     3F2 3B2 3F3 3B3 0B0     0B1
    rank 1 |     1F0 2F2 1F1 2F3 2B2 1B0 2B3 1B1
    rank 2 |     1F2 2F0 1F3 2F1 2B0 1B2 2B1 1B3
    rank 3 | 0F2 0F3     3F0 3B0 3F1 3B1 0B2     0B3
    """
    p, m = num_ranks, num_microbatches
    asked, rule = f"p={p}, m={m}", "p even and m a multiple of p"
    require(p % 2 == 0 and m % p == 0, "chimera", asked, rule, "zb_v takes any")
    direction = tuple(int(k % p >= p // 2) for k in range(m))
    return bidirectional("chimera", p, direction, lambda rank: _rank(rank, p, direction))


def _rank(rank: int, p: int, direction: tuple[int, ...]) -> list[Action]:
    slots: dict[int, Action] = {}
    for k, way in enumerate(direction):
        stage = p - 1 - rank if way else rank
        start = 2 * p * (k // p) + 2 * (k % (p // 2))
        slots[start + stage] = Action(stage, "F", k)
        slots[start + 2 * p - 1 - stage] = Action(stage, "B", k)
    return [slots[slot] for slot in sorted(slots)]

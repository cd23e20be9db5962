"""The picture in an error: what ran until nothing moved, and an arrow at what waits.

    rank 0 | 0F0 0F1 ... 0B0 waits for 1B0
    rank 1 |     1F0     <-- 1F1 waits for 0F2

One cell a slot; F, I, W and U take one, B takes two. Long histories begin with the last cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from partita.schedule.ir import Action

_CELLS = 14  # slots shown before the last one
_AROUND = 6  # actions shown to either side of a marked one


def staircase(ranks: Sequence[Sequence[tuple[int, Action]]], waiting: Mapping[int, str]) -> str:
    """`ranks[r]` = (slot, action) in order; `waiting[r]` = what stands behind the arrow of rank r."""
    width = max((len(str(a)) for row in ranks for _, a in row), default=3) + 1
    ends = [slot + _slots(a) for row in ranks for slot, a in row]
    first = max(0, max(ends, default=0) - _CELLS)
    lines = []
    for rank, row in enumerate(ranks):
        line = ""
        for slot, action in row:
            if slot >= first:
                cell = str(action).ljust(_slots(action) * width - 1, "-")
                line = line.ljust((slot - first) * width) + cell + " "
        if rank in waiting:
            line += f"<-- {waiting[rank]}"
        lines.append(
            f"  rank {rank:>{len(str(len(ranks) - 1))}} | {'... ' if first else ''}{line.rstrip()}"
        )
    return "\n".join(lines)


def _slots(action: Action) -> int:
    return 2 if action.kind == "B" else 1


def marked(rank: int, actions: Sequence[Action | str], place: int, words: str) -> str:
    """The rank's list around one action, with an arrow under it.

    >>> print(marked(0, [Action(0, "F", 0), Action(0, "F", 0)], 1, "a second time"))
      rank 0 | 0F0 0F0
             |     ^-- a second time
    """
    start = max(0, place - _AROUND)
    cells = [str(a) for a in actions[start : place + _AROUND + 1]]
    before = "... " if start else ""
    after = " ..." if place + _AROUND + 1 < len(actions) else ""
    indent = len(before) + sum(len(cell) + 1 for cell in cells[: place - start])
    head = f"  rank {rank} | "
    mark = " " * (len(head) - 2) + "| " + " " * indent + f"^-- {words}"
    return f"{head}{before}{' '.join(cells)}{after}\n{mark}"

"""DualPipe and DualPipeV: a forward and a backward overlap, so that each hides the other's all-to-all."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.families import bidirectional, require, vee


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe (DeepSeek-V3, arXiv 2412.19437): microbatches enter at both ends; every stage has two
    copies, on ranks s and p-1-s. Needs p even, m even, m >= 2p (both directions together).

    Direction 0 takes microbatches 0..m/2-1, direction 1 the rest. With n = p/2, r = min(rank, p-1-rank),
    h = m/2 and phase 0 the direction whose input end is nearer: 2(n-r-1) x F0; (r+1) x (F0 F1);
    (n-r-1) x (I1 W F1); (h-p+r+1) x ([F0 B1] [F1 B0]); (n-r-1) x (B1 [F1 B0]); (r+1) x (B1 B0), of
    these the first r+1 as B and the rest as I; (n-r-1) x (W I0); (r+1) x W, oldest first. [..] is an
    overlapped pair; the first one of the two middle ranks is not overlapped.

    Bubble (p/2-1)(F&B + B - 3W) where a pair is one block of F&B = F+B at F=I=W, exact; run as F then B
    (p/2-1)(F+I-W) near equal costs. Holds p+1 microbatches, and the parameters twice.

    >>> from partita.plots.timeline import draw
    >>> print(draw(dualpipe(2, 4), F=1, I=1, W=1))
    rank 0 | 0F0 1F2 0F1 1B2---- 1F3 0B0---- 1B3---- 0I1 0W1
    rank 1 | 0F2 1F0 0F3 1B0---- 1F1 0B2---- 1B1---- 0I3 0W3
    """
    p, m = num_ranks, num_microbatches
    require(
        p % 2 == 0 and m % 2 == 0 and m >= 2 * p, "dualpipe", f"p={p}, m={m}",
        f"p even, m even and m >= 2p = {2 * p}", "dualpipev takes odd numbers, zb_v fewer microbatches",
    )  # fmt: skip
    h = m // 2
    rows = []
    for rank in range(p):
        r = min(rank, p - 1 - rank)
        ways = (0, 1) if rank < p // 2 else (1, 0)
        stages = (rank, p - 1 - rank)
        row = _Row(tuple(stages[way] for way in ways), tuple(way * h for way in ways))
        rows.append(row.filled(p // 2, r, h - p + r + 1, r == p // 2 - 1))
    made = bidirectional("dualpipe", p, (0,) * h + (1,) * h, lambda rank: rows[rank].actions)
    return replace(made, paired=frozenset(a for row in rows for a in row.paired))


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV: DualPipe cut in half (Sea AI Lab's cut; DeepSeek's code). Two stages a rank, in a vee;
    parameters once. Needs m >= 2p.

    DualPipe's rule with n = p, r = rank, chunks 0 and 1 in place of the directions, and (m-2p+r+1)
    pairs of overlapped pairs. The first pair of the last rank is not overlapped.

    Bubble as F then B: (p-1)/2 (F+I-W); as blocks: (p-1)/2 (F&B + B - 3W). Holds 2p+1 chunks. Without
    the gain of overlap ZB-V is never worse.

    >>> from partita.plots.timeline import draw
    >>> print(draw(dualpipev(2, 4), F=2, I=2, W=2))
    rank 0 | 0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1---- 3F2 0B0---- 3B2---- 3F3     0B1---- 3B3---- 0I2 0W2 0I3 0W3
    rank 1 |     1F0 2F0 1F1 2F1 1F2 2B0---- 2F2 1B0---- 1F3 2B1---- 2F3 1B1---- 2B2---- 1B2---- 2I3 1I3 2W3 1W3
    """  # noqa: E501 (a picture)
    p, m = num_ranks, num_microbatches
    asked, rule = f"p={p}, m={m}", f"m >= 2p = {2 * p}"
    require(m >= 2 * p, "dualpipev", asked, rule, "zb_v takes fewer microbatches")
    rows = [
        _Row((rank, 2 * p - 1 - rank), (0, 0)).filled(p, rank, m - 2 * p + rank + 1, rank == p - 1)
        for rank in range(p)
    ]
    made = vee("dualpipev", p, m, lambda rank: rows[rank].actions)
    return replace(made, paired=frozenset(a for row in rows for a in row.paired))


@dataclass
class _Row:
    """One rank's list as it grows. Phases 0 and 1 are directions, or chunks; `stages` and `first` (its
    first microbatch) are theirs."""

    stages: tuple[int, ...]
    first: tuple[int, ...]
    actions: list[Action] = field(default_factory=list)
    paired: list[Action] = field(default_factory=list)
    _made: dict[tuple[str, int], int] = field(default_factory=dict)
    _owed: list[Action] = field(default_factory=list)

    def add(self, kind: str, phase: int) -> Action:
        """The next microbatch of the phase; an I leaves its W owed."""
        row = ("F" if kind == "F" else "B", phase)
        k = self._made.get(row, 0)
        self._made[row] = k + 1
        action = Action(self.stages[phase], kind, self.first[phase] + k)
        self.actions.append(action)
        if kind == "I":
            self._owed.append(action._replace(kind="W"))
        return action

    def weight(self) -> None:
        """The oldest W that is owed."""
        self.actions.append(self._owed.pop(0))

    def pair(self, phase: int, overlapped: bool = True) -> None:
        """F of this phase with B of the other."""
        forward = self.add("F", phase)
        self.add("B", 1 - phase)
        if overlapped:
            self.paired.append(forward)

    def filled(self, n: int, r: int, pairs: int, in_the_middle: bool) -> _Row:
        """The rule of both schedules for place r of n."""
        for _ in range(2 * (n - r - 1)):
            self.add("F", 0)
        for i in range(2 * (r + 1)):
            self.add("F", i % 2)
        for _ in range(n - r - 1):
            self.add("I", 1)
            self.weight()
            self.add("F", 1)
        for i in range(pairs):
            self.pair(0, overlapped=i > 0 or not in_the_middle)
            self.pair(1)
        for _ in range(n - r - 1):
            self.add("B", 1)
            self.pair(1)
        for i in range(2 * (r + 1)):
            self.add("B" if i <= r else "I", 1 - i % 2)
        for _ in range(n - r - 1):
            self.weight()
            self.add("I", 0)
        for _ in range(r + 1):
            self.weight()
        return self

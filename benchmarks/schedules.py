"""`python -m benchmarks.schedules [--ranks 2 4 8]`: `auto` beside the best named schedule over a grid.

p ranks, 2p and 4p microbatches; limits of a third, a half, three quarters, one, one and a half and twice
1F1B's activations; F = I = W, (1, 1.1, 0.9), and heavy ends on the stages of a line or a vee; messages that
take no time or a tenth of an F; at most so many stages a rank on both sides. A point counts where costs are
uneven or the limit is below 1F1B's. Prints how many fit no named schedule, how many are more than 2 % faster
than the best that fits, and how many could be: where the lower bound leaves that. No CP-SAT. Both sides may
hold two copies of a stage, or `--copies 1`.

`--torch`: by the clock at F = I = W, m = 2p, the best that torch's schedules do where a rank may hold so many
microbatches, on up to four stages a rank and on as many microbatches at a time as any of them fits with,
beside `auto`'s best with one copy of every stage and with two, and what nothing undercuts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from partita.base.errors import ScheduleError
from partita.base.text import table
from partita.schedule.check import over_limit
from partita.schedule.clock import Costs, StageCosts, clock, makespan, peak_share
from partita.schedule.make import schedule
from partita.schedule.synth.seeds import named
from partita.schedule.synth.synthesis import Synthesis, Task, synthesise

TORCHS = (
    ("gpipe", 1), ("1f1b", 1), ("zb_v", 2), ("dualpipev", 2),
    *((name, v) for name in ("interleaved_1f1b", "looped_bfs", "interleaved_zb") for v in (1, 2, 4)),
)  # fmt: skip
SHARES = (1 / 3, 1 / 2, 3 / 4, 1, 3 / 2, 2)
BETTER = 0.98


@dataclass(frozen=True)
class Point:
    """One instance: the best named schedule that fits (inf where none does), ours and what none undercuts."""

    p: int
    m: int
    limit: float
    costs: str
    send: float
    named: float
    ours: float
    bound: float
    processor_s: float

    @property
    def counts(self) -> bool:
        """Costs are uneven or the limit is below 1F1B's."""
        return self.costs != "even" or self.limit < self.p

    @property
    def fits(self) -> bool:
        """Whether a named schedule is within the limit."""
        return math.isfinite(self.named)

    @property
    def is_better(self) -> bool:
        """More than 2 % faster than every named schedule that fits."""
        return self.ours < BETTER * self.named

    @property
    def could_be(self) -> bool:
        """The bound leaves more than 2 %."""
        return self.bound < BETTER * self.named


def profiles(p: int) -> dict[str, tuple[StageCosts, ...]]:
    """Costs by name: a rank's share, or of each stage of a line or a vee (embedding first, head last)."""

    def ends(stages: int, share: float) -> tuple[StageCosts, ...]:
        return tuple(StageCosts(*(c * share,) * 3) for c in [1.2] + [1.0] * (stages - 2) + [1.5])

    return {
        "even": (StageCosts(),),
        "split": (StageCosts(1.0, 1.1, 0.9),),
        "line": ends(p, 1.0),
        "vee": ends(2 * p, 0.5),
    }


def tasks(
    ranks: list[int], stages: int, effort: int | None, copies: int = 2
) -> Iterator[tuple[str, Task]]:
    """The grid."""
    for p in ranks:
        for m, (name, each), share, send in itertools.product(
            (2 * p, 4 * p), profiles(p).items(), SHARES, (0.0, 0.1)
        ):
            if share * p >= 1:
                asked = Task(
                    p, m, Costs(each, send), share * p,
                    stages=stages, copies=copies, effort=effort, proof=0.0,
                )  # fmt: skip
                yield name, asked


def best_named(task: Task) -> float:
    """The fastest named schedule within the task's limit, at its costs."""
    best = math.inf
    for stages in range(1, task.stages + 1):
        costs = task.costs_of(stages)
        for s in named(task.num_ranks, task.num_microbatches, stages, task.copies) if costs else ():
            assert costs is not None
            if not over_limit(s, task.limit, task.weights_of(stages, costs)):
                best = min(best, makespan(clock(s, costs)))
    return best


def point(name: str, task: Task, found: Synthesis, processor_s: float = 0.0) -> Point:
    """Both sides of one instance."""
    return Point(
        task.num_ranks, task.num_microbatches, task.limit, name, task.costs.send, best_named(task),
        found.makespan, found.lower_bound, processor_s,
    )  # fmt: skip


def timed(name: str, task: Task) -> Point:
    """The instance made, and what that took."""
    start = time.process_time()
    found = synthesise(task)
    return point(name, task, found, time.process_time() - start)


def summary(points: list[Point]) -> str:
    """What the module's docstring says."""
    counted = [x for x in points if x.counts]
    fit = [x for x in counted if x.fits]
    could = [x for x in fit if x.could_be]
    rows = [
        ("points", len(points)),
        ("slower than a named schedule", sum(x.ours > x.named * (1 + 1e-9) for x in points)),
        ("at the lower bound", sum(x.ours <= x.bound * (1 + 1e-9) for x in points)),
        ("uneven costs or a binding limit", len(counted)),
        ("of these: no named schedule fits", len(counted) - len(fit)),
        ("of the others: more than 2 % faster", sum(x.is_better for x in fit)),
        ("of the others: could be, by the bound", len(could)),
        ("of the others", len(fit)),
    ]
    return table(rows, ("", "points"))


def torchs(p: int, m: int, limit: float) -> float:
    """The least time of torch's schedules where a rank holds at most so many microbatches: any of them on so
    many at a time, one lot after the other. Its lists are ours of those names."""
    lots: list[float] = []
    for k in range(1, m + 1):
        fit = [math.inf]
        for name, stages in TORCHS:
            try:
                made = schedule(name, num_ranks=p, num_microbatches=k, virtual_stages=stages)
            except ScheduleError:
                continue
            if max(peak_share(made)) <= limit + 1e-9:
                fit.append(makespan(clock(made)))
        lots.append(min(fit))
    best = [0.0]
    for k in range(1, m + 1):
        best.append(min(best[k - n] + lots[n - 1] for n in range(1, k + 1)))
    return best[m]


def beside_torch(ranks: list[int], effort: int | None) -> str:
    """The table of `--torch`."""
    rows = []
    for p in ranks:
        m = 2 * p
        for limit in sorted({max(1.0, p * share) for share in (1 / 2, 3 / 4, 1, 2)}):
            other = torchs(p, m, limit)
            row = [f"{p}, {m}", f"{limit:g}", f"{other:g}"]
            for copies in (1, 2):
                asked = Task(p, m, limit=limit, stages=4, copies=copies, effort=effort, proof=0.0)
                ours = synthesise(asked).makespan
                row += [f"{ours:g}", f"{ours / other:.2f}"]
            rows.append([*row, f"{3 * m / other:.2f}"])
    header = "p, m", "held", "torch's", "auto", "ratio", "auto, 2 copies", "ratio", "work / torch's"
    return table(rows, header)


def main() -> None:
    """Runs the grid."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--effort", type=int, help="items placed; the usual unless told")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--copies", type=int, default=2, help="of a stage, on both sides")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--torch", action="store_true")
    asked = parser.parse_args()
    if asked.torch:
        print(beside_torch(asked.ranks, asked.effort))
        return
    grid = tasks(asked.ranks, asked.stages, asked.effort, asked.copies)
    points = [timed(name, task) for name, task in grid]
    print(
        json.dumps({"format": 1, "points": [asdict(x) for x in points]})
        if asked.json
        else summary(points)
    )


if __name__ == "__main__":
    main()

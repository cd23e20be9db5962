"""`python -m benchmarks.clocked [RANKS]`: our schedules and torch's on stages whose compute is a sleep.

Every F, I and W of a stage sleeps SLOT_S, messages and all else are real: gloo between processes, ours and
torch.distributed.pipelining's in the same ones, in turn. Prints the least makespan of RUNS each, in slots, by
the clock's, and what the best of each side takes where a rank may hold so many shares of activations: of ours
`auto`'s too, on up to four stages a rank; of torch's, where none of its lists fits, GPipe on as many
microbatches at a time as do. Beside it what no schedule undercuts: a rank's work.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.peers import SCHEDULES
from partita.base.text import table
from partita.comm.processes import start_ranks
from partita.comm.protocol import Where
from partita.comm.torch import TorchWorld
from partita.parallel.deferred import WeightQueue
from partita.parallel.pp.executor import Channel, Executor
from partita.parallel.pp.rules import lane
from partita.schedule.clock import Costs, clock, makespan, peak_share
from partita.schedule.ir import Schedule
from partita.schedule.make import schedule

SHAPE, SLOT_S, RUNS = (1, 64), 0.02, 3
STAGES = 4  # of a rank, at most, that auto may make
SHARES = (1 / 2, 3 / 4, 1)  # of 1F1B's activations, which auto is held to
OURS = {"gpipe": "gpipe", "1f1b": "1f1b", "interleaved": "interleaved_1f1b", "zero bubble": "interleaved_zb",
        "zbv": "zb_v", "dualpipev": "dualpipev"}  # fmt: skip


class Input(torch.autograd.Function):
    """A stage: F, and I in its backward; `anchor` makes a first stage have one too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor | None) -> torch.Tensor:
        """Sleeps."""
        time.sleep(SLOT_S)
        ctx.anchored = anchor is not None
        return x + 1

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sleeps."""
        time.sleep(SLOT_S)
        return dy.contiguous(), dy.new_zeros(1) if ctx.anchored else None


class Weight(torch.autograd.Function):
    """A weight whose gradient takes W."""

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return w.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        """Sleeps."""
        time.sleep(SLOT_S)
        return dy


class Deferred(torch.autograd.Function):
    """The same stage for our executor: W goes to the queue."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, queue: WeightQueue) -> torch.Tensor:
        """Sleeps."""
        time.sleep(SLOT_S)
        ctx.queue = queue
        return x + 1

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Sleeps."""
        time.sleep(SLOT_S)
        ctx.queue.add(time.sleep, SLOT_S)
        return dy, None


class Stage(torch.nn.Module):
    """For torch's schedules."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.anchor = torch.nn.Parameter(torch.zeros(1)) if first else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x + 1."""
        return Input.apply(x, self.anchor) + Weight.apply(self.w)  # type: ignore[operator]


def ours(world: TorchWorld, made: Schedule) -> Callable[[], None]:
    """A step of our executor."""
    queue = WeightQueue()

    def module(stage: int) -> Any:
        def run(x: torch.Tensor | None, batch: object) -> torch.Tensor:
            x = torch.zeros(SHAPE, requires_grad=True) if x is None else x
            y: torch.Tensor = Deferred.apply(x, queue)  # type: ignore[assignment]
            return y.sum() if stage == made.num_stages - 1 else y

        return run

    channels = {}
    for what in "FB":
        for stage in range(made.num_stages):
            comm = world.make(range(world.size), axis="pp", lane=lane(what, stage, made))
            assert comm is not None
            channels[what, stage] = Channel(comm, f"{stage}:send")
    executor = Executor(
        {s: module(s) for s in made.stages_of(world.rank)}, made, world.rank, channels, Where(),
        lambda *_: torch.empty(SHAPE), queue,
    )  # fmt: skip
    return lambda: void(executor.run([None] * made.num_microbatches))


def theirs(kind: str, ranks: int, m: int) -> Callable[[], None]:
    """A step of torch's schedule."""
    from torch.distributed import pipelining

    name, virtual, vee = SCHEDULES[kind]
    rank, stages = dist.get_rank(), ranks * virtual
    mine = [rank, stages - 1 - rank] if vee else [rank + ranks * i for i in range(virtual)]
    made = [pipelining.PipelineStage(Stage(i == 0), i, stages, torch.device("cpu")) for i in mine]
    kind_of = getattr(pipelining.schedules, name)
    run = kind_of(made if virtual > 1 else made[0], m, loss_fn=lambda y, _: y.square().sum())
    x, target = torch.zeros(m, *SHAPE[1:]), torch.zeros(m, 1)
    first, last = 0 in mine, stages - 1 in mine
    given = (x,) if first else ()
    return lambda: void(run.step(*given, **({"target": target} if last else {})))


def in_groups(ranks: int, m: int, most: int) -> Callable[[], None]:
    """torch's GPipe, which holds all its microbatches, on `most` at a time."""
    sizes = [most] * (m // most) + [m % most] * (m % most > 0)
    steps = {size: theirs("gpipe", ranks, size) for size in sizes}

    def run() -> None:
        for size in sizes:
            steps[size]()

    return run


def void(_: object) -> None:
    """Nothing of it is wanted."""


@dataclass(frozen=True)
class Match:
    """Ours, and torch's beside it: a kind, or how many microbatches its GPipe takes at a time."""

    name: str
    made: Schedule
    kind: str = ""
    most: int = 0

    @property
    def share(self) -> float:
        """Slots that F, I or W of a rank's whole share take."""
        return float(self.made.virtual_stages)

    @property
    def held(self) -> float:
        """The most shares of activations on a rank of ours."""
        return max(peak_share(self.made))

    def theirs(self) -> Callable[[], None]:
        """torch's step."""
        p, m = self.made.num_ranks, self.made.num_microbatches
        return theirs(self.kind, p, m) if self.kind else in_groups(p, m, self.most)


def matches(p: int, m: int) -> list[Match]:
    """All that run: the same schedule on both sides, and ours of less memory, each where it exists."""

    def made(name: str, virtual: int, **options: object) -> Schedule:
        return schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=virtual, **options)

    found = [Match(kind, made(own, SCHEDULES[kind][1]), kind) for kind, own in OURS.items()]
    low = [(name, made(name, 2)) for name in ("v_half", "v_min")]
    limits = sorted({max(1.0, share * p) for share in SHARES})
    low += [(f"auto {limit:g}", made("auto", STAGES, limit=limit)) for limit in limits]
    return found + [Match(name, s, most=math.floor(max(peak_share(s)) + 1e-9)) for name, s in low]


Runs = list[tuple[float, float]]  # start and end of each on one rank


def rank_of(rank: int, writer: Any, folder: str, work: list[Match]) -> None:
    """One of the processes: runs of ours and of torch's for each match."""
    torch.set_num_threads(1)
    rows: list[tuple[Runs, Runs]] = []
    for number, match in enumerate(work):  # groups have threads: each match its own
        world = TorchWorld(rank, match.made.num_ranks, Path(folder) / f"world{number}")
        steps, found = (ours(world, match.made), match.theirs()), ([], [])
        for run in range(RUNS + 1):
            for times, step in zip(found, steps, strict=True):
                dist.barrier()
                start = time.perf_counter()
                step()
                if run:  # torch's first asks for shapes
                    times.append((start, time.perf_counter()))
        rows.append(found)
        world.close()
    writer.send(rows)


def slots(runs: list[list[tuple[float, float]]]) -> float:
    """The least makespan over all ranks, of each rank's runs."""
    each = zip(*runs, strict=True)
    return min(max(e for _, e in one) - min(s for s, _ in one) for one in each) / SLOT_S


def main(ranks: int) -> None:
    """Prints the tables."""
    m = 2 * ranks
    work = matches(ranks, m)
    with tempfile.TemporaryDirectory() as folder:
        started = start_ranks(ranks, rank_of, (folder, work), ["torch"])
        found = [reader.recv() for _, reader in started]
        for process, _ in started:
            process.join(10)
    print(f"{ranks} ranks, {m} microbatches: slots of {1e3 * SLOT_S:g} ms")
    best: dict[str, list[tuple[float, float, str]]] = {"ours": [], "theirs": []}
    rows = []
    for match, each in zip(work, zip(*found, strict=True), strict=True):
        share = match.share
        want = makespan(clock(match.made, Costs.equal(match.made, share, share, share)))
        own, other = (slots([rank[side] for rank in each]) for side in (0, 1))
        best["ours"].append((match.held, own / share, match.name))
        peer = match.kind or f"gpipe, {match.most} at a time"
        other *= 1.0 if match.kind else share  # one stage a rank there: in slots of ours
        best["theirs"].append((match.held if match.kind else match.most, other / share, peer))
        rows.append(
            (match.name, peer, f"{match.held:.2f}", want, f"{own:.1f}", f"{other:.1f}",
             f"{own / want:.3f}", f"{own / other:.3f}")
        )  # fmt: skip
    print(table(rows, ("ours", "torch's", "held", "clock", "ours", "torch's", "ours / clock",
                       "ours / torch's")))  # fmt: skip
    print(f"the best where a rank holds at most so many shares; a rank's work is {3 * m}")
    rows = []
    for limit in sorted({held for side in best.values() for held, _, _ in side}):
        sides = [[(t, name) for h, t, name in side if h <= limit] for side in best.values()]
        if all(sides):
            (a, name), (b, peer) = map(min, sides)
            rows.append(
                (
                    f"{limit:.2f}",
                    name,
                    peer,
                    f"{a:.1f}",
                    f"{b:.1f}",
                    f"{a / b:.3f}",
                    f"{3 * m / b:.3f}",
                )
            )
    print(table(rows, ("held", "ours", "torch's", "ours", "torch's", "ratio", "work / torch's")))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)

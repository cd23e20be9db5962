"""`python -m benchmarks.clocked [RANKS]`: our schedules and torch's on stages whose compute is a sleep.

Every F, I and W of a stage sleeps SLOT_S, messages and all else are real: gloo between processes, ours and
torch.distributed.pipelining's in the same ones, in turn. Prints the least makespan of RUNS each, in slots, by
the clock's, and what the best of each side takes where a rank may hold so many shares of activations.
"""

from __future__ import annotations

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
OURS = {"gpipe": "gpipe", "1f1b": "1f1b", "interleaved": "interleaved_1f1b", "zero bubble": "interleaved_zb",
        "zbv": "zb_v", "dualpipev": "dualpipev"}  # fmt: skip
LOW = {
    "v_half": 3,
    "v_min": 2,
}  # that hold less than any of torch's: they run so many microbatches at a time


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
class Row:
    """One schedule's spans on a rank: (start, end) of each run, ours and torch's."""

    name: str
    ours: list[tuple[float, float]]
    theirs: list[tuple[float, float]]


def rank_of(rank: int, writer: Any, folder: str, ranks: int, m: int) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    world = TorchWorld(rank, ranks, Path(folder) / "world")
    rows = []
    for name in (*OURS, *LOW):
        steps = [ours(world, made_of(name, ranks, m))]
        other = theirs(name, ranks, m) if name in OURS else in_groups(ranks, m, LOW[name])
        steps.append(other)
        found: list[list[tuple[float, float]]] = [[], []]
        for run in range(RUNS + 1):
            for times, step in zip(found, steps, strict=False):
                dist.barrier()
                start = time.perf_counter()
                step()
                if run:  # torch's first asks for shapes
                    times.append((start, time.perf_counter()))
        rows.append(Row(name, *found))
    writer.send(rows)
    world.close()


def made_of(name: str, ranks: int, m: int) -> Schedule:
    """Our schedule of that name; two stages a rank where torch's has."""
    own = OURS.get(name, name)
    virtual = SCHEDULES[name][1] if name in SCHEDULES else 2
    return schedule(own, num_ranks=ranks, num_microbatches=m, virtual_stages=virtual)


def slots(runs: list[list[tuple[float, float]]]) -> float:
    """The least makespan over all ranks, of each rank's runs."""
    each = zip(*runs, strict=True)
    return min(max(e for _, e in one) - min(s for s, _ in one) for one in each) / SLOT_S


def main(ranks: int) -> None:
    """Prints the tables."""
    m = 2 * ranks
    with tempfile.TemporaryDirectory() as folder:
        started = start_ranks(ranks, rank_of, (folder, ranks, m), ["torch"])
        found = [reader.recv() for _, reader in started]
        for process, _ in started:
            process.join(10)
    print(f"{ranks} ranks, {m} microbatches: slots of {1e3 * SLOT_S:g} ms")
    print("schedule       clock   ours  torch's  ours / torch's   held")
    best: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for rows in zip(*found, strict=True):
        made = made_of(rows[0].name, ranks, m)
        share = float(made.virtual_stages)
        want, held = (
            makespan(clock(made, Costs.equal(made, share, share, share))),
            max(peak_share(made)),
        )
        own = slots([r.ours for r in rows])
        best["ours"].append((held, own / share))
        groups, other = LOW.get(rows[0].name), slots([r.theirs for r in rows])
        other *= share if groups else 1.0  # one stage a rank there: in slots of ours
        best["theirs"].append((groups or held, other / share))
        line = f"{rows[0].name:<13}{want:7.1f}{own:7.1f}{other:9.1f}{own / other:16.3f}{held:7.2f}"
        print(line + (f"   beside gpipe, {groups} microbatches at a time" if groups else ""))
    print("held at most   ours   torch's    ratio   (F, I and W of a whole share take 3)")
    for limit in sorted({h for side in best.values() for h, _ in side}):
        least = [
            min((t for h, t in side if h <= limit), default=float("nan")) for side in best.values()
        ]
        print(f"{limit:<13.2f}{least[0]:7.1f}{least[1]:9.1f}{least[0] / least[1]:10.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)

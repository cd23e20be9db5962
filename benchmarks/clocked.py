"""`python -m benchmarks.clocked [RANKS] [--rows ...]`: every schedule on stages whose compute is a sleep.

Every F, I and W of a stage sleeps SLOT_S, messages and all else are real: gloo between processes, ours and
torch.distributed.pipelining's (where it has the schedule) in the same ones, in turn. Prints the least
makespan of RUNS each, in slots, by the clock's, and what the best of each side takes where a rank may hold so
many shares of activations: of ours `auto`'s too, on up to four stages a rank; of torch's, where none of its
lists fits, GPipe on as many microbatches at a time as do. Beside it what nothing undercuts: a rank's work.
What a rank of ours does is held to its list, action by action. A sleep that Linux rounds up by 50 us, its
timers' slack, would be no slot of the stated length: the slack is a nanosecond here, for both sides.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.peers import SCHEDULES
from partita.base.text import table
from partita.comm.distributed.torch import TorchWorld
from partita.comm.processes import start_ranks
from partita.comm.protocol import Where
from partita.parallel.deferred import WeightQueue
from partita.parallel.pp.executor import Channel, Executor
from partita.parallel.pp.rules import lane
from partita.schedule.clock import Costs, clock, makespan, peak_share
from partita.schedule.ir import Action, Schedule
from partita.schedule.make import FAMILY, GENERATORS, schedule

SHAPE, SLOT_S, RUNS = (1, 64), 0.02, 3
SET_TIMER_SLACK = 29  # of prctl, in nanoseconds, of this thread
STAGES = 4  # of a rank, at most, that auto may make
SHARES = (1 / 2, 3 / 4, 1)  # of 1F1B's activations, which auto is held to
OURS = {"gpipe": "gpipe", "1f1b": "1f1b", "interleaved": "interleaved_1f1b", "zero bubble": "interleaved_zb",
        "zbv": "zb_v", "dualpipev": "dualpipev"}  # fmt: skip
LOW = "v_half", "v_min"  # of less memory than any list of torch's
ALONE = tuple(n for n in (*GENERATORS, "v_2_3") if n not in (*OURS.values(), *LOW, "auto"))


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
    """A step of our executor, which must do what the rank's list says."""
    queue = WeightQueue()

    def module(stage: int) -> Any:
        def run(x: torch.Tensor | None, batch: object) -> torch.Tensor:
            x = torch.zeros(SHAPE, requires_grad=True) if x is None else x
            y: torch.Tensor = Deferred.apply(x, queue)  # type: ignore[assignment]
            return y.sum() if stage == made.num_stages - 1 else y

        return run

    lanes = {}  # a group has threads: one a lane, as a run's context makes them
    for what, stage in itertools.product("FB", range(made.num_stages)):
        name = lane(what, stage, made)
        if name not in lanes:
            lanes[name] = world.make(range(world.size), axis="pp", lane=name)
    channels = {
        (what, stage): Channel(lanes[lane(what, stage, made)], f"{stage}:send")
        for what, stage in itertools.product("FB", range(made.num_stages))
    }
    done: list[Action] = []

    @contextmanager
    def noted(action: Action) -> Iterator[None]:
        done.append(action)
        yield

    executor = Executor(
        {s: module(s) for s in made.stages_of(world.rank)}, made, world.rank, channels, Where(),
        lambda *_: torch.empty(SHAPE), queue, span=noted, update=void,
    )  # fmt: skip

    def step() -> None:
        done.clear()
        executor.run([None] * made.num_microbatches)
        assert done == list(made.ranks[world.rank])

    return step


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
    """Ours, and torch's beside it: a kind, or how many microbatches its GPipe takes at a time; or nothing."""

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

    @property
    def clock(self) -> float:
        """Slots that it takes by the clock."""
        return makespan(clock(self.made, Costs.equal(self.made, *(self.share,) * 3)))

    @property
    def peer(self) -> str:
        """What torch runs beside it."""
        return self.kind or (f"gpipe, {self.most} at a time" if self.most else "")

    def theirs(self) -> Callable[[], None] | None:
        """torch's step."""
        p, m = self.made.num_ranks, self.made.num_microbatches
        if self.kind:
            return theirs(self.kind, p, m)
        return in_groups(p, m, self.most) if self.most else None


def matches(p: int, m: int, rows: list[str]) -> list[Match]:
    """All of `rows` that run: the same schedule on both sides, ours of less memory, and ours alone."""

    def made(name: str, virtual: int = 1, **options: object) -> Schedule:
        return schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=virtual, **options)

    makers = {}
    for kind, own in OURS.items():
        virtual = SCHEDULES[kind][1]
        makers[own] = lambda own=own, virtual=virtual: made(own, virtual)
    for name in (*LOW, *ALONE):
        makers[name] = lambda name=name: made(
            name, 2 if GENERATORS.get(name, FAMILY).stages is None else 1
        )
    for limit in sorted({max(1.0, share * p) for share in SHARES}):
        makers[f"auto {limit:g}"] = lambda limit=limit: made("auto", STAGES, limit=limit)
    kinds = {own: kind for kind, own in OURS.items()}
    found = []
    for name, make in makers.items():
        if not rows or name.split()[0] in rows:
            s = make()
            fit = math.floor(max(peak_share(s)) + 1e-9)
            low = fit if name in LOW or name.startswith("auto") else 0
            found.append(Match(name, s, kinds.get(name, ""), low))
    return found


Runs = list[tuple[float, float]]  # start and end of each on one rank


def rank_of(rank: int, writer: Any, folder: str, work: list[Match]) -> None:
    """One of the processes: runs of ours and of torch's for each match."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_TIMER_SLACK, 1, 0, 0, 0)
    for number, match in enumerate(work):  # groups have threads: each match its own
        world = TorchWorld(rank, match.made.num_ranks, Path(folder) / f"world{number}")
        steps, found = (ours(world, match.made), match.theirs()), ([], [])
        for run in range(RUNS + 1):
            for times, step in zip(found, steps, strict=True):
                if step is not None:
                    dist.barrier()
                    start = time.perf_counter()
                    step()
                    if run:  # torch's first asks for shapes
                        times.append((start, time.perf_counter()))
        writer.send((found, threads()))
        world.close()


def threads() -> int:
    """Threads of this process."""
    return len(list(Path("/proc/self/task").iterdir()))


def slots(runs: list[Runs]) -> float:
    """The least makespan over all ranks, of each rank's runs."""
    each = zip(*runs, strict=True)
    return min(max(e for _, e in one) - min(s for s, _ in one) for one in each) / SLOT_S


def measured(ranks: int, work: list[Match]) -> list[tuple[float, float]]:
    """Slots of ours and of torch's (infinite where it has none) for each match."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        started = start_ranks(ranks, rank_of, (folder, work), ["torch"])
        for match in work:
            each = [reader.recv() for _, reader in started]
            runs = [[rank[side] for rank, _ in each] for side in (0, 1)]
            found.append((slots(runs[0]), slots(runs[1]) if runs[1][0] else math.inf))
            took, most = "{:.1f} and {:.1f}".format(*found[-1]), max(n for _, n in each)
            print(
                f"{match.name}: {took} slots, {most} threads a process", file=sys.stderr, flush=True
            )
        for process, _ in started:
            process.join(10)
    return found


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ranks", nargs="?", type=int, default=4)
    parser.add_argument("--rows", nargs="+", default=[], help="schedules, by name")
    asked = parser.parse_args()
    m = 2 * asked.ranks
    work = matches(asked.ranks, m, asked.rows)
    found = measured(asked.ranks, work)
    print(f"{asked.ranks} ranks, {m} microbatches: slots of {1e3 * SLOT_S:g} ms")
    header = "ours", "torch's", "held", "clock", "ours", "torch's", "ours / clock", "ours / torch's"
    print(table([cells(*row) for row in zip(work, found, strict=True)], header))
    print(f"the best where a rank holds at most so many shares; a rank's work is {3 * m}")
    header = "held", "ours", "torch's", "ours", "torch's", "ratio", "work / torch's"
    print(table(best(work, found, 3 * m), header))


def cells(match: Match, took: tuple[float, float]) -> list[str]:
    """A row of the first table; torch's GPipe in groups has one stage a rank: in slots of ours."""
    own, other = took[0], took[1] * (1.0 if match.kind else match.share)
    words = [match.name, match.peer, f"{match.held:.2f}", f"{match.clock:g}", f"{own:.1f}"]
    beside = [f"{other:.1f}" if match.peer else ""]
    ratios = [f"{own / match.clock:.3f}", f"{own / other:.3f}" if match.peer else ""]
    return words + beside + ratios


def best(work: list[Match], found: list[tuple[float, float]], least: int) -> list[list[str]]:
    """Rows of the second table: synchronous schedules of one copy of the weights, in whole shares."""
    sides: list[list[tuple[float, float, str]]] = [[], []]
    for match, (own, other) in zip(work, found, strict=True):
        s = match.made
        if not (s.is_asynchronous or s.is_bidirectional or s.is_forward_only):
            sides[0].append((match.held, own / match.share, match.name))
        if match.peer:
            held = match.held if match.kind else match.most
            sides[1].append((held, other / (match.share if match.kind else 1.0), match.peer))
    rows = []
    for limit in sorted({held for side in sides for held, _, _ in side}):
        fit = [[(t, name) for h, t, name in side if h <= limit + 1e-9] for side in sides]
        if all(fit):
            (a, name), (b, peer) = map(min, fit)
            times = [f"{a:.1f}", f"{b:.1f}", f"{a / b:.3f}", f"{least / b:.3f}"]
            rows.append([f"{limit:.2f}", name, peer, *times])
    return rows


if __name__ == "__main__":
    main()

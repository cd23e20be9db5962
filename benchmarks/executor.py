"""`python -m benchmarks.executor`: what the executor costs an action, beside its compute.

Stages add one to a [1, 8] tensor. Without messages: one rank, F and B of 500 microbatches, less the same
calls in a plain loop, an action. With: two ranks of eight stages in turn (interleaved), so that nearly every
action has a receive and a send; the whole time an action. Prints the best of five runs, microseconds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from partita.comm.processes import start_ranks
from partita.comm.protocol import Where
from partita.comm.single import SingleWorld
from partita.parallel.pp.executor import Channel, Executor
from partita.parallel.pp.rules import lane
from partita.schedule.ir import COMPUTE, Schedule
from partita.schedule.make import schedule

SHAPE = (1, 8)
RUNS = 5


def module(last: bool):
    """x + 1; its sum on the last stage."""

    def run(x, batch):
        x = torch.zeros(SHAPE, requires_grad=True) if x is None else x
        return (x + 1).sum() if last else x + 1

    return run


def executor(world, made: Schedule) -> Executor:
    """One rank's executor of such stages."""
    channels = {}
    for what in "FB":
        for stage in range(made.num_stages):
            comm = world.make(range(world.size), axis="pp", lane=lane(what, stage, made))
            channels[what, stage] = Channel(comm, f"{stage}:send")
    return Executor(
        {s: module(s == made.num_stages - 1) for s in made.stages_of(world.rank)}, made, world.rank,
        channels, Where(), lambda stage, batch, what: torch.empty(SHAPE),
    )  # fmt: skip


def per_action(world, made: Schedule) -> float:
    """Seconds an action of this rank, the best of RUNS."""
    run, m = executor(world, made), made.num_microbatches
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run.run([None] * m)
        times.append(time.perf_counter() - start)
    return min(times) / sum(a.kind in COMPUTE for a in run.actions)


def bare(m: int) -> float:
    """The same forwards and backwards without an executor."""
    run, times = module(True), []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(m):
            torch.autograd.backward(run(None, None))
        times.append(time.perf_counter() - start)
    return min(times) / (2 * m)


def rank_of(rank: int, writer, folder: str, backend: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    if backend == "shm":
        from partita.comm.shm import ShmWorld

        world = ShmWorld(rank, 2, Path(folder) / "world")
    else:
        from partita.comm.torch import TorchWorld

        world = TorchWorld(rank, 2, Path(folder) / "world")
    made = schedule("interleaved_1f1b", num_ranks=2, num_microbatches=64, virtual_stages=8)
    writer.send(per_action(world, made))
    world.close()


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    made = schedule("1f1b", num_ranks=1, num_microbatches=500)
    plain, own = bare(500), per_action(SingleWorld(), made)
    print(
        f"no message        {1e6 * (own - plain):7.1f}   ({1e6 * own:.1f} less {1e6 * plain:.1f})"
    )
    for backend in ("shm", "gloo"):
        with tempfile.TemporaryDirectory() as folder:
            started = start_ranks(2, rank_of, (folder, backend), ["torch"])
            found = [reader.recv() for _, reader in started]
            for process, _ in started:
                process.join(10)
        print(f"receive and send  {1e6 * max(found):7.1f}   {backend}")


if __name__ == "__main__":
    main()

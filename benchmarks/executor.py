"""`python -m benchmarks.executor`: what the executor costs an action, beside its compute.

Stages add one to a [1, 8] tensor. Without messages: one rank, F and B of 500 microbatches, less the same
calls in a plain loop, an action. With: two ranks of eight stages in turn (interleaved), so that nearly every
action has a receive and a send; the whole time an action. Prints the best of five runs, microseconds.
`wired` are the same stages as plain modules (pp/modules.py), whose tensors go by wires; `bare`, of gloo, are
torch's own calls alone, the same messages in the same order, run in turn with the others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from partita.comm.distributed.torch_comm import TorchComm, tag_of
from partita.comm.processes import start_ranks
from partita.comm.protocol import Key, Where
from partita.comm.single import SingleWorld
from partita.parallel.pp.executor import Channel, Executor
from partita.parallel.pp.modules import PipelinedModules
from partita.parallel.pp.portals import Wire
from partita.parallel.pp.rules import lane
from partita.schedule.ir import Schedule
from partita.schedule.make import schedule
from partita.schedule.passes import receives_of

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


def per_action(world, made: Schedule, *runs: Callable[[list[None]], object]) -> list[float]:
    """Seconds an action of this rank, of each that is run in turn; the best of RUNS."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(RUNS):
        for run, found in zip(runs, times, strict=True):
            start = time.perf_counter()
            run([None] * made.num_microbatches)
            found.append(time.perf_counter() - start)
    return [min(found) / len(made.ranks[world.rank]) for found in times]


def messages(run: Executor) -> Callable[[list[None]], object]:
    """An executor's receives, waits and sends by torch's own calls, without anything else."""

    def bare(batches: list[None]) -> None:
        posted, sent = {}, []
        for action in run.actions:
            if not action.is_send and not action.is_receive:
                for needed in receives_of(run.schedule, action):
                    posted.pop(needed.key).wait()
                continue
            comm = run.channels[action.key[:2]].comm
            assert isinstance(comm, TorchComm)
            peer = run.schedule.rank_of(action.peer_stage, action.microbatch)
            if action.is_send:
                sent.append(comm.group.send([torch.zeros(SHAPE)], peer, tag_of(Key(*action.key))))
            else:
                tensor = torch.empty(SHAPE)
                posted[action.key] = comm.group.recv([tensor], peer, tag_of(Key(*action.key)))
        for work in sent:
            work.wait()

    return bare


def wired(world, made: Schedule) -> PipelinedModules:
    """The same stages as plain modules."""
    last = made.num_stages - 1

    def stage(s: int):
        add = module(s == last)
        return lambda batch, x=None: {"loss" if s == last else "x": add(x, batch)}

    wires = [Wire("x", s, s + 1) for s in range(last)]
    return PipelinedModules({s: stage(s) for s in made.stages_of(world.rank)}, wires, made, world)


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
        from partita.comm.shm.shm import ShmWorld

        world = ShmWorld(rank, 2, Path(folder) / "world")
    else:
        from partita.comm.distributed.torch import TorchWorld

        world = TorchWorld(rank, 2, Path(folder) / "world")
    made = schedule("interleaved_1f1b", num_ranks=2, num_microbatches=64, virtual_stages=8)
    run = executor(world, made)
    runs = [run.run, wired(world, made).run, *([messages(run)] if backend == "gloo" else [])]
    writer.send(per_action(world, made, *runs))
    world.close()


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    made = schedule("1f1b", num_ranks=1, num_microbatches=500)
    plain, own = bare(500), per_action(SingleWorld(), made, executor(SingleWorld(), made).run)[0]
    print(
        f"no message        {1e6 * (own - plain):7.1f}   ({1e6 * own:.1f} less {1e6 * plain:.1f})"
    )
    for backend in ("shm", "gloo"):
        with tempfile.TemporaryDirectory() as folder:
            started = start_ranks(2, rank_of, (folder, backend), ["torch"])
            found = [reader.recv() for _, reader in started]
            for process, _ in started:
                process.join(10)
        times = [f"{1e6 * max(each):7.1f}" for each in zip(*found, strict=True)]
        named = zip((backend, "wired", "bare"), times, strict=False)
        print("receive and send", *(f"  {name} {each}" for name, each in named))


if __name__ == "__main__":
    main()

"""The two sides of a pair, each in ranks of its own: one steps while the other's wait for a word.

What a side does to its process serves it alone, as whoever chose it would have it: our ranks keep their heap
as those that train do, the peer's have the C library's defaults. A rank that waits is blocked on a pipe. The
time of a step runs from the first rank's start to the last one's end; its processor time to the next word,
whatever a rank's threads do after the step or in the other side's turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from partita.comm.processes import end_ranks, start_ranks
from partita.comm.protocol import World
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.launch.heap import keep_freed_memory

STEP, CALL, OVER = "step", "call", "over"
Step = Callable[[], object]
Took = list[tuple[float, float]]
"""Wall and processor seconds of each step of a side, of all ranks."""


class Mark(NamedTuple):
    """What a rank's clocks showed around a step."""

    start: float
    end: float
    used: float
    """Processor seconds before it."""


def ours(job: Job, world: World) -> Step:
    """A step of ours, data read ahead as the peers' is."""
    built = assemble(job, world)
    built.context.recorder.active = False
    batch = built.batch(0)

    def step() -> None:
        built.model.forward_backward(batch)
        built.update.step()

    return step


class Side:
    """Ranks that make what `make(world, folder, item)` gives for each item of `work`, one after another, and
    step when told. Ours (`mine`) have a World of shared memory, a peer's torch's default group."""

    def __init__(
        self, ranks: int, folder: str, work: Sequence[Any], make: Callable[..., Any], mine: bool
    ) -> None:
        pipes = [get_context("forkserver").Pipe(duplex=False) for _ in range(ranks)]
        told = [reader for reader, _ in pipes]
        self._tell = [writer for _, writer in pipes]
        args = (told, folder, list(work), make, mine)
        self._started = start_ranks(ranks, rank_of, args, ["torch"])

    def say(self, word: str) -> None:
        """Tells all ranks."""
        for connection in self._tell:
            connection.send(word)

    def hear(self) -> list[Any]:
        """What each rank answers."""
        return [reader.recv() for _, reader in self._started]

    def step(self) -> None:
        """One step, to its end."""
        self.say(STEP)
        self.hear()

    def took(self, warm: int) -> Took:
        """Ends the item and returns what its steps took but for the first `warm`."""
        self.say(OVER)
        found: list[tuple[list[Mark], float]] = self.hear()
        marks = list(zip(*(marks for marks, _ in found), strict=True))
        used = [sum(mark.used for mark in each) for each in marks]
        used.append(sum(end for _, end in found))
        wall = [max(m.end for m in each) - min(m.start for m in each) for each in marks]
        cpu = [after - before for before, after in pairwise(used)]
        return list(zip(wall, cpu, strict=True))[warm:]

    def end(self) -> None:
        """Ends the processes."""
        end_ranks(self._started)


def in_turn(first: Side, second: Side, count: int, warm: int = 2) -> tuple[Took, Took]:
    """`count` steps of each in turn, the order swapped every time, after `warm` of each."""
    for i in range(count + warm):
        for side in (first, second) if i % 2 == 0 else (second, first):
            side.step()
    return first.took(warm), second.took(warm)


def rank_of(
    rank: int,
    writer: Connection,
    told: Sequence[Connection],
    folder: str,
    work: Sequence[Any],
    make: Callable[..., tuple[Step, Callable[[], Any]]],
    mine: bool,
) -> None:
    """A rank of a side: what `make` gives is the step, and what CALL asks for."""
    torch.set_num_threads(1)
    if mine:
        keep_freed_memory()
    elif len(told) > 1:
        import torch.distributed as dist

        store = dist.FileStore(f"{folder}/store", len(told))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=len(told))
    for number, item in enumerate(work):
        world = _world(rank, len(told), Path(f"{folder}/world{number}")) if mine else None
        step, call = make(world, folder, item)
        writer.send("ready")
        marks: list[Mark] = []
        while (word := told[rank].recv()) != OVER:
            if word == CALL:
                writer.send(call())
                continue
            used, start = time.process_time(), time.perf_counter()
            step()
            marks.append(Mark(start, time.perf_counter(), used))
            writer.send(word)
        writer.send((marks, time.process_time()))
        if world is not None:
            world.close()


def _world(rank: int, ranks: int, path: Path) -> World:
    from partita.comm.shm.shm import ShmWorld
    from partita.comm.single import SingleWorld

    return SingleWorld() if ranks == 1 else ShmWorld(rank, ranks, path)

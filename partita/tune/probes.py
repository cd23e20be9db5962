"""What one rank measures of its machine: products, memory, the optimizer, pieces of layers, collectives.

Ranks go through the same phases behind a barrier, so that it is known how many are busy at a time. Nothing
here knows a model or runs a training step. The median of the repetitions counts: other programs only ever
make a machine slower, and the median forgets a few of their moments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from partita.comm.protocol import Comm, Where, World
from partita.cost.pieces import CROWDED
from partita.train.launch.calls import COLLECTIVES, Calls
from partita.train.launch.heap import keep_freed_memory
from partita.train.launch.timing import matmul_flops, median_seconds
from partita.tune.crowd import Layers
from partita.tune.pieces import SHAPES, Made, measure_pieces
from partita.tune.turns import touch

# rows, inner, columns: a microbatch's tokens against the weights of small and middling blocks
MATMUL_SIZES = (
    (256, 192, 192),
    (256, 192, 512),
    (512, 512, 512),
    (512, 512, 1408),
    (768, 1024, 1024),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEMORY_ELEMENTS = 8_000_000  # fp32: 32 MB, beyond the caches of a core
OPTIMIZER_ELEMENTS = 2_000_000
COMM_BYTES = (1 << 10, 1 << 16, 1 << 20, 1 << 22)
COMM_CALLS = 9
COMM_AWAY = 4_000_000  # bytes touched between two: a layer's
ADAMW_BYTES = 28  # an element: parameter, both moments read and written, gradient read, in fp32


@dataclass(frozen=True)
class Call:
    """A measured collective: `seconds` of one call over `ranks` ranks, `bytes` handed in."""

    backend: str
    op: str
    ranks: int
    bytes: int
    seconds: float


@dataclass
class Found:
    """What one rank found; rates are per second."""

    rank: int
    busy_flops: dict[int, float] = field(default_factory=dict)  # ranks busy -> FLOP/s of this one
    matmul: dict[str, dict[str, float]] = field(default_factory=dict)  # dtype -> size -> FLOP/s
    memory_bytes_per_s: float = 0.0
    optimizer_bytes_per_s: float = 0.0
    calls: list[Call] = field(default_factory=list)
    pieces: dict[str, Made] = field(default_factory=dict)  # dtype -> piece -> size -> seconds
    crowded: dict[int, float] = field(default_factory=dict)  # ranks busy -> layers a second


@dataclass(frozen=True)
class Setup:
    """What every rank is given. `busy` are the numbers of busy ranks to try, `units` how many compute
    in the other phases; `scratch` is a folder for the rendezvous, `shapes` are those of the layers."""

    num_ranks: int
    units: int
    busy: tuple[int, ...]
    groups: tuple[int, ...]
    backends: tuple[str, ...]
    scratch: Path
    seconds_each: float = 0.15
    shapes: tuple[tuple[int, int, int, int], ...] = SHAPES


def probe(rank: int, connection: Connection, setup: Setup, barrier: Any) -> None:
    """Runs all phases of one rank; sends the name of each as it begins, then what it found.

    Ends with an exception where a peer is lost: `barrier` breaks for all.
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as ranks that train
    found = Found(rank)
    for name, phase in _phases(found, setup):
        barrier.wait()
        connection.send(name)
        phase()
    barrier.wait()
    connection.send(found)


def phase_names(setup: Setup) -> list[str]:
    """The phases in order, for a progress bar."""
    return [name for name, _ in _phases(Found(0), setup)]


def _phases(found: Found, setup: Setup) -> Iterator[tuple[str, Callable[[], None]]]:
    for n in setup.busy:
        yield f"{n} busy", lambda n=n: _busy(found, setup, n)
    made: list[Layers] = []
    yield "layers", lambda: made.append(Layers(_meetings(found.rank, setup)))
    for again in ("", " again"):
        for n in setup.busy:
            yield f"layers of {n}{again}", lambda n=n: _crowded(found, setup, n, made[0])
    for dtype in DTYPES:
        yield f"matmul {dtype}", lambda d=dtype: _matmuls(found, setup, d)
    yield "memory and optimizer", lambda: _memory(found, setup)
    for dtype in DTYPES:
        yield f"pieces of layers {dtype}", lambda d=dtype: _pieces(found, setup, d)
    for backend in setup.backends:
        yield f"collectives over {backend}", lambda b=backend: _collectives(found, setup, b)


def _busy(found: Found, setup: Setup, busy: int) -> None:
    """Work done over time passed, since ranks that share a core take turns."""
    if found.rank >= busy:
        return
    x, done = torch.ones(256, 256), 0
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < 3 * setup.seconds_each:
        x @ x
        done += 1
    rate = 2 * 256**3 * done / passed
    found.busy_flops[busy] = rate


def _meetings(rank: int, setup: Setup) -> dict[int, Comm]:
    """Where ranks that outnumber the units meet, by how many they are; they end with the processes."""
    many = [n for n in setup.busy if n > setup.units]
    if not many:
        return {}
    folder = setup.scratch / "meetings"
    folder.mkdir(exist_ok=True)
    world = make_world(setup.backends[0], rank, setup.num_ranks, folder)
    made = {n: world.make(range(n), axis=f"{n} that meet", lane="compute") for n in many}
    return {n: comm for n, comm in made.items() if comm is not None}


def _crowded(found: Found, setup: Setup, busy: int, layers: Layers) -> None:
    """As `_busy`, of layers, whose weights and activations are more than a core's caches; the better of two
    rounds, since other programs only take away."""
    if found.rank < busy:
        rate = layers.a_second(4 * setup.seconds_each, busy)
        found.crowded[busy] = max(rate, found.crowded.get(busy, 0.0))


def _matmuls(found: Found, setup: Setup, dtype: str) -> None:
    if found.rank < setup.units:
        found.matmul[dtype] = {
            f"{rows}x{inner}x{columns}": matmul_flops(
                rows, inner, columns, DTYPES[dtype], setup.seconds_each
            )
            for rows, inner, columns in MATMUL_SIZES
        }


def _memory(found: Found, setup: Setup) -> None:
    if found.rank >= setup.units:
        return
    x, y = torch.ones(MEMORY_ELEMENTS), torch.empty(MEMORY_ELEMENTS)
    seconds = median_seconds(lambda: torch.add(x, 1.0, out=y), 4 * setup.seconds_each)
    found.memory_bytes_per_s = 2 * x.nbytes / seconds
    weight = torch.ones(OPTIMIZER_ELEMENTS, requires_grad=True)
    weight.grad = torch.ones(OPTIMIZER_ELEMENTS)
    optimizer = torch.optim.AdamW([weight], fused=True)
    seconds = median_seconds(optimizer.step, 2 * setup.seconds_each)
    found.optimizer_bytes_per_s = ADAMW_BYTES * OPTIMIZER_ELEMENTS / seconds


def _pieces(found: Found, setup: Setup, dtype: str) -> None:
    if found.rank < setup.units:
        found.pieces[dtype] = measure_pieces(dtype, setup.seconds_each / 20, setup.shapes)


def make_world(backend: str, rank: int, num_ranks: int, scratch: Path) -> World:
    """The world of a backend that trains between CPU ranks of one host: 'shm' or 'gloo'."""
    path, where = scratch / f"rendezvous-{backend}", Where(activity="calibration")
    if backend == "shm":
        from partita.comm.shm.shm import ShmWorld

        return ShmWorld(rank, num_ranks, path, timeout_s=20.0, where=where)
    from partita.comm.distributed.torch import TorchWorld

    return TorchWorld(rank, num_ranks, path, timeout_s=20.0, where=where)


def _collectives(found: Found, setup: Setup, backend: str) -> None:
    """Over the first ranks; and over groups side by side that together outnumber the units, as in a plan
    that cuts two dimensions (CROWDED)."""
    world = make_world(backend, found.rank, setup.num_ranks, setup.scratch)
    try:
        for n in setup.groups:
            comm = world.make(range(n), axis=f"group of {n}", lane="compute")
            if comm is not None:
                turns = max(n / setup.units, 1.0)
                found.calls += _timed_all(comm, backend, turns)
        crowds = [n for n in setup.groups if n <= setup.units < setup.num_ranks]
        for n in crowds if backend == setup.backends[0] else ():
            starts = range(0, setup.num_ranks - n + 1, n)
            each = [
                world.make(range(i, i + n), axis=f"groups of {n}", lane="compute") for i in starts
            ]
            found.calls += [
                replace(call, op=call.op + CROWDED)
                for comm in each
                if comm is not None
                for call in _timed_all(comm, backend, 1.0, takes_turns=True)
            ]
    finally:
        world.close()


def _timed_all(comm: Comm, backend: str, turns: float, takes_turns: bool = False) -> list[Call]:
    """Every collective by size, the largest first: it has all memory between ranks touched, as after the
    first steps of a run. `turns`: how many ranks of the group share a unit; `takes_turns` with ranks of
    other groups."""
    idle = turns == 1.0 and not takes_turns
    found = []
    for size in reversed(COMM_BYTES):
        for op in COLLECTIVES:
            seconds = turns * _timed(
                comm, op, size, time.perf_counter if idle else time.process_time
            )
            found.append(Call(backend, op, comm.size, size, seconds))
    return found


def _timed(comm: Comm, op: str, size: int, clock: Callable[[], float]) -> float:
    """Median of calls, each after other memory was touched, as between two of a step: in a row they would
    find what they copy in the caches. Two barriers: who slept at the first is awake at the second. Of ranks
    that outnumber the units each takes so much of a processor: while it waits, others compute."""
    x, away = torch.ones(size // 4), torch.zeros(COMM_AWAY // 4)
    run = getattr(Calls(comm, x, "calibrate"), op)
    times: list[float] = []
    for i in range(1 + COMM_CALLS):
        touch(away, x)
        for _ in range(2):
            comm.barrier(site="calibrate:barrier")
        start = clock()
        run(i)
        times.append(clock() - start)
    return median(times[1:]) / (2 if op == "send" else 1)

"""`python -m benchmarks.comm_shm [--pairs 15] [--json]`: shared memory against torch.distributed's gloo.

Two processes of one thread hold both worlds and run them in turn (A B, B A, ...). A measurement is a number
of calls between two meetings; a message goes there and back, and half of that is its time. gloo is
called directly, in place and on tensors made beforehand, which is the least it can cost; ours returns a
new tensor each time, but where the row says in place. The ratio is the median of the pairs' ratios
(below 1: shared memory is faster), with a 95 % bootstrap interval. `copies` is ours over the time of one
memory copy of the same bytes, made by both ranks at once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.run import interval
from partita.base.text import table
from partita.base.units import format_bytes
from partita.comm.processes import start_ranks
from partita.comm.protocol import Comm, Key

KB, MB = 1 << 10, 1 << 20
ROWS = (
    *(("all_reduce", size) for size in (4 * KB, 256 * KB, 4 * MB, 16 * MB)),
    *(("all_reduce in place", size) for size in (256 * KB, 4 * MB, 16 * MB)),
    *(("send", size) for size in (32 * KB, 1 * MB, 4 * MB, 16 * MB)),
    *(("all_gather", size) for size in (256 * KB, 4 * MB)),
    *(("reduce_scatter", size) for size in (256 * KB, 4 * MB)),
)
GOALS = {
    ("all_reduce", 4 * MB): 0.4, ("all_reduce in place", 4 * MB): 0.2,
    **{("reduce_scatter", size): 0.25 for size in (256 * KB, 4 * MB)},
    **{("send", size * MB): 0.6 for size in (1, 4, 16)},
}  # fmt: skip
Call = Callable[[], object]


def ours(comm: Comm, name: str, x: Tensor) -> Call:
    """One call through shared memory."""

    def message() -> None:
        """There and back."""
        key = Key("F", 0, 0)
        if comm.rank == 0:
            comm.send(x, 1, key=key, site="bench").wait()
            comm.receive(x, 1, key=key, site="bench").wait()
        else:
            came = comm.receive(x, 0, key=key, site="bench").wait()
            comm.send(came, 0, key=key, site="bench").wait()

    def collective() -> None:
        getattr(comm, name)(x, site="bench")

    def in_place() -> None:
        comm.start_all_reduce(x, site="bench", out=x).wait()

    return {"send": message, "all_reduce in place": in_place}.get(name, collective)


def gloo(rank: int, name: str, x: Tensor) -> Call:
    """The same call through torch.distributed."""
    y = torch.zeros_like(x)
    halves = [torch.empty_like(h) for h in x.chunk(2)]
    both = [torch.empty_like(x), torch.empty_like(x)]
    mine = torch.empty_like(halves[0])

    def message() -> None:
        """There and back, by the pair that torch offers at its fastest: irecv and isend."""
        if rank == 0:
            dist.isend(x, 1).wait()
            dist.irecv(y, 1).wait()
        else:
            dist.irecv(y, 0).wait()
            dist.isend(y, 0).wait()

    return {
        "send": message,
        "all_reduce": lambda: dist.all_reduce(y),
        "all_reduce in place": lambda: dist.all_reduce(y),
        "all_gather": lambda: dist.all_gather(both, x),
        "reduce_scatter": lambda: dist.reduce_scatter(mine, list(x.chunk(2))),
    }[name]


def copy(x: Tensor) -> Call:
    """The bound: one copy of the bytes."""
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def seconds(call: Call, repeats: int) -> float:
    """Of one call; both ranks start together."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def rank_of(rank: int, writer: Connection, folder: str, pairs: int) -> None:
    """One process: every row, in the same order on both."""
    torch.set_num_threads(1)
    from partita.comm.shm.shm import ShmWorld

    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    world = ShmWorld(rank, 2, Path(folder) / "world")
    comm = world.make((0, 1), axis="tp", lane="tp")
    assert comm is not None
    for name, size in ROWS:
        x = torch.ones(size // 4)
        calls = (ours(comm, name, x), gloo(rank, name, x), copy(x))
        repeats = max(4, min(100, 8 * MB // size))
        times: tuple[list[float], ...] = ([], [], [])
        for i in range(pairs + 2):
            order = (0, 1, 2) if i % 2 else (1, 0, 2)
            for which in order:
                spent = seconds(calls[which], repeats)
                spent /= 2 if name == "send" and which < 2 else 1
                if i >= 2:  # the first two warm caches and allocators
                    times[which].append(spent)
        writer.send((name, size, *times))
    world.close()
    writer.send(None)
    dist.destroy_process_group()


def measure(pairs: int) -> list[dict[str, object]]:
    """A fact a row."""
    facts: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        started = start_ranks(2, rank_of, (folder, pairs), ["torch", "torch.distributed"])
        while (found := started[0][1].recv()) is not None:
            name, size, mine, theirs, bound = found
            ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
            low, high = interval(ratios)
            ours_s, gloo_s, copy_s = map(statistics.median, (mine, theirs, bound))
            goal = GOALS.get((name, size))
            facts.append(
                {
                    "op": name,
                    "bytes": size,
                    "pairs": len(ratios),
                    "ours_s": ours_s,
                    "gloo_s": gloo_s,
                }
                | {"copy_s": copy_s, "ratio": statistics.median(ratios), "interval": [low, high]}
                | {"goal": goal, "met": None if goal is None else low <= goal}
            )
        for process, _ in started:
            process.join(10)
            process.kill()
    return facts


def main() -> None:
    """Runs the rows and prints them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    facts = measure(asked.pairs)
    if asked.json:
        print(json.dumps({"format": 1, "rows": facts}))
        return
    rows = [
        [
            *(f["op"], format_bytes(f["bytes"])),
            *(f"{1e6 * f[k]:.0f}" for k in ("ours_s", "gloo_s")),
            *(f"{f['ratio']:.2f}", "-".join(f"{x:.2f}" for x in f["interval"])),
            f"{f['ours_s'] / f['copy_s']:.1f}",
            *(("", "") if f["goal"] is None else (f["goal"], "yes" if f["met"] else "no")),
        ]
        for f in facts
    ]
    header = ["op", "handed in", "ours us", "gloo us", "ratio", "95 %", "copies", "goal", "met"]
    print(table(rows, header))


if __name__ == "__main__":
    main()

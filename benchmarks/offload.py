"""`python -m benchmarks.offload [--layers 12] [--rounds 5] [--builds 7] [--folder DIR] [--json]`: the update
from files.

Three things in turn, in one process, the order turned round each time:

    adamw    torch's fused AdamW over one flat fp32 tensor of as many elements, in memory
    disk     the same files read and written by threads past the page cache (O_DIRECT), and nothing else
    update   the update of `offload:nvme`: gradients, masters and moments read, updated, written

The share is max(adamw, disk) / update of one turn: 1 is an update that costs no more than the slower of the
two alone. All is built anew several times, in files and memory of its own, since a build's place in them
decides what it gets: the figure is the median over builds of the median of their turns, with a 95 % bootstrap
interval. Goal: 0.7, met when the interval reaches it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.run import interval
from partita.comm.protocol import Where
from partita.comm.recording import Recorder
from partita.comm.single import SingleWorld
from partita.parallel.offload.cpu import HostArena
from partita.parallel.offload.nvme import Buffer, DiskStream
from partita.spec.job import Job
from partita.train.build import Built, assemble

GOAL = 0.7
BLOCK_ELEMENTS = 1 << 20  # of the raw reads and writes: 4 MiB
THREADS = 4


def build(folder: Path, layers: int) -> Built:
    """A rank whose states lie in `folder`: 3.1 M parameters a layer."""
    np.save(folder / "tokens.npy", np.arange(4096) % 256)
    job = Job.load(
        {
            "name": "offload",
            "plan": "1mb bf16 offload:nvme",
            "model": {
                "family": "llama", "layers": layers, "hidden": 512, "heads": 8, "ffn_hidden": 1344,
                "vocab": 256, "max_seq_len": 64,
            },
            "cluster": {"preset": "laptop", "memory_bytes": 10**11},
            "data": {"source": f"tokens:{folder / 'tokens.npy'}"},
            "train": {"steps": 2, "global_batch_size": 1, "seq_len": 64},
        }
    )  # fmt: skip
    job = replace(job, cluster=replace(job.cluster, disk_folder=str(folder)))
    return assemble(job, SingleWorld(), recorder=Recorder(active=False))


def adamw(elements: int) -> Callable[[], object]:
    """torch's update of so many elements in memory."""
    param = torch.zeros(elements)
    param.grad = torch.full_like(param, 1e-3)
    optimizer = torch.optim.AdamW([param], lr=1e-3, fused=True)
    optimizer.step()
    return optimizer.step


def disk(stream: DiskStream) -> Callable[[], object]:
    """Reads 16 and writes 12 bytes an element where the update does, a thread a block."""
    arena = HostArena(Where())
    states = [t for away in stream.aways for t in away.states.values()]
    given = [t for away in stream.aways for t in away.given.values()]
    room = [Buffer(BLOCK_ELEMENTS, torch.float32, arena) for _ in range(2 * THREADS)]
    readers, writers = ThreadPoolExecutor(THREADS), ThreadPoolExecutor(THREADS)
    writes = [part for s in states for part in s.split(BLOCK_ELEMENTS)]
    reads = [*writes, *(part for s in given for part in s.split(BLOCK_ELEMENTS))]

    def read(which: int) -> None:
        for part in reads[which::THREADS]:
            stream.disk.read(part, room[which].raw)

    def write(which: int) -> None:
        for part in writes[which::THREADS]:
            stream.disk.write(part, room[THREADS + which].raw)

    def both() -> None:
        work = [readers.submit(read, i) for i in range(THREADS)]
        work += [writers.submit(write, i) for i in range(THREADS)]
        for future in work:
            future.result()

    return both


def measure(folder: Path, layers: int, rounds: int) -> dict[str, float]:
    """Median seconds of each in one build, and the share."""
    built = build(folder, layers)
    away = built.update.away
    assert away is not None and isinstance(away.stream, DiskStream)
    elements = sum(u.master.numel() for u in built.model.units)
    for unit in built.model.units:
        unit.gradient.fill_(1e-3)
    works: dict[str, Callable[[], object]] = {
        "adamw": adamw(elements),
        "disk": disk(away.stream),
        "update": lambda: away.run(1, 1e-3, 1.0, lambda master, rows: None, away.slots),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):  # the first warms up
        for name in list(works)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            works[name]()
            if turn:
                times[name].append(time.perf_counter() - start)
    found = {name: statistics.median(ts) for name, ts in times.items()}
    turns = zip(*times.values(), strict=True)
    share = statistics.median(max(alone, raw) / update for alone, raw, update in turns)
    return {"elements": elements, **found, "share": share}


def over_builds(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over builds; the share's interval, least and most, and whether it is met."""
    made: dict[str, Any] = {name: statistics.median(f[name] for f in found) for name in found[0]}
    shares = [f["share"] for f in found]
    made |= {"least": min(shares), "most": max(shares), "interval": list(interval(shares))}
    made["met"] = made["interval"][1] >= GOAL
    return {**made, "disk_bytes_per_s": 28 * made["elements"] / made["disk"]}


def main() -> None:
    """Reads the command line and prints the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--builds", type=int, default=7)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    builds = []
    for _ in range(asked.builds):
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            builds.append(measure(Path(folder), asked.layers, asked.rounds))
    found = over_builds(builds)
    if asked.json:
        print(json.dumps({"format": 1, "goal": GOAL, **found}))
        return
    print(
        f"{found['elements'] / 1e6:.1f}M elements; adamw {found['adamw']:.3f} s, disk {found['disk']:.3f} s"
    )
    print(f"({found['disk_bytes_per_s'] / 1e9:.2f} GB/s), update {found['update']:.3f} s")
    spread = "{:.2f}-{:.2f}".format(*found["interval"])
    print(f"share of the slower alone {found['share']:.2f} ({spread}), goal {GOAL},", end=" ")
    print("met" if found["met"] else "missed", end="")
    print(f"; of builds {found['least']:.2f} to {found['most']:.2f}")


if __name__ == "__main__":
    main()

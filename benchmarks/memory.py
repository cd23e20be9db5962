"""`python -m benchmarks.memory [--size half]`: the peak of a training step, ours beside each peer.

Ours and the peer run in processes of their own, two ranks of one thread. A thread samples what malloc has
handed out (mallinfo2: arenas and mapped blocks) while three steps run; the figure is the highest sample over
what was there before the model was built, on the rank that has more. Half of our shared-memory segment (the
pages that were touched), which malloc does not see, is added. `--markdown` prints the lines of
docs/benchmarks.md instead of a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import run
from benchmarks.run import SIZES, job_of
from benchmarks.sides import ours
from partita.base.text import table
from partita.comm.processes import start_ranks
from partita.comm.shm.shm import ShmWorld
from tests.local.measured_memory import in_use

STEPS, EVERY_S = 3, 0.0005
ALONE = "ring", "ulysses"  # their peer is one rank
GOALS = {"zero3": 0.85, **dict.fromkeys(run.PIPELINES, 1.0)}  # ratios
HEADER = ["size", "row", "dtype", "ours MB", "peer MB", "ratio", "goal", "met"]
ROWS = {
    name: (plan, make)
    for name, plan, make, ranks in run.ROWS
    if ranks == 2 and name not in (*ALONE, *run.NAMED)
}


class Peak:
    """Samples malloc while it is entered."""

    def __enter__(self) -> Peak:
        self.before = self.highest = in_use()
        self.over = False
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.over:
            self.highest = max(self.highest, in_use())
            time.sleep(EVERY_S)

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.thread.join()

    @property
    def grown(self) -> int:
        return self.highest - self.before


def rank_of(rank: int, writer, folder: str, size: str, name: str, dtype: str, mine: bool) -> None:
    """One rank of one subject: sends the bytes its steps took at most."""
    torch.set_num_threads(1)
    plan, make = ROWS[name]
    job, world = job_of(size, name, f"{plan} {dtype}", folder), None
    if mine:
        world = ShmWorld(rank, 2, Path(folder) / "world")
    else:
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with Peak() as peak:
        step = ours(job, world) if world else make(job.model, SIZES[size][1], dtype == "bf16")
        for _ in range(STEPS):
            step()
    writer.send(peak.grown + (world.shared_bytes // 2 if world else 0))


def measured(size: str, name: str, dtype: str, mine: bool) -> int:
    """Bytes of the rank that took more."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_ranks(2, rank_of, (folder, size, name, dtype, mine), ["torch"])
        found = max(reader.recv() for _, reader in ranks)
        for process, _ in ranks:
            process.join(5)
            process.kill()
    return found


def cells(size: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    ours_bytes, peer_bytes, goal = row["ours_bytes"], row["peer_bytes"], GOALS.get(row["row"])
    ratio = ours_bytes / peer_bytes
    judged = ["", ""] if goal is None else [f"{goal:g}", "yes" if ratio <= goal else "no"]
    sizes = [f"{x / 1e6:.0f}" for x in (ours_bytes, peer_bytes)]
    return [size, row["row"], row["dtype"], *sizes, f"{ratio:.2f}", *judged]


def main() -> None:
    """Runs the table and prints it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="half", choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args()
    out = []
    for name in asked.rows:
        for dtype in asked.dtypes:
            a, b = (measured(asked.size, name, dtype, mine) for mine in (True, False))
            out.append({"row": name, "dtype": dtype, "ours_bytes": a, "peer_bytes": b})
    rows = [cells(asked.size, x) for x in out]
    if asked.json:
        print(json.dumps({"format": 1, "rows": out}))
    elif asked.markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    else:
        print(table(rows, HEADER))


if __name__ == "__main__":
    main()

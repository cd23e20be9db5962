"""`python -m benchmarks.hosts [--rate 125e6] [--pairs 15] [--only WORD]`: by hierarchy or by gloo, two hosts.

Two network namespaces of this machine, two ranks each, whose ways out take `rate` bytes a second (tbf); root
and `ip` are needed. Every rank holds both worlds and runs them in turn (A B, B A, ...); a measurement is one
call between two meetings, of rank 0. The ratio is the median of the pairs' ratios (below 1: the hierarchy
is faster), with a 95 % bootstrap interval. `bytes` are what leaves a host in one call, as its link counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from benchmarks.run import interval
from partita.base.text import table
from partita.base.units import format_bytes
from partita.comm.distributed.hierarchical import join_hosts
from partita.comm.distributed.torch import TorchWorld
from partita.comm.liveness.rollcall import RollCall

sys.path.append(str(Path(__file__).parents[1] / "tests" / "gloo"))
from netns import Hosts, missing

PORT, HOSTS, EACH = 29600, 2, 2
MB = 1 << 20
ROWS = [(op, size) for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
        for size in (64 << 10, 4 * MB)]  # fmt: skip
UNDER = " under compute"
ROWS += [(op + UNDER, 4 * MB) for op in ("all_reduce", "reduce_scatter")]


def sent() -> int:
    """Bytes that have left this host."""
    return int(Path("/sys/class/net/net0/statistics/tx_bytes").read_text())


def call(comm: Any, op: str, x: Tensor) -> Callable[[], object]:
    """One call of a world."""
    if not op.endswith(UNDER):
        return lambda: getattr(comm, op)(x, site="bench")
    start = getattr(comm, f"start_{op.removesuffix(UNDER)}")

    def under() -> None:
        """Four parts, each started before some milliseconds of work."""
        started = []
        for part in x.chunk(4):
            started.append(start(part, site="bench"))
            end = time.perf_counter() + 0.01
            while time.perf_counter() < end:
                torch.ones(64, 64) @ torch.ones(64, 64)
        for handle in started:
            handle.wait()

    return under


def of_rank(
    rank: int, pairs: int, address: str, only: str
) -> list[tuple[str, int, list[float], list[float], int, int]]:
    """Every row whose name has a word, as this rank sees it."""
    torch.set_num_threads(1)
    size = HOSTS * EACH
    store = TCPStore(address, PORT, size, rank == 0, timedelta(seconds=60))
    between = TorchWorld(rank, size, None, timeout_s=60, roll=RollCall(store, rank, size))
    both = join_hosts(between, f"host {rank // EACH}", 60)
    comms = [w.make(range(size), axis="dp", lane="dp") for w in (both, between)]
    found = []
    for op, size_bytes in (row for row in ROWS if only in row[0]):
        x = torch.ones(size_bytes // 4)
        times: list[list[float]] = [[], []]
        moved = [0, 0]
        for pair in range(-2, pairs):  # two to warm up
            for which in (0, 1) if pair % 2 else (1, 0):
                run, before = call(comms[which], op, x), sent()
                comms[which].barrier(site="bench")
                start = time.perf_counter()
                run()
                comms[which].barrier(site="bench")
                if pair >= 0:
                    times[which].append(time.perf_counter() - start)
                    moved[which] += (sent() - before) // pairs
        found.append((op, size_bytes, *times, *moved))
    both.close()
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=125e6, help="bytes a second out of each host")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default="", help="rows whose name has this word")
    parser.add_argument("--rank", type=int, default=-1, help="this process is one of the ranks")
    parser.add_argument("--store", help="the first host's address")
    words = parser.parse_args()
    if words.rank >= 0:
        rows = of_rank(words.rank, words.pairs, words.store, words.only)
        if words.rank == 0:
            sys.stdout.write(json.dumps(rows))
        return
    if missing():
        sys.exit(f"no hosts on this machine: {missing()}")
    with Hosts(HOSTS) as hosts:
        hosts.limit(words.rate)
        words_of = [
            "-m",
            "benchmarks.hosts",
            "--pairs",
            str(words.pairs),
            "--only",
            words.only,
            "--store",
            hosts.address(0),
        ]
        started = [
            hosts.start(r // EACH, [sys.executable, *words_of, "--rank", str(r)])
            for r in range(HOSTS * EACH)
        ]  # fmt: skip
        codes = [p.wait(110) for p in started]
        if any(codes):
            sys.exit("\n".join(p.err for p in started))
        rows = json.loads(started[0].out)
    lines = []
    for op, size, ours, gloo, our_bytes, gloo_bytes in rows:
        ratios = [a / b for a, b in zip(ours, gloo, strict=True)]
        ratio, (low, high) = statistics.median(ratios), interval(ratios)
        milliseconds = [1e3 * statistics.median(t) for t in (ours, gloo)]
        lines.append([
            op, format_bytes(size), *(f"{m:.1f}" for m in milliseconds), f"{ratio:.2f}",
            f"{low:.2f} to {high:.2f}", format_bytes(our_bytes), format_bytes(gloo_bytes),
        ])  # fmt: skip
    heads = ["op", "handed in", "hierarchy ms", "gloo ms", "ratio", "95 %", "bytes", "gloo bytes"]
    print(table(lines, heads))


if __name__ == "__main__":
    main()

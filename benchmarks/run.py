"""`python -m benchmarks [--sizes tiny half] [--pairs 15]`: ours against each peer, A B A B in one run.

Two ranks of one thread, and as many microbatches as the peer has: one, or one a sample under a pipeline.
A pair is one step of each, the order swapped every time; the figure is the median of pair ratios (ours /
peer, below 1 is faster) with a 95 % bootstrap interval. Beside it the bound of bounds.py, and how many times
that ours takes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import peers
from benchmarks.bounds import bound, rates
from partita.base.text import table
from partita.comm.processes import start_ranks
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.heap import keep_freed_memory

SIZES = {
    "tiny": ({"hidden": 128, "heads": 4, "ffn_hidden": 352, "vocab": 512}, 64),
    "half": ({"hidden": 512, "heads": 8, "ffn_hidden": 1408, "vocab": 4096}, 128),
    "std": ({"hidden": 512, "heads": 8, "ffn_hidden": 1408, "vocab": 4096}, 512),
}
ROWS = (
    ("one rank", "1mb", peers.plain, 1),
    ("experts", "1mb", peers.plain, 1),
    ("experts hf", "1mb", peers.hugging_face_experts, 1),
    ("experts deepseek", "1mb", peers.plain, 1),
    ("experts deepseek hf", "1mb", peers.deepseek_experts, 1),
    ("recompute", "1mb recompute:full", peers.recomputed, 1),
    ("dp", "dp2 1mb", peers.ddp, 2),
    ("zero1", "dp_shard2.zero1 1mb", peers.zero1, 2),
    ("zero3", "dp_shard2.zero3 1mb", peers.zero3, 2),
    ("zero3 least", "dp_shard2.zero3 1mb data.prefetch=0", peers.zero3, 2),
    ("tp", "tp2 1mb", peers.tensor, 2),
    ("tp+sp", "tp2+sp 1mb", peers.tensor, 2),
    ("ring", "cp2:ring 1mb", peers.one_thread, 2),
    ("ulysses", "cp2:ulysses 1mb", peers.one_thread, 2),
    ("gpipe", "pp2:gpipe/8mb", peers.pipeline("gpipe"), 2),
    ("1f1b", "pp2:1f1b/8mb", peers.pipeline("1f1b"), 2),
    ("interleaved", "pp2:interleaved_1f1bx2/8mb", peers.pipeline("interleaved"), 2),
    ("zero bubble", "pp2:interleaved_zbx2/8mb", peers.pipeline("zero bubble"), 2),
    ("zbv", "pp2:zb_v/8mb", peers.pipeline("zbv"), 2),
    ("dualpipev", "pp2:dualpipev/8mb", peers.pipeline("dualpipev"), 2),
)

HEADER = "size", "row", "dtype", "ours ms", "peer ms", "bound ms", "ratio", "95 %", "ours / bound"
# experts, and how much narrower than the dense mlp: a few wide ones; DeepSeek-V2-Lite's many narrow ones
FEW = {"experts": 8, "top_k": 2, "shared_experts": 1}, 4
MANY = {"experts": 64, "top_k": 6, "shared_experts": 2, "normalise_top_k": False}, 8


def job_of(size: str, row: str, plan: str, folder: str) -> Job:
    """The benchmark's model under a plan; with experts in the rows named after them."""
    model, seq_len = SIZES[size]
    if row.startswith("experts"):
        experts, part = MANY if "deepseek" in row else FEW
        model = {**model, **experts, "expert_ffn_hidden": model["ffn_hidden"] // part}
        model |= {"qkv_bias": True, "shared_gate": True} if row == "experts hf" else {}
    path = Path(folder) / f"{size}.npy"
    if not path.exists():
        np.save(path, np.random.default_rng(0).integers(0, model["vocab"], 20_000))
    return Job.load(
        {
            "name": "bench",
            "plan": plan,
            "model": {"family": "llama", "layers": 8, "max_seq_len": seq_len, **model},
            "cluster": {"preset": "laptop", "memory_bytes": 2e10},
            "data": {"source": f"tokens:{path}"},
            "train": {
                "steps": 1000,
                "global_batch_size": 8,
                "seq_len": seq_len,
                "clip_grad_norm": 0.0,
            },
        }
    )


def ours(job: Job, world):
    """A step of ours, data read ahead as the peers' is."""
    built = assemble(job, world)
    built.context.recorder.active = False
    batch = built.batch(0)

    def step():
        built.model.forward_backward(batch)
        built.update.step()

    return step


def rank_of(rank: int, writer, ranks: int, folder: str, work) -> None:
    """One process: every row of the table, in the same order on both."""
    torch.set_num_threads(1)
    keep_freed_memory()  # of both: they share the process
    from partita.comm.shm import ShmWorld
    from partita.comm.single import SingleWorld

    if ranks > 1:
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks
        )
    peaks = {}
    for number, (size, name, dtype, pairs) in enumerate(work):
        if dtype not in peaks:
            peaks[dtype] = rates(torch.bfloat16 if dtype == "bf16" else torch.float32)
        _, plan, make, _ = next(r for r in ROWS if r[0] == name)
        job = job_of(size, name, f"{plan} {dtype}", folder)
        world = (
            SingleWorld() if ranks == 1 else ShmWorld(rank, ranks, Path(f"{folder}/world{number}"))
        )
        a, b = ours(job, world), make(job.model, SIZES[size][1], dtype == "bf16")
        times = {0: [], 1: []}
        for i in range(pairs + 2):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                start = time.perf_counter()
                (a, b)[which]()
                if ranks > 1:
                    dist.barrier()
                if i >= 2:
                    times[which].append(time.perf_counter() - start)
        writer.send((size, name, dtype, times[0], times[1], sum(bound(job, *peaks[dtype]))))
        world.close()
    writer.send(None)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    dice = random.Random(0)
    found = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(1000))
    return found[25], found[974]


def main() -> None:
    """Runs the table and prints it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["tiny", "half"], choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows, out = [], []
    for ranks in (1, 2):
        chosen = [r for r in ROWS if r[3] == ranks and (not asked.rows or r[0] in asked.rows)]
        work = [
            (size, name, dtype, asked.pairs)
            for size in asked.sizes
            for dtype in asked.dtypes
            for name, *_ in chosen
        ]
        with tempfile.TemporaryDirectory() as folder:
            started = start_ranks(ranks, rank_of, (ranks, folder, work), ["torch"])
            while (found := started[0][1].recv()) is not None:
                size, name, dtype, mine, theirs, least = found
                ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
                low, high = interval(ratios)
                middle = [statistics.median(x) for x in (ratios, mine, theirs)]
                facts = {"size": size, "row": name, "dtype": dtype, "pairs": len(ratios)}
                times = {
                    "ratio": middle[0],
                    "ours_s": middle[1],
                    "peer_s": middle[2],
                    "bound_s": least,
                }
                out.append({**facts, **times, "interval": [low, high]})
                cells = [f"{1e3 * x:.1f}" for x in (*middle[1:], least)]
                shares = [f"{middle[0]:.2f}", f"{low:.2f}-{high:.2f}", f"{middle[1] / least:.2f}"]
                rows.append([size, name, dtype, *cells, *shares])
                print(*rows[-1], file=sys.stderr, flush=True)  # a run takes minutes
            for process, _ in started:
                process.join(10)
                process.kill()
    print(json.dumps({"format": 1, "rows": out}) if asked.json else table(rows, HEADER))

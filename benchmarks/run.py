"""`python -m benchmarks [--sizes tiny half] [--pairs 15]`: ours against each peer, A B A B in one run.

Two ranks of one thread, and as many microbatches as the peer has: one, or one a sample under a pipeline.
Each side has ranks, processes, of its own (sides.py), as whoever chose it would. A pair is one step of each,
the order swapped every time, while the other side's ranks wait for a word; the figure is the median of pair
ratios (ours / peer, below 1 is faster) with a 95 % bootstrap interval. Beside it the bound of bounds.py, how
many times that ours takes, and the same ratio of the processor time that all threads of all ranks took.
`--markdown` prints the lines of docs/benchmarks.md instead of a table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import peers
from benchmarks.bounds import bound, rates
from benchmarks.sides import CALL, Side, Step, Took, in_turn, ours
from partita.base.text import table
from partita.comm.protocol import World
from partita.spec.job import Job

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
    *((f"deepspeed {n}", f"dp_shard2.zero{n} 1mb", peers.deepspeed(n), 2) for n in (1, 2, 3)),
)
PLANS = {name: plan for name, plan, *_ in ROWS}
NAMED = "deepspeed 1", "deepspeed 2", "deepspeed 3"  # only where asked for: no extra installs it

HEADER = (
    "size", "dtype", "row", "ours ms", "peer ms", "ratio", "95 %", "goal", "met", "bound ms", "ours / bound",
    "ours CPU ms", "peer CPU ms", "CPU ratio", "95 %",
)  # fmt: skip
PIPELINES = "gpipe", "1f1b", "interleaved", "zero bubble", "zbv", "dualpipev"
Goal = float | None
GOALS: dict[tuple[str, str], tuple[Goal, Goal, Goal]] = {
    ("one rank", "fp32"): (None, None, 1.02),
    ("dp", "fp32"): (0.95, 1.0, 1.0),
    ("dp", "bf16"): (None, 0.95, None),
    ("zero1", "fp32"): (1.0, 1.0, 1.0),
    ("zero3", "fp32"): (0.7, 0.88, 1.0),
    ("zero3", "bf16"): (None, 0.8, None),
    **{(row, "fp32"): (0.5, 0.85, 0.95) for row in ("tp", "tp+sp")},
    **{(row, "bf16"): (None, 0.7, None) for row in ("tp", "tp+sp")},
    **{(row, "fp32"): (None, None, 0.7) for row in ("ring", "ulysses")},
    **{(row, "fp32"): (0.7, 0.97, 1.0) for row in PIPELINES},
    **{(row, "bf16"): (0.7, 0.85, None) for row in PIPELINES},
    **{
        (name, dtype): (0.7, 0.85, 0.9)
        for name, *_ in ROWS if name.startswith("experts")
        for dtype in ("fp32", "bf16")
    },
}  # fmt: skip
"""The ratio of time that a row shall reach at tiny, half and std: the lower end of its interval, that is."""
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


class Work(NamedTuple):
    """What a row measures."""

    size: str
    row: str
    dtype: str

    def job(self, folder: str) -> Job:
        """Ours."""
        return job_of(self.size, self.row, f"{PLANS[self.row]} {self.dtype}", folder)


def make_ours(world: World, folder: str, work: Work) -> tuple[Step, Callable[[], float]]:
    """Our step, and the seconds of its bound at the speed of this rank, as busy as the others leave it."""
    job = work.job(folder)
    return ours(job, world), lambda: sum(bound(job, *peaks(work.dtype)))


@cache
def peaks(dtype: str) -> tuple[float, float]:
    """FLOP/s and bytes/s of this rank."""
    return rates(torch.bfloat16 if dtype == "bf16" else torch.float32)


def make_peer(_: None, folder: str, work: Work) -> tuple[Step, None]:
    """The peer's step."""
    make = next(make for name, _, make, _ in ROWS if name == work.row)
    return make(work.job(folder).model, SIZES[work.size][1], work.dtype == "bf16"), None


def measured(ranks: int, work: list[Work], pairs: int) -> Iterator[dict[str, Any]]:
    """The rows, each as it is there."""
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            Side(ranks, folder, work, make, make is make_ours) for make in (make_ours, make_peer)
        ]
        try:
            for item in work:
                for side in sides:
                    side.hear()
                sides[0].say(CALL)
                least = sides[0].hear()[0]
                yield compared(item, in_turn(*sides, pairs), least)
        finally:
            for side in sides:
                side.end()


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    dice = random.Random(0)
    found = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(1000))
    return found[25], found[974]


def compared(work: Work, took: tuple[Took, Took], least: float) -> dict[str, Any]:
    """A row: the time of a step, and the processor time of all ranks, beside the peer's."""
    row: dict[str, Any] = {"size": work.size, "row": work.row, "dtype": work.dtype}
    wall, cpu = ([[step[clock] for step in side] for side in took] for clock in (0, 1))
    row["pairs"] = len(wall[0])
    for prefix, (mine, theirs) in (("", wall), ("cpu_", cpu)):
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        row[f"{prefix}ratio"] = statistics.median(ratios)
        row[f"{prefix}ours_s"], row[f"{prefix}peer_s"] = map(statistics.median, (mine, theirs))
        row[f"{prefix}interval"] = list(interval(ratios))
    goal = GOALS.get((work.row, work.dtype), (None,) * len(SIZES))[list(SIZES).index(work.size)]
    row["goal"], row["met"] = goal, None if goal is None else row["interval"][0] <= goal
    return {**row, "bound_s": least}


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""

    def ms(*names: str) -> list[str]:
        return [f"{1e3 * row[name]:.1f}" for name in names]

    def ratio(prefix: str) -> list[str]:
        return [f"{row[prefix + 'ratio']:.2f}", "{:.2f}-{:.2f}".format(*row[prefix + "interval"])]

    words = [row["size"], row["dtype"], row["row"], *ms("ours_s", "peer_s"), *ratio("")]
    words += (
        ["", ""] if row["goal"] is None else [f"{row['goal']:g}", "yes" if row["met"] else "no"]
    )
    words += [*ms("bound_s"), f"{row['ours_s'] / row['bound_s']:.2f}"]
    return words + ms("cpu_ours_s", "cpu_peer_s") + ratio("cpu_")


def markdown(rows: list[dict[str, Any]]) -> str:
    """Lines of the table of docs/benchmarks.md, which has a note behind each: what else held."""
    return "\n".join(f"| {' | '.join(cells(row))} | |" for row in rows)


def main() -> None:
    """Runs the table and prints it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["tiny", "half"], choices=SIZES)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    asked = parser.parse_args()
    wanted = asked.rows or [name for name, *_ in ROWS if name not in NAMED]
    rows = []
    for ranks in (1, 2):
        chosen = [name for name, _, _, needs in ROWS if needs == ranks and name in wanted]
        work = [Work(*each) for each in product(asked.sizes, chosen, asked.dtypes)]
        for row in measured(ranks, work, asked.pairs) if work else ():
            rows.append(row)
            print(*cells(row), file=sys.stderr, flush=True)  # a run takes minutes
    if asked.json:
        print(json.dumps({"format": 1, "rows": rows}))
    else:
        print(markdown(rows) if asked.markdown else table([cells(row) for row in rows], HEADER))

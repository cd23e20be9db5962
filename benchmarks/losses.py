"""Loss curves on real text: each precision beside fp32, asynchronous schedules beside 1F1B.

python -m benchmarks.losses [--steps 300] [--docs docs]

A Llama of 4 layers (0.2M parameters) on the bytes of the standard library's sources; ranks are threads.
Draws `losses-precision.svg` and `losses-async.svg` and prints a table for docs/curves.md: the mean loss of
the last 50 steps, and by how much it is above the first line's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.progress import track

from benchmarks.curves import walk
from partita.comm.threads.local import local
from partita.spec.job import Job

LAST = 50  # steps whose mean is compared
STEPS = 300
PRECISIONS = (
    "fp32", "bf16", "bf16 precision.rounding=stochastic", "fp16", "fp8",
    "fp8 precision.fp8_scaling=delayed", "fp8 precision.fp8_scaling=static",
    "fp8 precision.fp8_granularity=row", "fp8 precision.fp8_granularity=block",
    "fp8 precision.fp8_format=e4m3",
)  # fmt: skip
SCHEDULES = (
    "pp4:1f1b/8mb", "pp4:pipedream_2bw/8mb", "pp4:pipedream/8mb",
    "pp4:pipedream/8mb pipeline.vertical_sync=true",
)  # fmt: skip


def text(plan: str, steps: int, seed: int = 1) -> Job:
    """The same text in the same order, whatever the plan."""
    return Job.load(
        {
            "name": "losses",
            "seed": seed,
            "plan": plan,
            "model": {
                "family": "llama", "layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2,
                "ffn_hidden": 176, "vocab": 256, "max_seq_len": 32,
            },
            "cluster": {"preset": "laptop", "devices": 4, "memory_bytes": 4e9},
            "data": {"source": "python-stdlib", "tokenizer": "byte"},
            "train": {
                "steps": steps, "global_batch_size": 16, "seq_len": 32, "lr": 2e-3, "warmup_steps": 20,
            },
        }
    )  # fmt: skip


def curve(plan: str, steps: int, seed: int = 1) -> list[float]:
    """The training loss of every step."""
    job = text(plan, steps, seed)
    with local(job.plan.world_size, 120) as ranks:
        return ranks.run(walk, job, steps, False)[0]


def table(curves: dict[str, list[float]]) -> str:
    """Mean of the last steps of each, and its distance to the first."""
    ends = {name: float(np.mean(losses[-LAST:])) for name, losses in curves.items()}
    first = next(iter(ends.values()))
    rows = [f"| {name} | {end:.4f} | {end - first:+.4f} |" for name, end in ends.items()]
    return "\n".join(
        [f"| plan | loss, last {LAST} steps | above the first |", "|---|--:|--:|", *rows]
    )


def draw(path: Path, title: str, curves: dict[str, list[float]]) -> None:
    """Left the losses, right how far each is from the first, both as means over 20 steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "losses"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    smooth = {n: np.convolve(c, np.full(20, 1 / 20), "valid") for n, c in curves.items()}
    first = next(iter(smooth.values()))
    for i, (name, losses) in enumerate(smooth.items()):
        left.plot(losses, label=name, color=f"C{i % 10}", linestyle="-" if i < 10 else "--")
        right.plot(losses - first, color=f"C{i % 10}", linestyle="-" if i < 10 else "--")
    left.set(title=title, xlabel="step", ylabel="loss, mean of 20 steps (nats a byte)")
    right.set(title=f"above {next(iter(smooth))}", xlabel="step", ylabel="difference")
    left.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    read = argparse.ArgumentParser(prog="python -m benchmarks.losses")
    read.add_argument("--steps", type=int, default=STEPS)
    read.add_argument("--docs", type=Path, default=Path("docs"))
    args = read.parse_args()
    sets = (("precision", "each precision", PRECISIONS), ("async", "weight versions", SCHEDULES))
    for kind, title, plans in sets:
        curves = {f"`{p}`": curve(p, args.steps) for p in track(plans, kind)}
        curves[f"`{plans[0]}`, another seed"] = curve(plans[0], args.steps, seed=2)
        print(table(curves))
        draw(args.docs / f"losses-{kind}.svg", title, curves)


if __name__ == "__main__":
    main()

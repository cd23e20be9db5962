"""The same steps of a tiny Llama under six plans, drawn into docs/curves.svg; ranks are threads.

python -m benchmarks.curves [--steps 200] [--svg docs/curves.svg]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from partita.comm.threads.local import local
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.step import StepBatch

PLANS = (
    "2mb", "dp2 tp2 1mb", "tp2+sp 2mb", "pp2:gpipe/4mb", "pp4:1f1b/8mb recompute:full",
    "dp2 tp2+sp pp2:1f1b/4mb",
)  # fmt: skip
STEPS = 200
VOCAB = 127


def tiny(folder: Path, plan: str) -> Job:
    """Layers, kv heads and vocabulary that the plans do not divide."""
    file = folder / "tokens.npy"
    if not file.exists():
        np.save(file, np.random.default_rng(0).integers(0, VOCAB, 2000))
    return Job.load(
        {
            "name": "curves",
            "seed": 3,
            "plan": plan,
            "model": {
                "family": "llama", "layers": 5, "hidden": 16, "heads": 4, "kv_heads": 2,
                "ffn_hidden": 24, "vocab": VOCAB, "max_seq_len": 8,
            },
            "cluster": {"preset": "laptop", "devices": 8, "memory_bytes": 1e9},
            "data": {"source": f"tokens:{file}"},
            "train": {"steps": STEPS, "global_batch_size": 8, "seq_len": 8, "lr": 1e-3},
        }
    )  # fmt: skip


def walk(world, job: Job, steps: int, reverse: bool) -> list[float]:
    built = assemble(job, world)
    losses = []
    for step in range(steps):
        batch = built.batch(step)
        if reverse:
            batch = StepBatch(batch.step, batch.microbatches[::-1])
        losses.append(built.model.forward_backward(batch))
        built.update.step()
    return losses


def curve(plan: str, folder: Path, steps: int = STEPS, reverse: bool = False) -> list[float]:
    """The loss of every step; `reverse` runs each step's microbatches from the last to the first."""
    job = tiny(folder, plan)
    with local(job.plan.world_size, 60) as ranks:
        return ranks.run(walk, job, steps, reverse)[0]


def apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def rounding(losses: list[float]) -> float:
    """What one fp32 number of these losses cannot say."""
    return max(losses) * 2**-23


def main() -> None:
    read = argparse.ArgumentParser(prog="python -m benchmarks.curves")
    read.add_argument("--steps", type=int, default=STEPS)
    read.add_argument("--svg", type=Path, default=Path("docs/curves.svg"))
    args = read.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fp64 = {plan: curve(f"{plan} fp64", folder, args.steps) for plan in ("1mb", *PLANS)}
        fp32 = {plan: curve(f"{plan} fp32", folder, args.steps) for plan in ("8mb", *PLANS)}
        backwards = curve("8mb fp32", folder, args.steps, reverse=True)
    print("| plan | fp64: furthest from one rank | fp32: furthest from one rank |\n|---|--:|--:|")
    for plan in PLANS:
        far = apart(fp64[plan], fp64["1mb"]), apart(fp32[plan], fp32["8mb"])
        print(f"| `{plan}` | {far[0]:.1e} | {far[1]:.1e} |")
    print(f"| one rank, its microbatches reversed | | {apart(backwards, fp32['8mb']):.1e} |")
    draw(args.svg, fp64, {**fp32, "8mb, reversed": backwards})


def draw(path: Path, fp64: dict[str, list[float]], fp32: dict[str, list[float]]) -> None:
    """Left the losses, which lie on one another; right how far each has been from one rank's so far."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "curves"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (plan, losses) in enumerate(fp64.items()):
        name = "one rank" if plan == "1mb" else plan
        left.plot(losses, linewidth=5 - 0.6 * i, label=name, color=f"C{i}")
    left.set(title="seven curves, one line (fp64)", xlabel="step", ylabel="loss")
    left.legend(fontsize=8)
    for curves, base, style in ((fp64, "1mb", "-"), (fp32, "8mb", "--")):
        for plan, losses in curves.items():
            away = np.maximum.accumulate(np.abs(np.subtract(losses, curves[base])))
            color = f"C{PLANS.index(plan) + 1}" if plan in PLANS else "black"
            if plan != base and away.any():
                right.plot(np.where(away, away, np.nan), style, linewidth=1.5, color=color)
    right.axhline(1e-8, color="grey", linewidth=0.8)
    right.set(title="furthest from one rank so far", xlabel="step", ylabel="difference of losses")
    right.set_yscale("log")
    right.set_ylim(1e-16, 1e-5)
    right.text(0, 1.5e-8, "bound of fp64: 1e-8", fontsize=8, color="grey")
    right.text(0, 2e-6, "fp32, dashed (black: one rank, microbatches reversed)", fontsize=8)
    right.text(0, 5e-15, "fp64", fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

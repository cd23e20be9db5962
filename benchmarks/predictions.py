"""Plans predicted from this machine's calibration, then run: step time and memory, predicted beside measured.

python -m benchmarks.predictions [--steps 8] [--page docs/predictions.md] [--svg docs/predictions.svg]

Calibration measures pieces of layers, memory and collectives alone; no plan of this list is in it. The chosen
plan of a group is the one predicted fastest; its regret is what it takes over the fastest measured one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from partita.base.text import table
from partita.base.units import format_bytes
from partita.simulate.predict import simulate
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.tune.calibrate import calibrate
from partita.tune.measure import Measured, measure

MODEL = {
    "family": "llama", "layers": 8, "hidden": 256, "heads": 8, "kv_heads": 4, "ffn_hidden": 704,
    "vocab": 2048, "max_seq_len": 128,
}  # fmt: skip
SPARSE = {"experts": 4, "top_k": 2, "expert_ffn_hidden": 352}
DENSE_PLANS = (
    "1mb", "4mb", "1mb recompute:full", "2mb recompute:selective", "1mb bf16",
    "dp2 1mb", "dp_shard2.zero1 2mb", "dp_shard2.zero2 2mb", "dp_shard2.zero3 1mb", "tp2 1mb",
    "tp2+sp 1mb", "cp2:ring 1mb", "cp2:ulysses 1mb", "cp2:all_gather 1mb", "pp2:gpipe/4mb",
    "pp2:1f1b/4mb", "pp2:interleaved_1f1bx2/4mb", "pp2:zb_h1/4mb", "pp2:zb_v/4mb", "dp2 1mb bf16",
    "tp2 1mb bf16", "pp2:1f1b/4mb bf16",
    "dp2 tp2 1mb", "dp_shard4.zero3 1mb", "pp2:1f1b/4mb tp2+sp", "pp4:1f1b/8mb", "cp2:ring tp2 1mb",
    "pp2:1f1b/4mb dp2 bf16",
)  # fmt: skip
SPARSE_PLANS = ("1mb", "dp2 ep2 1mb", "pp2:1f1b/4mb dp2 ep2")


def job_of(cluster: Cluster, model: Mapping[str, object], line: str) -> Job:
    """A plan of this machine, with memory that never binds."""
    table = {
        "name": "predictions",
        "plan": line,
        "model": model,
        "cluster": {"preset": "laptop", "memory_bytes": 2e10},
        "train": {"global_batch_size": 8, "seq_len": 128},
    }
    job = Job.load(table)
    ranks = max(job.plan.world_size, 1)
    rates = replace(
        cluster, devices=ranks, devices_per_node=ranks, memory_bytes=job.cluster.memory_bytes
    )
    return replace(job, cluster=rates)


def run_all(cluster: Cluster, steps: int) -> list[tuple[str, Measured]]:
    """Every plan, predicted and run, by its group."""
    found = []
    for group, model, lines in (
        ("dense", MODEL, DENSE_PLANS),
        ("experts", MODEL | SPARSE, SPARSE_PLANS),
    ):
        for line in lines:
            job = job_of(cluster, model, line)
            found += [(group, m) for m in measure(job, [simulate(job)], steps)]
            print(f"{found[-1][1].prediction.plan}: {found[-1][1].ratio:.2f}", flush=True)
    return found


def error(pairs: Sequence[tuple[float, float]]) -> float:
    """Mean of |predicted / measured - 1|."""
    return float(np.mean([abs(p / m - 1) for p, m in pairs])) if pairs else float("nan")


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Correlation of ranks."""
    first, second = (np.argsort(np.argsort(column)) for column in zip(*pairs, strict=True))
    return float(np.corrcoef(first, second)[0, 1])


def times(found: Sequence[tuple[str, Measured]]) -> list[tuple[float, float]]:
    """Predicted and measured seconds."""
    return [(m.prediction.step_time_s or 0.0, m.step_time_s) for _, m in found]


def world(m: Measured) -> int:
    """Ranks of the plan."""
    assert m.prediction.laid is not None
    return m.prediction.laid.mesh.world_size


def page(found: Sequence[tuple[str, Measured]], cores: int, note: str = "") -> str:
    """The page: figures over all plans, then a line a plan."""
    few = [x for x in found if world(x[1]) <= cores]
    many = [x for x in found if world(x[1]) > cores]
    memory = [(float(m.predicted_bytes), float(m.peak_bytes)) for _, m in found]
    lines = [
        "# Predicted, then run",
        "",
        "Written by `python -m benchmarks.predictions`: the machine is calibrated (pieces of layers, memory",
        "and collectives alone), each plan is predicted, then run for a few steps over local ranks.",
        "",
        f"* {len(found)} plans on {cores} compute units, 1 to {max(world(m) for _, m in found)} ranks",
        f"* step time, ranks <= units: mean error {error(times(few)):.1%} of {len(few)} plans (goal 12 %)",
        f"* step time, more ranks than units: mean error {error(times(many)):.1%} of {len(many)} (goal 20 %)",
        f"* memory of the fullest rank: mean error {error(memory):.1%} (goal 5 %)",
        f"* Spearman of step times: {spearman(times(found)):.3f} (goal 0.9)",
    ]
    for group in dict.fromkeys(g for g, _ in found):
        mine = [m for g, m in found if g == group]
        chosen = min(mine, key=lambda m: m.prediction.step_time_s or 0.0)
        best = min(mine, key=lambda m: m.step_time_s)
        regret = chosen.step_time_s / best.step_time_s - 1
        lines.append(
            f"* chosen, {group}: `{chosen.prediction.plan}`, {regret:.1%} over the fastest, "
            f"`{best.prediction.plan}`"
        )
    rows = [
        [
            group, m.prediction.plan, f"{1e3 * (m.prediction.step_time_s or 0.0):.0f}",
            f"{1e3 * m.step_time_s:.0f}", f"{(m.prediction.step_time_s or 0.0) / m.step_time_s:.2f}",
            format_bytes(m.predicted_bytes), format_bytes(m.peak_bytes),
        ]
        for group, m in found
    ]  # fmt: skip
    header = ("", "plan", "predicted ms", "measured ms", "ratio", "memory predicted", "measured")
    return (
        "\n".join([*lines, "", "![predicted against measured](predictions.svg)", "", "```"])
        + f"\n{table(rows, header=header)}\n```\n"
    )


def draw(path: Path, found: Sequence[tuple[str, Measured]], cores: int) -> None:
    """Predicted against measured step times, on equal axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "predictions"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    for name, marker, chosen in (
        (f"ranks <= {cores}", "o", [x for x in found if world(x[1]) <= cores]),
        (f"ranks > {cores}", "s", [x for x in found if world(x[1]) > cores]),
    ):
        both = times(chosen)
        axes.scatter([m for _, m in both], [p for p, _ in both], marker=marker, label=name)
    every = [t for pair in times(found) for t in pair]
    ends = [0.9 * min(every), 1.1 * max(every)]
    axes.plot(ends, ends, color="#888", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="measured seconds a step", ylabel="predicted seconds a step")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Calibrates, predicts, runs, writes."""
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("--steps", type=int, default=8)
    read.add_argument("--page", type=Path, default=Path("docs/predictions.md"))
    read.add_argument("--note", default="", help="What to know of this run: a line of the page.")
    read.add_argument("--svg", type=Path, default=Path("docs/predictions.svg"))
    args = read.parse_args()
    cluster = calibrate(Cluster.load("laptop")).cluster
    found = run_all(cluster, args.steps)
    cores = cluster.cores_shared or 1
    args.page.write_text(page(found, cores, args.note), encoding="utf-8")
    draw(args.svg, found, cores)
    print(args.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

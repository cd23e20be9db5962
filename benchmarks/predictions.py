"""Plans predicted from this machine's calibration, then run: step time and memory, predicted beside measured.

python -m benchmarks.predictions [--rounds 3] [--steps 8] [--page docs/predictions.md]
                                 [--svg docs/predictions.svg] [--note TEXT]

Calibration measures pieces of layers, memory and collectives alone; no plan of this list is in it. In each
round the machine is calibrated, then every plan is predicted and run: rounds are minutes apart, so that what
the machine does for a moment is in one of them. Medians of the rounds count, and how far a plan's own
measurements lie apart stands beside its error. The chosen plan of a group is the one predicted fastest; its
regret is what it takes over the fastest measured one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

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


@dataclass(frozen=True)
class Row:
    """A plan in every round: seconds of a step, predicted and measured; bytes of its fullest rank."""

    group: str
    rounds: tuple[Measured, ...]

    @property
    def plan(self) -> str:
        """As a line."""
        return self.rounds[0].prediction.plan

    @property
    def ranks(self) -> int:
        """Of the plan."""
        laid = self.rounds[0].prediction.laid
        assert laid is not None
        return laid.mesh.world_size

    @property
    def predicted_s(self) -> float:
        """Median of the rounds."""
        return median(m.prediction.step_time_s or 0.0 for m in self.rounds)

    @property
    def measured_s(self) -> float:
        """Median of the rounds."""
        return median(m.step_time_s for m in self.rounds)

    @property
    def spread(self) -> float:
        """The slowest round over the fastest, less 1: what the plan differs from itself by."""
        times = [m.step_time_s for m in self.rounds]
        return max(times) / min(times) - 1

    @property
    def predicted_bytes(self) -> int:
        """The same in every round."""
        return self.rounds[0].predicted_bytes

    @property
    def peak_bytes(self) -> int:
        """The most of a round."""
        return max(m.peak_bytes for m in self.rounds)


def run_all(cluster: Cluster, steps: int) -> list[tuple[str, Measured]]:
    """A round: every plan, predicted and run, with its group."""
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


def times(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Predicted and measured seconds."""
    return [(r.predicted_s, r.measured_s) for r in rows]


def figures(rows: Sequence[Row], cores: int) -> list[str]:
    """Errors over all plans, and what was chosen, as lines of a list."""
    few = [r for r in rows if r.ranks <= cores]
    many = [r for r in rows if r.ranks > cores]
    memory = [(float(r.predicted_bytes), float(r.peak_bytes)) for r in rows]
    unsteady = sum(r.spread > 0.1 for r in rows)
    lines = [
        f"* {len(rows)} plans on {cores} compute units, 1 to {max(r.ranks for r in rows)} ranks, "
        f"{len(rows[0].rounds)} rounds",
        f"* step time, ranks <= units: mean error {error(times(few)):.1%} of {len(few)} plans (goal 12 %)",
        f"* step time, more ranks than units: mean error {error(times(many)):.1%} of {len(many)} (goal 20 %)",
        f"* memory of the fullest rank: mean error {error(memory):.1%} (goal 5 %)",
        f"* Spearman of step times: {spearman(times(rows)):.3f} (goal 0.9)",
        f"* spread of a plan's own rounds: median {median(r.spread for r in rows):.1%}, above 10 % for "
        f"{unsteady}",
    ]
    for group in dict.fromkeys(r.group for r in rows):
        mine = [r for r in rows if r.group == group]
        chosen = min(mine, key=lambda r: r.predicted_s)
        best = min(mine, key=lambda r: r.measured_s)
        lines.append(
            f"* chosen, {group}: `{chosen.plan}`, {chosen.measured_s / best.measured_s - 1:.1%} over the "
            f"fastest, `{best.plan}`, whose spread is {best.spread:.1%}"
        )
    return lines


def page(rows: Sequence[Row], cores: int, note: str = "") -> str:
    """The page: figures over all plans, then a line a plan."""
    lines = [
        "# Predicted, then run",
        "",
        "Written by `python -m benchmarks.predictions`: the machine is calibrated (pieces of layers, memory",
        "and collectives alone), each plan is predicted, then run for a few steps over local ranks; all",
        "of it in rounds, of which medians count. Spread is a plan's slowest round over its fastest.",
        "",
        *figures(rows, cores),
        *([f"* {note}"] if note else []),
        "",
        "![predicted against measured](predictions.svg)",
        "",
        "```",
    ]
    cells = [
        [
            r.group, r.plan, f"{1e3 * r.predicted_s:.0f}", f"{1e3 * r.measured_s:.0f}",
            f"{r.predicted_s / r.measured_s:.2f}", f"{r.spread:.0%}", format_bytes(r.predicted_bytes),
            format_bytes(r.peak_bytes),
        ]
        for r in rows
    ]  # fmt: skip
    header = (
        "", "plan", "predicted ms", "measured ms", "ratio", "spread", "memory predicted", "measured",
    )  # fmt: skip
    return "\n".join(lines) + f"\n{table(cells, header=header)}\n```\n"


def draw(path: Path, rows: Sequence[Row], cores: int) -> None:
    """Predicted against measured step times, on equal axes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "predictions"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    for name, marker, chosen in (
        (f"ranks <= {cores}", "o", [r for r in rows if r.ranks <= cores]),
        (f"ranks > {cores}", "s", [r for r in rows if r.ranks > cores]),
    ):
        both = times(chosen)
        axes.scatter([m for _, m in both], [p for p, _ in both], marker=marker, label=name)
    every = [t for pair in times(rows) for t in pair]
    ends = [0.9 * min(every), 1.1 * max(every)]
    axes.plot(ends, ends, color="#888", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="measured seconds a step", ylabel="predicted seconds a step")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Calibrates, predicts, runs, in each round; writes."""
    read = argparse.ArgumentParser(description=__doc__)
    read.add_argument("--rounds", type=int, default=3)
    read.add_argument("--steps", type=int, default=8)
    read.add_argument("--page", type=Path, default=Path("docs/predictions.md"))
    read.add_argument("--note", default="", help="What to know of this run: a line of the page.")
    read.add_argument("--svg", type=Path, default=Path("docs/predictions.svg"))
    args = read.parse_args()
    rounds, cores = [], 1
    for _ in range(args.rounds):
        cluster = calibrate(Cluster.load("laptop")).cluster
        cores = cluster.cores_shared or 1
        rounds.append(run_all(cluster, args.steps))
    rows = [Row(each[0][0], tuple(m for _, m in each)) for each in zip(*rounds, strict=True)]
    args.page.write_text(page(rows, cores, args.note), encoding="utf-8")
    draw(args.svg, rows, cores)
    print(args.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.calculon TREE [MODEL DEVICES BATCH SEQ_LEN]`: the planner's search beside Calculon's.

TREE is a checkout of Calculon (Isaev et al. 2023, github.com/calculon-ai/calculon; PyPI's `calculon` is
another program), which needs numpy, pandas and psutil. Both are asked for the fastest plan of one model on
DEVICES A100s of 80 GB: Calculon's of its own description of that system without offload and without overlap
(each of those multiplies its options), ours of all choices. Processes take turns; seconds are their processor
time, start and all. Calculon's plan is also simulated here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from partita.base.text import table
from partita.simulate.predict import simulate
from partita.spec.job import Job
from partita.spec.plan import Plan

RECOMPUTE = {"full": "full", "attn_only": "selective", "none": "none"}
SYSTEM = Path("systems") / "a100_80g.json"


def files(tree: Path, job: Job, folder: Path) -> tuple[Path, Path]:
    """The model and the system as Calculon reads them."""
    m = job.model
    model = {
        "hidden": m.hidden,
        "feedforward": m.ffn_hidden,
        "seq_size": job.train.seq_len,
        "attn_heads": m.heads,
        "attn_size": m.head_dim,
        "num_blocks": m.layers,
    }
    system = json.loads((tree / SYSTEM).read_text())
    system["mem2"]["GiB"] = 0
    found = folder / "model.json", folder / "system.json"
    for path, value in zip(found, (model, system), strict=True):
        path.write_text(json.dumps(value))
    return found


def timed(command: list[str], **environment: str) -> tuple[float, str]:
    """(processor seconds of a process and its children, what it printed)."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    done = subprocess.run(
        command, env=os.environ | environment, check=True, capture_output=True, text=True
    )
    return spent() - before, done.stdout


def plan_of(execution: dict[str, Any], samples: int) -> Plan:
    """Calculon's choice as a plan."""
    pp, dp, tp = (execution[f"{axis}_par"] for axis in ("pipeline", "data", "tensor"))
    v, m = execution["pipeline_interleaving"], samples // dp // execution["microbatch_size"]
    schedule = f"interleaved_1f1bx{v}" if v > 1 else "1f1b"
    words = [f"pp{pp}:{schedule}/{m}mb" if pp > 1 else f"{m}mb", "bf16"]
    words += [f"dp_shard{dp}.zero1" if execution["optimizer_sharding"] else f"dp_replicate{dp}"]
    words += [
        f"tp{tp}" + ("+sp" if "rs_ag" in execution["tensor_par_comm_type"] and tp > 1 else "")
    ]
    mode = RECOMPUTE[execution["activation_recompute"]]
    return Plan.parse(" ".join(words + ([f"recompute:{mode}"] if mode != "none" else [])))


def main() -> None:
    """Prints both searches' seconds and the plans that they choose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, nargs="?")
    parser.add_argument("question", nargs="*", default=["gpt3-1.3b", "4", "4", "2048"])
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    if given.tree is None or not (given.tree / SYSTEM).exists():
        print(f"skipped: no checkout of Calculon at {given.tree} (it has {SYSTEM})")
        return
    name, devices, batch, seq_len = given.question
    cluster, sizes = (
        f"{devices}xa100-80gb",
        {"global_batch_size": int(batch), "seq_len": int(seq_len)},
    )
    job = Job.of(name, cluster, "", **sizes)
    rows, theirs, ours = list[list[str]](), dict[str, Any](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        model, system = files(given.tree, job, Path(folder))
        out = Path(folder) / "found.json"
        options = ["-c", "1", "--no-tp-overlap", "--no-dp-overlap"]
        question = [str(model), devices, batch, "float16", str(system), str(out)]
        command = [sys.executable, str(given.tree / "bin" / "calculon"), "loe", *options, *question]
        mine = [sys.executable, "-m", "partita", "plan", name, cluster, "--top", "1", "--json"]
        mine += ["--global-batch-size", batch, "--seq-len", seq_len]
        for turn in range(given.pairs):
            there, said = timed(command, PYTHONPATH=str(given.tree))
            here, text = timed(mine)
            theirs, ours = json.loads(out.read_text())["0"], json.loads(text)
            count = said.partition("Total executions: ")[2].split()[:1]
            rows.append(
                [str(turn + 1), f"{there:.2f}", *count, f"{here:.2f}", f"{ours['considered']:,}"]
            )
    print(table(rows, header=("turn", "Calculon s", "executions", "partita plan s", "plans")))
    ratio = median(float(row[1]) / float(row[3]) for row in rows)
    print(f"median ratio {ratio:.2f}; proven: {ours['complete']}")
    execution, rate = theirs["execution"], theirs["stats"]["sample_rate"]
    plan, best = plan_of(execution, execution["batch_size"]), ours["plans"][0]
    told = simulate(job.with_plan(plan))
    print(
        f"Calculon's {plan}: {execution['batch_size'] / rate:.4g} s there, {told.step_time_s or 0:.4g} s here"
    )
    print(f"ours {best['plan']}: {best['step_time_s']:.4g} s here")


if __name__ == "__main__":
    main()

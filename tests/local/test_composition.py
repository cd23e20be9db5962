"""Features compose: plans that hold every legal pair of them, each equal to one device in float64."""

import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import covering
import image_jobs
import pytest
import verify_jobs

from partita.verify.parity import verify

ROWS = covering.rows()
# The heaviest rows train eight thread ranks for many seconds, on a starved machine for more than a minute
pytestmark = pytest.mark.timeout(240)


@cache
def third():
    """Which third of the plans `make test` runs: another for each commit, one for all workers of a run."""
    if shutil.which("git") is None:
        return 0
    asked = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True)
    return int(done.stdout[:8] or "0", 16) % 3


def job(folder, row):
    family, *words = row["model"].split()
    model = {}
    if family == "moe":
        every = 1 if words else 2
        family, model = "llama", {**verify_jobs.EXPERTS, "layers": 5, "expert_every": every}
    if family == "qwen":
        family, model = "llama", dict(verify_jobs.QWEN)
    if "mla" in words:
        model |= {**verify_jobs.MLA, "router": "sigmoid", "router_groups": 2}
    if "etp2" in words:
        model["shared_gate"] = True
    if family == "gpt_neox":
        model = {"parallel_residual": True, "rotary_pct": 0.5}
    if family == "gpt2":
        model["dropout"] = 0.1 if "dropout" in words else 0.0
    if "tied" in words:
        model["tied"] = True
    if row["sees"] == "window":
        model["sliding_window"] = 3
    if row["trains"] == "lora":
        targets = ("wq", "wo", *(("expert_gate_up", "expert_down") if "experts" in model else ()))
        model |= {"lora_rank": 2, "lora_targets": targets}
        model |= {} if "experts" in model else {"lora_dropout": 0.1}
    if family == "alexnet":
        return trained(row, image_jobs.job(folder, covering.line(row), batch=16))
    packed = row["sees"] == "documents"
    made = verify_jobs.job(folder, covering.line(row), family, 16, packed, **model)
    return trained(row, made)


def trained(row, made):
    """Some weights frozen, or none; without a global norm where stages update on their own."""
    clips = 0.0 if "pipedream" in row["pipeline"] else made.train.clip_grad_norm
    frozen = ("embedding.*", "blocks.1.*") if row["trains"] == "frozen" else ()
    return replace(made, train=replace(made.train, clip_grad_norm=clips, frozen=frozen))


def test_every_legal_pair_stands_in_a_plan():
    covered = set().union(*map(covering.pairs, ROWS))
    assert covering.wanted() <= covered
    assert all(map(covering.legal, ROWS)) and len(ROWS) < 90


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(r, marks=[] if i % 3 == third() else pytest.mark.slow)
        for i, r in enumerate(ROWS)
    ],
    ids=lambda row: f"{row['model']}, {row['trains']}, {row['sees']}: {covering.line(row)}",
)
def test_a_plan_of_many_features_equals_one_device(row, tmp_path):
    found = verify(job(tmp_path, row))
    assert found.equal, str(found)

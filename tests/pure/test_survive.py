"""Plans for what is left when devices are lost: found before, kept in the job, taken by so many ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from partita.base.errors import UsageError
from partita.cli.main import application
from partita.planner.answers.survive import survivors, told
from partita.simulate.predict import simulate
from partita.spec.job import Job
from partita.spec.plan import Plan

BATCH = {"global_batch_size": 12, "seq_len": 64}


def test_each_loss_has_the_best_plan_of_all_that_are_left():
    job = Job.of("quickstart", "laptop", "dp_replicate4", **BATCH)
    found = survivors(job, 2, 4.0)
    assert list(found) == [3, 2]
    for ranks, best in found.items():
        assert best is not None and best.fits
        plan = Plan.parse(best.plan)
        assert plan.world_size == ranks and plan.precision == job.plan.precision
        assert not [p for p in job.with_plan(plan).problems() if p.severity == "error"]
    text = "\n".join(told({**found, 5: None}, simulate(job)))
    assert found[3].plan in text and "no plan of as many ranks fits" in text and "goes on" in text
    assert "goes on" not in "\n".join(told({5: None}, simulate(job)))
    with pytest.raises(UsageError, match="4 losses of 1 of 4 ranks leave none; 3 can"):
        survivors(job, 4, 1.0)


def test_nodes_are_lost_whole():
    job = Job.of(
        "llama3-8b", "16xh100", "tp8+sp dp_shard2.zero1 bf16", global_batch_size=16, seq_len=2048
    )
    with pytest.raises(UsageError, match="2 losses of 8 of 16 ranks leave none; 1 can"):
        survivors(job, 2, 1.0)


def test_so_many_ranks_take_the_plan_that_the_job_keeps_for_them(tmp_path: Path):
    words = ["plan", "quickstart", "laptop", "--global-batch-size", "12", "--seq-len", "64"]
    words += ["--budget", "2", "--survive", "1", "--save", str(tmp_path / "job.toml"), "--json"]
    answered = CliRunner().invoke(application(words), words)
    assert answered.exit_code == 0, answered.output
    (kept,) = json.loads(answered.stdout)["survive"]
    job = Job.load(tmp_path / "job.toml")
    assert job.survive == (kept["plan"],) and kept["ranks"] == job.plan.world_size - 1
    fewer = job.for_ranks(kept["ranks"])
    assert str(fewer.plan) == str(Plan.parse(kept["plan"])) and fewer.survive == job.survive
    assert fewer.train == job.train and job.for_ranks(job.plan.world_size) is job
    assert job.for_ranks(99) is job
    with pytest.raises(UsageError) as caught:
        Job.load(tmp_path / "job.toml", 'survive=["tq3"]')
    assert caught.value.key == "survive"

"""`partita plan --measure` on this machine: the best plans run, predicted beside measured."""

import json
from pathlib import Path

import pytest

from partita.base.errors import UsageError
from partita.cli.main import run
from partita.cost.machine import machine_of
from partita.simulate.predict import simulate
from partita.spec.calibrated import calibrated
from partita.spec.job import Job
from partita.tune.measure import measure

JOB = """
name = "measured"
model = {preset = "tiny"}
cluster = {preset = "laptop", devices = 2, devices_per_node = 2}
train = {global_batch_size = 4, seq_len = 32}
"""


def test_the_best_plans_are_run_and_the_fastest_is_first(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    monkeypatch.setenv("HOME", str(tmp_path))  # of a machine that has measured nothing
    words = f"plan {job} --fix fp32 --fix 2mb --forbid cp --top 3 --measure 2".split()
    assert run([*words, "--save", str(tmp_path / "best.toml"), "--json"]) == 0
    out, err = capsys.readouterr()
    plans = json.loads(out)["plans"]
    ran = [p["measured"] for p in plans]
    assert ran[2] is None and ran[0]["step_time_s"] <= ran[1]["step_time_s"]
    assert str(Job.load(tmp_path / "best.toml").plan) == plans[0]["plan"]
    for plan in plans[:2]:
        assert plan["plan"] in err
        assert plan["measured"]["peak_bytes"] == pytest.approx(
            plan["memory"]["peak_bytes"], rel=0.1
        )
    assert not list(tmp_path.glob("runs*"))
    assert "steps take" in err and "from now on" in err
    errors = []
    for cluster in (Job.load(job).cluster, calibrated(Job.load(job).cluster)):
        again = [
            simulate(Job.load(job, f"plan={p['plan']}"), machine_of(cluster)) for p in plans[:2]
        ]
        pairs = zip(again, ran[:2], strict=True)
        errors.append(sum(abs(p.step_time_s / r["step_time_s"] - 1) for p, r in pairs))
    assert errors[1] < errors[0]  # what was measured is known from now on
    assert not list(
        (tmp_path / ".cache/partita/clusters").glob("*.toml")
    )  # no calibration is touched


def test_more_ranks_than_a_machine_starts_are_refused() -> None:
    job = Job.of("tiny", "4096xh100", "dp4096", global_batch_size=4096, seq_len=64)
    with pytest.raises(UsageError, match="4096 ranks"):
        measure(job, [simulate(job)])

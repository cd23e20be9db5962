"""`partita plan --measure` on this machine: the best plans run, predicted beside measured."""

import json
from pathlib import Path

import pytest

from partita.base.errors import UsageError
from partita.cli.main import run
from partita.simulate.predict import simulate
from partita.spec.job import Job
from partita.tune.measure import measure

JOB = """
name = "measured"
model = {preset = "tiny"}
cluster = {preset = "laptop", devices = 2, devices_per_node = 2}
train = {global_batch_size = 4, seq_len = 32}
"""


def test_the_best_plans_are_run_and_the_fastest_is_first(tmp_path: Path, capsys) -> None:
    job = tmp_path / "job.toml"
    job.write_text(JOB)
    words = [
        "plan",
        str(job),
        "--fix",
        "fp32",
        "--fix",
        "2mb",
        "--forbid",
        "cp",
        "--top",
        "3",
        "--measure",
        "2",
    ]
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


def test_more_ranks_than_a_machine_starts_are_refused() -> None:
    job = Job.of("tiny", "4096xh100", "dp4096", global_batch_size=4096, seq_len=64)
    with pytest.raises(UsageError, match="4096 ranks"):
        measure(job, [simulate(job)])

"""`partita plan --measure` on this machine: the best plans run, predicted beside measured."""

import json
import os
from pathlib import Path

import pytest

from partita.base.errors import UsageError
from partita.cli.main import run
from partita.cli.plan import _measured
from partita.cost.machine import machine_of
from partita.planner.answers.answer import document
from partita.planner.answers.ask import Answer
from partita.planner.search.search import Found
from partita.simulate.predict import simulate
from partita.spec.calibrated import calibrated
from partita.spec.job import Job
from partita.tune.measure import Measured, measure, others
from partita.tune.others import busy_machine, cores_taken, ticks_worked

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


def test_a_machine_that_does_other_work_is_told(tmp_path: Path) -> None:
    """Ticks that were worked while nobody slept: a core and a half; of a quiet machine little, which is no
    word."""
    ticks = os.sysconf("SC_CLK_TCK")
    counted = iter([1000, 1000 + 3 * ticks])
    taken = cores_taken(2.0, lambda: next(counted), lambda s: None)
    assert taken == 1.5 and "other work took 1.5 of its" in busy_machine(taken)
    assert busy_machine(0.1) == "" and cores_taken(0.0, lambda: None) is None
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  5 1 3 900 40 2 1 7 99 0\ncpu0 1 1 1 1\n"
    )  # of guests, which are users' too
    assert ticks_worked(stat) == 5 + 1 + 3 + 2 + 1 + 7
    assert ticks_worked(tmp_path / "none") is None


def test_the_answer_says_what_else_ran(tmp_path: Path, monkeypatch) -> None:
    heard = iter([0.0, 1.25, 0.1])
    monkeypatch.setattr("partita.tune.measure._run", lambda job, p, *_: Measured(p, 1.0, 1))
    job = Job.of("tiny", "laptop", "dp_replicate2", global_batch_size=4, seq_len=32)
    found = simulate(job)
    ran = measure(job, [found, found], listen=lambda: next(heard))
    assert [m.others for m in ran] == [1.25, 1.25] and others(ran) == 1.25
    monkeypatch.setattr("partita.tune.measure.measure", lambda *_: ran)
    monkeypatch.setenv("HOME", str(tmp_path))
    answer = _measured(job, Answer(Found([found]), (found,)), 1)
    assert document(answer)["others"] == 1.25 and "1.2 of its" in answer.texts[-1]


def test_a_judged_plan_is_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("partita.tune.measure._run", lambda job, p, *_: Measured(p, 0.5, 7))
    monkeypatch.setattr("partita.tune.measure.cores_taken", lambda: 0.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = "plan tiny laptop --global-batch-size 4 --seq-len 32 --plan dp_replicate2 --measure 3"
    assert run([*words.split(), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["measured"] == {"step_time_s": 0.5, "peak_bytes": 7}


def test_more_ranks_than_a_machine_starts_are_refused() -> None:
    job = Job.of("tiny", "4096xh100", "dp4096", global_batch_size=4096, seq_len=64)
    with pytest.raises(UsageError, match="4096 ranks"):
        measure(job, [simulate(job)])

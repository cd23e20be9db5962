"""`partita doctor` on real processes: one document, every group of the plan, soon."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest

from partita.base.errors import PeerError, PlanError, UsageError
from partita.cli.main import run as command
from partita.tune import doctor
from partita.tune.doctor import doctor as doctor_of

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job, in the current folder."""
    monkeypatch.chdir(tmp_path)
    faults.write_job()


def check_document(text: str, code: int) -> dict[str, list[dict[str, object]]]:
    """Of two ranks; the checks by name."""
    document = json.loads(text)
    assert set(document) == {"format", "ok", "checks"} and document["format"] == 1
    assert code == (0 if document["ok"] else 1)  # a busy machine may have a slow link
    by: dict[str, list[dict[str, object]]] = {}
    for check in document["checks"]:
        assert set(check) == {"name", "rank", "ok", "value", "message"}
        by.setdefault(check["name"], []).append(check)
    for name in ("versions", "clock", "disk", "memory", "data", "compute"):
        assert [c["rank"] for c in by[name]] == [0, 1]
    assert all(c["ok"] for name in ("versions", "clock", "disk", "memory") for c in by[name])
    assert len(by["link"]) == 2 and "all_reduce over tp" in by
    return by


def test_a_job_is_examined_in_seconds_and_leaves_nothing(scratch, capfd) -> None:
    start = time.monotonic()
    code = command(["doctor", "job.toml", "--json"])
    assert time.monotonic() - start < 60
    check_document(capfd.readouterr().out, code)
    assert not Path("runs").exists() and not faults.left_behind(scratch)
    assert command(["doctor", "job.toml", "plan=tp3"]) == 1
    assert "tp" in capfd.readouterr().err.splitlines()[-1]


def test_a_rank_that_dies_is_named(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_enter", leave)
    with pytest.raises(PeerError, match="rank 1 died while it was looked at"):
        doctor.doctor(doctor.Job.load("job.toml"))


def leave(rank, writer, spec, needs) -> None:
    """Stands for a rank: one dies, the other says that it was left alone."""
    if rank == 0:
        error = PeerError("rank 1 did not come")
        writer.send(error)


def test_a_plan_that_is_searched_is_examined(monkeypatch, capfd) -> None:
    seen = []
    monkeypatch.setattr(doctor, "doctor", lambda job: seen.append(job) or doctor.Diagnosis(()))
    assert command(["doctor", "job.toml", "plan=auto", "cluster.devices=1", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"format": 1, "ok": True, "checks": []}
    (job,) = seen
    assert not job.auto and f'plan = "auto" is {job.plan}' in err
    with pytest.raises(PlanError, match="auto"):
        doctor_of(doctor.Job.load("job.toml", "plan=auto"))


def test_as_many_ranks_as_the_plan_has_are_examined(monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="torchrun started 3 ranks"):
        doctor_of(doctor.Job.load("job.toml"))


@pytest.mark.slow
def test_torchruns_ranks_are_examined() -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*words, "-m", "partita", "doctor", "job.toml", "--json"],
        capture_output=True,
        text=True,
        timeout=80,
    )
    check_document(done.stdout, done.returncode)

"""`partita doctor` on real processes: one document, every group of the plan, soon."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest

from partita.base.errors import PeerError
from partita.cli.main import run as command
from partita.tune import doctor

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

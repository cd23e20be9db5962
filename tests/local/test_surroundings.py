"""What surrounds a program, broken: its streams, its locale, its permissions, a stop before it has begun."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from partita.base import refused as refusal
from partita.base.config import to_toml
from partita.base.errors import CheckpointError, UsageError, WriteError
from partita.base.refused import refused, require_proc
from partita.model.families import export
from partita.model.reference import weight_shapes
from partita.spec.job import Job
from partita.spec.plan import Plan
from partita.train.checkpoints import checkpoint, pieces
from partita.train.launch import launcher as launch
from partita.train.launch import oom
from partita.train.launch.rank import _named
from partita.train.launch.start import _changed, run_folder
from partita.train.launch.torchrun import for_started, hold_world

DRAW = [sys.executable, "-m", "partita", "draw", "1f1b", "-p", "2", "-m", "2"]
WRONG = [sys.executable, "-m", "partita", "simulate", "nowhere.toml"]
JOB: dict[str, Any] = {
    "name": "small",
    "model": {
        "family": "llama", "layers": 1, "hidden": 16, "heads": 2, "ffn_hidden": 32, "vocab": 256,
        "max_seq_len": 32,
    },
    "data": {"source": "text.txt", "eval_fraction": 0},
    "train": {"steps": 1, "global_batch_size": 1, "seq_len": 16},
}  # fmt: skip
STRUCK = """
import os, signal, sys

class Strikes:
    def find_spec(self, name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.{name})

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts behind itself has none
sys.meta_path.insert(0, Strikes())
from partita.cli.entry import main
main()
"""


@pytest.mark.parametrize(
    ("name", "code", "told"), [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM")]
)
def test_a_stop_while_the_program_loads_is_a_line(name, code, told):
    words = [sys.executable, "-c", STRUCK.replace("{name}", name), "draw", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    assert done.returncode == code
    assert done.stderr == f"partita: stopped by {told}\n"
    error = {"kind": "stopped", "message": f"stopped by {told}", "file": None, "key": None}
    assert json.loads(done.stdout) == {"format": 1, "error": error}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    ("words", "streams", "code", "told"),
    [
        (DRAW, ">&-", 0, ""),
        ([*DRAW, "--json"], ">/dev/full", 73, "partita: cannot write: No space left on device\n"),
        (WRONG, "2>&-", 2, ""),
        ([*WRONG, "--json"], "2>/dev/full", 2, ""),
        ([*WRONG, "--json"], ">/dev/full 2>/dev/full", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full(words, streams, code, told):
    shell = ["sh", "-c", f'"$@" {streams}', "sh", *words]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (code, told)


def test_a_run_without_streams_and_in_a_locale_of_ascii(tmp_path):
    """Its log and sample are UTF-8 everywhere, and no file of its takes the place of stderr."""
    (tmp_path / "job.toml").write_text(to_toml(JOB))
    (tmp_path / "text.txt").write_text("ümläut " * 40, encoding="utf-8")
    bare = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    train = f'"{sys.executable}" -m partita train job.toml <&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", train], cwd=tmp_path, env=os.environ | bare, stdout=subprocess.PIPE, timeout=80
    )
    assert done.returncode == 0
    assert (tmp_path / "runs/small/sample.txt").read_text(encoding="utf-8").startswith("def ")


def test_all_that_cannot_be_written_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/small")
    (folder / "logs/rank-0.log").mkdir(parents=True)
    (folder / "checkpoints").write_text("a file where a folder is wanted")
    job = _job(tmp_path)
    with pytest.raises(WriteError) as caught:
        run_folder(job, fresh=False)
    assert str(caught.value) == (
        "cannot write runs/small/checkpoints: Not a directory; "
        "runs/small/logs/rank-0.log: it is no plain file"
    )


def _job(folder: Path) -> Job:
    (folder / "job.toml").write_text(to_toml(JOB))
    (folder / "text.txt").write_text("text " * 40)
    return Job.load(folder / "job.toml")


def test_a_start_that_updates_otherwise_says_so(tmp_path):
    before = tmp_path / "before.toml"
    before.write_text(_job(tmp_path).to_toml())
    (tmp_path / "job.toml").write_text(to_toml({**JOB, "train": {**JOB["train"], "lr": 0.01}}))
    again = Job.load(tmp_path / "job.toml")
    assert _changed(again, before) == " with train.lr = 0.01 (it was 0.0003)"
    longer = Job.load(tmp_path / "job.toml", "train.steps=9", "train.lr=3e-4")
    assert _changed(longer, before) == "" == _changed(again, tmp_path / "nowhere.toml")
    cosine = Job.load(tmp_path / "job.toml", "train.steps=9", 'train.lr_schedule="cosine"')
    assert _changed(cosine, before).endswith("(it was constant), train.steps = 9 (it was 1)")


def test_so_many_ranks_as_torchrun_started_take_the_plan_that_is_kept_for_them(
    tmp_path, monkeypatch, caplog
):
    job = replace(_job(tmp_path), survive=("tp2", "dp_replicate3", "dp_shard3")).with_plan("tp4")
    assert for_started(job) is job
    for ranks, plan in ((4, "tp4"), (3, "dp_replicate3"), (2, "tp2"), (1, "tp4")):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        found = for_started(job)
        assert found.plan.mesh == Plan.parse(plan).mesh and found.train == job.train
    told = [record.message.split(": ")[0] for record in caplog.records]
    assert told == ["3 of 4 ranks are there", "2 of 4 ranks are there"]
    with pytest.raises(UsageError, match=r"started 1 ranks.* and no plan of survive has 1: change"):
        hold_world(for_started(job), 1)


def test_what_the_system_refuses_is_told_with_what_mends_it(tmp_path, monkeypatch):
    shut = tmp_path / "shut"
    shut.mkdir()
    file = shut / "file"
    file.write_text("")
    forbidden = PermissionError(errno.EACCES, "Permission denied", str(file))

    def but(*kinds: int):
        return lambda path, mode: not (mode in kinds and Path(path) in (shut, file))

    told = {}
    for kind in (os.X_OK, os.R_OK, os.W_OK):
        monkeypatch.setattr(refusal.os, "access", but(kind))
        told[kind] = refused(forbidden)
    assert isinstance(told[os.X_OK], UsageError) and isinstance(told[os.R_OK], UsageError)
    assert str(told[os.X_OK]) == f"{file} is out of reach: no permission to enter {shut}"
    assert str(told[os.R_OK]) == f"{file} cannot be read: no permission"
    assert isinstance(told[os.W_OK], WriteError)
    assert str(told[os.W_OK]) == f"{file} cannot be written: no permission"
    many = refused(OSError(errno.EMFILE, "Too many open files"))
    assert isinstance(many, UsageError) and "ulimit -n" in str(many)
    assert isinstance(refused(OSError(errno.EIO, "Input/output error", "x")), WriteError)
    assert refused(OSError(errno.ENOENT, "No such file", "x")) is None
    require_proc(file)
    if sys.platform == "linux":
        with pytest.raises(UsageError, match="mount -t proc"):
            require_proc(tmp_path / "proc" / "stat")


@pytest.mark.parametrize("name", ["a_b.c", "partita.x"])
def test_a_library_that_a_rank_lacks_is_told_as_the_users_to_mend(name):
    with pytest.raises(ModuleNotFoundError) as caught:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    told = _named(1, caught.value)
    assert (told.exit_code == 70) == (name == "partita.x")
    lacks = "rank 1: a_b is not installed" in told.message and "pip install a-b" in told.message
    assert lacks == (name != "partita.x")


@pytest.mark.parametrize(
    ("line", "counts", "limit"),
    [
        ("0::/job/ranks", "memory.events", "memory.max"),
        ("4:memory:/elsewhere", "memory.oom_control", "memory.limit_in_bytes"),
    ],
    ids=["v2", "v1 from inside"],
)
def test_what_the_out_of_memory_killer_took_is_told(line, counts, limit, tmp_path):
    own, host = tmp_path / "own", tmp_path / "vmstat"
    own.write_text(f"1:name=systemd:/\n{line}\n")
    host.write_text("nr_free_pages 1\noom_kill 7\n")
    group = tmp_path / "job/ranks" if line.startswith("0") else tmp_path / "memory"
    group.mkdir(parents=True)
    for folder in {group, group.parent} - {tmp_path}:
        (folder / counts).write_text("oom_kill 1\nunder_oom 0\n")
        (folder / limit).write_text("max" if folder.name == "ranks" else str(3 << 30))
    before = oom.Killed.now(oom.own_group(own, tmp_path), host)
    assert before == oom.Killed(group, 1, 7) and before.limit_bytes == 3 << 30
    assert before.since(host) == ""
    host.write_text("oom_kill 8\n")
    assert before.since(host) == oom.HOST_STRUCK
    (group / counts).write_text("oom_kill 2\n")
    assert before.since(host) == oom.STRUCK
    told = oom.advice(before, 3, 10**9)
    assert "expects 1 GB on each of 3 ranks" in told and "allows 3.2" in told
    assert "cluster.memory_bytes=1073741824" in told
    assert oom.own_group(tmp_path / "none", tmp_path) is None


def test_a_piece_that_cannot_be_read_is_a_bad_checkpoint(tmp_path, monkeypatch):
    def forbid(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "rank-0.safetensors").write_bytes(b"")
    monkeypatch.setattr(pieces, "_head", forbid)
    manifest = type("Manifest", (), {"files": [type("File", (), {"file": "rank-0.safetensors"})]})
    with (
        pytest.raises(CheckpointError, match=r"rank-0.safetensors: cannot be read: Permission"),
        pieces._open(tmp_path, "rank-0.safetensors", manifest),  # pyright: ignore
    ):
        pass


def test_a_full_shared_memory_and_a_full_disk_are_told_as_such(tmp_path, monkeypatch):
    if Path("/dev/shm").is_dir():
        end = launch._end(-signal.SIGBUS)
        assert end.startswith(
            f"was killed by SIGBUS ({int(signal.SIGBUS)}), for want of shared memory"
        )
        assert "docker: --shm-size" in end
    full = OSError(errno.ENOSPC, "No space left on device")
    assert "there is none before it" in str(checkpoint._write_error(tmp_path / ".step-2.tmp", full))
    (tmp_path / "step-00000001").mkdir()
    assert "good one is kept" in str(checkpoint._write_error(tmp_path / ".step-2.tmp", full))

    def refuse(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", refuse)
    spec = _job(tmp_path).model
    weights = {name: torch.zeros(shape) for name, shape in weight_shapes(spec).items()}
    with pytest.raises(WriteError, match="export cannot be written: I/O error: No space"):
        export.export(tmp_path / "out", spec, weights.__getitem__)
    assert not list(tmp_path.glob("*out*"))

"""Full disks, killed saves, two owners of a run folder."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest
from saves import alone, files, is_step, save

from partita.base.errors import BusyError, WriteError
from partita.record.run import read_metrics
from partita.train.checkpoints import checkpoint
from partita.train.launch.lock import OWNER, Owner, RunLock
from partita.train.metrics import MetricsFile


@pytest.mark.parametrize("hurt", [0, 1])
def test_a_full_disk_on_one_rank_leaves_the_old_one_alone(tmp_path, hurt):
    old = save(tmp_path, 10)
    before = files(tmp_path)
    with pytest.raises(WriteError) as caught:
        save(tmp_path, 20, hurt=hurt)
    assert caught.value.exit_code == 73
    assert files(tmp_path) == before and is_step(old, 10)
    assert not list(tmp_path.glob(".step-*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename"])
def test_a_failing_disk_is_a_write_error(tmp_path, monkeypatch, call, code):
    old = save(tmp_path, 10)

    def fails(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails)
        with pytest.raises(WriteError, match=r"disk is full|Read-only|Input"):
            alone(tmp_path, 20)
    assert checkpoint.newest_complete(tmp_path) == old and is_step(old, 10)
    assert not list(tmp_path.glob(".step-*"))


def test_what_a_killed_save_left_is_cleared(tmp_path):
    save(tmp_path, 10)
    left = tmp_path / ".step-00000020.0011223344556677.tmp"
    left.mkdir()
    (left / "rank-0.safetensors").write_bytes(b"half")
    assert checkpoint.newest_complete(tmp_path).name == "step-00000010"
    save(tmp_path, 20)
    assert not left.exists()


SWEEP = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import saves as t

    def die_at(n):
        left = [n]
        def wrap(call):
            def counted(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0 and call is os_write:
                    call(args[0], bytes(args[1])[: len(args[1]) // 2])
                if left[0] <= 0:
                    os._exit(137)
                return call(*args, **kwargs)
            return counted
        os_write = os.write
        for name in ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "open", "close"):
            setattr(os, name, wrap(getattr(os, name)))

    root, n = Path(sys.argv[2]), 0
    while True:
        n += 1
        folder = root / str(n)
        for step in (10, 20):
            t.alone(folder, step)
        child = os.fork()
        if child == 0:
            die_at(n)
            t.alone(folder, 30)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            print(n)
            break
"""


def test_a_save_killed_at_any_call_leaves_the_old_or_the_new(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SWEEP), str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    calls, seen = int(ran.stdout), []
    assert calls > 20
    for n in range(1, calls + 1):
        newest = checkpoint.newest_complete(tmp_path / str(n))
        step = 30 if newest.name == "step-00000030" else 20
        assert is_step(newest, step)
        seen.append(step)
        after = alone(tmp_path / str(n), 40)
        assert is_step(after, 40) and not list((tmp_path / str(n)).glob(".step-*"))
    assert seen == sorted(seen) and {20, 30} == set(seen)


def test_a_run_folder_has_one_owner(tmp_path):
    hold = "import sys, time; from pathlib import Path; from partita.train.launch.lock import RunLock; "
    hold += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    owner = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"pid {owner.pid} on") as caught:
            RunLock(tmp_path)
        assert caught.value.exit_code == 75
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    with RunLock(tmp_path) as lock:
        assert lock.took_over and f"pid {owner.pid}" in lock.took_over
        with pytest.raises(BusyError, match=f"pid {os.getpid()}"):
            RunLock(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.took_over is None


def test_a_lock_that_a_read_only_disk_keeps_hides_no_error(tmp_path, monkeypatch):
    with pytest.raises(KeyError), RunLock(tmp_path), monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _read_only)
        with RunLock(tmp_path / "within"):
            raise KeyError
    assert not (tmp_path / OWNER).exists() and (tmp_path / "within" / OWNER).exists()
    with RunLock(tmp_path / "within") as lock:  # in the same process, once the disk is mended
        assert lock.took_over is None


def _read_only(path: Path, missing_ok: bool = False) -> None:
    raise OSError(errno.EROFS, "Read-only file system", str(path))


def test_an_owner_on_another_host_is_not_taken_over(tmp_path):
    (tmp_path / OWNER).write_bytes(msgspec.json.encode(Owner("elsewhere", 1, 0.0)))
    with pytest.raises(BusyError, match=r"pid 1 on elsewhere.*\.owner\.json"):
        RunLock(tmp_path)
    assert json.loads((tmp_path / OWNER).read_text())["host"] == "elsewhere"


def test_a_line_of_metrics_torn_by_a_kill_or_a_full_disk_is_no_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    metrics = MetricsFile(path)
    metrics.truncate_after(2)
    with monkeypatch.context() as full:
        full.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
        metrics.write({"step": 2, "loss": 1.5})
    path.write_text(path.read_text() + '{"step": 2')  # as much of it as there was room for
    metrics.write({"step": 3, "loss": 1.0})
    metrics.write({"step": 4, "loss": float("nan")})
    assert [x["step"] for x in read_metrics(path)] == [1, 3, 4]

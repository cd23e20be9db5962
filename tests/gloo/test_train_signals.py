"""`partita train` stopped from outside: SIGTERM, Ctrl-C, twice, the launcher killed; one owner a folder."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import psutil
import pytest

from partita.train.checkpoints import checkpoint
from partita.train.launch import launcher as launch
from partita.train.launch.lock import LOCK

pytestmark = pytest.mark.timeout(90)
LONG = "train.steps=100000"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job, in the current folder."""
    monkeypatch.chdir(tmp_path)
    faults.write_job()


def steps_done() -> int:
    """Lines of metrics.jsonl."""
    path = faults.RUN / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_steps(count: int) -> None:
    """Until so many steps are done."""
    deadline = time.monotonic() + 60
    while steps_done() < count and time.monotonic() < deadline:
        time.sleep(0.05)


def when_done(count: int, *numbers: int, gap_s: float = 0.0) -> threading.Thread:
    """Sends these signals to this process once so many steps are done."""

    def send() -> None:
        wait_for_steps(count)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(gap_s)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_one_signal_saves_and_leaves(number, code, scratch, capfd):
    """Twice at once is one: `timeout` signals the launcher, then the launcher's group."""
    asked = when_done(3, number, number)
    assert faults.train(LONG) == code
    asked.join()
    done = steps_done()
    newest = checkpoint.newest_complete(faults.RUN / "checkpoints")
    assert newest is not None and newest.name == f"step-{done:08d}"
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"partita: stopped by {signal.Signals(number).name} after step {done};")
    assert not (faults.RUN / "failure.json").exists() and not faults.left_behind(scratch)


def test_a_second_signal_stops_at_once(scratch, capfd, monkeypatch):
    monkeypatch.setattr(launch, "TOGETHER_S", 0)
    asked = when_done(3, signal.SIGTERM, signal.SIGTERM, gap_s=0.02)
    assert faults.train(LONG) == 143
    asked.join()
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("partita: stopped by SIGTERM at once, in step ")
    newest = checkpoint.newest_complete(faults.RUN / "checkpoints")
    assert newest is None or checkpoint.verify(newest)
    assert not faults.left_behind(scratch)


@pytest.fixture
def launched(small: None) -> Iterator[subprocess.Popen[str]]:
    """`partita train` as a process of its own, with its own group, some steps done."""
    process = subprocess.Popen(
        [sys.executable, "-m", "partita", "train", "job.toml", LONG],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_steps(3)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def listening(processes: list[psutil.Process]) -> list[str]:
    """The addresses that these processes listen on."""
    found = [c for p in processes for c in p.net_connections("inet")]
    return [
        c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN or c.type == socket.SOCK_DGRAM
    ]


def test_a_killed_launcher_leaves_nothing_that_hurts(launched, scratch, capfd, caplog):
    """Meanwhile: nothing listens beyond loopback, and a second launch is refused."""
    launcher = psutil.Process(launched.pid)
    family = launcher.children(recursive=True)
    assert len([p for p in family if p.is_running()]) >= 4  # fork server, tracker, two ranks
    assert set(listening([launcher, *family])) <= {"127.0.0.1", "::1"}
    assert faults.train() == 75
    told = capfd.readouterr().err
    assert f"taken by pid {launched.pid} on {socket.gethostname()}" in told

    launched.kill()
    assert faults.are_gone(family)
    assert not faults.left_behind(scratch)
    kept = checkpoint.newest_complete(faults.RUN / "checkpoints")
    assert kept is not None
    step = int(kept.name.removeprefix("step-"))
    assert faults.train(f"train.steps={step + 1}") == 0
    assert f"its last owner, pid {launched.pid} on " in caplog.text
    assert steps_done() == step + 1
    assert (faults.RUN / LOCK).exists()


@pytest.mark.slow
@pytest.mark.turns(3)
@pytest.mark.parametrize("gap", [0.0, 0.05, 0.3])
def test_two_signals_to_the_whole_group_are_a_stop(gap, launched, scratch):
    os.killpg(launched.pid, signal.SIGTERM)
    time.sleep(gap)
    os.killpg(launched.pid, signal.SIGTERM)
    _, err = launched.communicate(timeout=60)
    assert launched.returncode == 143, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("partita: stopped by SIGTERM "), err
    assert "Traceback" not in err
    assert not faults.left_behind(scratch)


@pytest.mark.slow
def test_one_ctrl_c_to_the_whole_group_saves_and_leaves(launched):
    os.killpg(launched.pid, signal.SIGINT)
    _, err = launched.communicate(timeout=60)
    assert launched.returncode == 130, err
    newest = checkpoint.newest_complete(faults.RUN / "checkpoints")
    assert newest is not None and newest.name == f"step-{steps_done():08d}"


LOST = """
import os, signal, time, typer
from partita.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts behind itself has none

class Meets:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})

class Verb:
    def main(self, **_):
        Meets()
        time.sleep(60)

typer.main.get_command = lambda _: Verb()
main.main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stop_that_the_code_it_meets_swallows_is_no_less_one(name, code):
    words = [sys.executable, "-c", LOST.replace("{signal}", name)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith("partita: stopped by ")

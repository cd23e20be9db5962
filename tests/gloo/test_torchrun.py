"""`torchrun ... -m partita train JOB` is the same run: same numbers, same folder, same faults."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import psutil
import pytest

from partita.train.checkpoints import checkpoint

pytestmark = pytest.mark.timeout(180)
AGENT = [sys.executable, "-m", "torch.distributed.run"]
ONE_HOST = ["--standalone", "--nproc-per-node", "2"]
JOB = ["-m", "partita", "train", "job.toml"]
LONG = "train.steps=100000"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    faults.write_job()


@pytest.fixture
def agents() -> Iterator[list[subprocess.Popen[str]]]:
    """Started agents; they and their ranks are ended with the test."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        family = (
            psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        )
        for p in family:
            p.kill()
        process.kill()
        process.communicate()


def start(agents: list[subprocess.Popen[str]], *words: str) -> subprocess.Popen[str]:
    """An agent; torchrun's own words, then the job's."""
    process = subprocess.Popen(
        [*AGENT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    agents.append(process)
    return process


def ranks_of(agent: subprocess.Popen[str], count: int = 2) -> list[psutil.Process]:
    """The processes of an agent's ranks, once they train."""
    deadline = time.monotonic() + 90
    path = faults.RUN / "metrics.jsonl"
    while time.monotonic() < deadline and agent.poll() is None:
        if path.exists() and path.read_text().count("\n") >= 3:
            break
        time.sleep(0.02)
    found = [p for p in psutil.Process(agent.pid).children() if "partita" in p.cmdline()]
    assert len(found) == count
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def newest() -> Path | None:
    """The last checkpoint that is whole; it is written behind the training."""
    folder = faults.RUN / "checkpoints"
    return checkpoint.newest_complete(folder) if folder.is_dir() else None


def test_it_is_the_same_run(agents) -> None:
    agent = start(agents, *ONE_HOST, *JOB, "--json")
    out, err = agent.communicate(timeout=150)
    assert agent.returncode == 0, err
    bar = next(line for line in err.splitlines() if line.startswith("train small  step 1/5"))
    assert all(x in bar for x in ("loss ", " tokens/s", "MFU ", "slowest rank ", " left")), bar
    answer = json.loads(out)  # one document: rank 0 speaks
    assert (answer["step"], answer["run"], answer["plan"]) == (5, "runs/small", "tp2 2mb")
    torchrun, weights = faults.metrics(), faults.weights()
    assert faults.train("name=local") == 0
    assert faults.metrics(Path("runs/local")) == torchrun
    assert faults.weights(Path("runs/local")) == weights


@pytest.mark.slow
@pytest.mark.turns(2, "torchrun restarts")
def test_a_killed_rank_is_told_and_a_restart_goes_on(agents, scratch: Path) -> None:
    agent = start(agents, *ONE_HOST, "--max-restarts", "1", *JOB, "train.steps=80")
    ranks_of(agent)[1].kill()
    _, err = agent.communicate(timeout=150)
    assert agent.returncode == 0, err
    assert "rank 1 has died" in err
    assert [x[0] for x in faults.metrics()] == list(range(1, 81))
    assert not (faults.RUN / "failure.json").exists()
    assert not faults.left_behind(scratch)


@pytest.mark.slow
@pytest.mark.turns(2, "torchrun ends")
def test_a_killed_rank_without_restarts(agents) -> None:
    agent = start(agents, *ONE_HOST, *JOB, LONG)
    ranks = ranks_of(agent)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not newest():
        time.sleep(0.02)
    ranks[1].kill()
    _, err = agent.communicate(timeout=150)
    assert agent.returncode != 0
    told = faults.failure()
    assert told["message"].startswith("rank 1 has died") and told["rank"] == 1
    assert "partita: rank 1 has died" in err
    assert newest() is not None


@pytest.mark.slow
@pytest.mark.turns(2, "torchrun ends")
def test_sigterm_to_the_agent_saves_and_leaves(agents) -> None:
    agent = start(agents, *ONE_HOST, *JOB, LONG)
    ranks_of(agent)
    agent.send_signal(signal.SIGTERM)
    _, err = agent.communicate(timeout=60)
    done = len(faults.metrics())
    found = newest()
    assert found is not None and found.name == f"step-{done:08d}", err
    assert f"stopped by SIGTERM after step {done}" in err


@pytest.mark.slow
@pytest.mark.turns(2, "torchrun ends")
def test_a_killed_agent_leaves_no_orphans(agents) -> None:
    agent = start(agents, *ONE_HOST, *JOB, LONG)
    family = ranks_of(agent)
    agent.kill()
    assert faults.are_gone(family)


TWICE = """
import partita as pt
for name in ("once", "again"):
    pt.train(pt.Job.load("job.toml", f"name={name}"))
"""


@pytest.mark.slow
@pytest.mark.turns(2, "torchrun ends")
def test_a_program_may_train_twice(agents) -> None:
    Path("twice.py").write_text(TWICE)
    agent = start(agents, *ONE_HOST, "twice.py")
    _, err = agent.communicate(timeout=150)
    assert agent.returncode == 0, err
    assert faults.metrics(Path("runs/once")) == faults.metrics(Path("runs/again"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
@pytest.mark.turns(2, "torchrun restarts")
def test_two_agents_are_two_hosts(agents, monkeypatch) -> None:
    """Ranks under two agents share no memory: gloo carries them, and the numbers are nearly those. One that
    dies is started anew with the others, though each agent counts that by itself."""
    words = [
        "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two",
        "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1", "--max-restarts", "3",
    ]  # fmt: skip
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    steps = "train.steps=40"
    first, second = (start(agents, *words, *JOB, "--json", steps) for _ in range(2))
    (lost,) = [p for a in (first, second) for p in ranks_of(a, 1) if p.environ()["RANK"] == "1"]
    lost.kill()
    answers = [x.communicate(timeout=150) for x in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), answers
    assert sorted(bool(out) for out, _ in answers) == [False, True]
    gloo = faults.metrics()
    assert faults.train("name=local", steps) == 0
    for one, other in zip(gloo, faults.metrics(Path("runs/local")), strict=True):
        assert one == pytest.approx(other, rel=1e-5)

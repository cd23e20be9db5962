"""A death on one of several hosts before any rank has loaded torch: the others leave, and say whose it was.

The ranks are real (`partita train`), on loopback; the hosts are the agents that started them; the store is
torch's. The torch that they load is one that never comes to an end, or meets its own: nothing but the
lifeline could tell them of each other.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import psutil
import pytest
import torch.distributed as dist

from partita.comm.liveness.wire import StoreWire

TORCH = """
import gc, os, pathlib, signal, time
from partita.comm.liveness.lifeline import Lifeline

(line,) = [x for x in gc.get_objects() if type(x) is Lifeline]
line._linked.wait()  # rank 0 knows it: no death is a silence from now on
pathlib.Path(f"loading-{os.environ['RANK']}").touch()
while not pathlib.Path("strike").exists():
    time.sleep(0.01)
if os.environ["RANK"] == pathlib.Path("strike").read_text():
    if os.environ["HOW"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ImportError("a library is missing")
time.sleep(600)
"""
AGENT = """
import json, os, subprocess, sys, time
for env, words, path in json.loads(sys.argv[1]):
    with open(path, "w") as err:
        subprocess.Popen(words, env={**os.environ, **env}, stderr=err)
time.sleep(600)
"""
STARTED_S = 60  # for a busy machine
pytestmark = pytest.mark.timeout(150)


class Launch:
    """Hosts of ranks, each under an agent, and the store between them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.agents = folder, dict[int, subprocess.Popen[bytes]]()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "own" / "torch").mkdir(parents=True)
        (folder / "own" / "torch" / "__init__.py").write_text(TORCH)

    def start(self, host: int, ranks: dict[int, int], each: int, size: int, *words: str) -> None:
        """An agent whose host has `each` ranks, of which these are started: {rank: local rank}."""
        told = []
        for rank, local in ranks.items():
            env = {
                "RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": each,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port,
                "PYTHONPATH": os.pathsep.join([str(self.folder / "own"), *sys.path]),
            }  # fmt: skip
            line = [sys.executable, "-m", "partita", *(words or ("train", "job.toml"))]
            told.append(({k: str(v) for k, v in env.items()}, line, f"err-{rank}"))
        words = (sys.executable, "-c", AGENT, json.dumps(told))
        self.agents[host] = subprocess.Popen(words, cwd=self.folder)

    def ranks(self, host: int, count: int) -> list[psutil.Process]:
        """Those of a host, once they load torch and are linked."""
        self.until(lambda: len(list(self.folder.glob("loading-*"))) >= count)
        found = psutil.Process(self.agents[host].pid).children()
        return sorted(found, key=lambda p: int(p.environ()["RANK"]))

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STARTED_S
        while not holds():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def said(self) -> dict[int, str]:
        """The last line of each rank."""
        found = {int(p.name[4:]): p.read_text().splitlines() for p in self.folder.glob("err-*")}
        return {r: lines[-1] if lines else "" for r, lines in sorted(found.items())}


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOW", "kill")
    faults.write_job(plan="dp_replicate4", train={"global_batch_size": 4})
    made = Launch(tmp_path)
    yield made
    for agent in made.agents.values():
        for process in [*psutil.Process(agent.pid).children(), agent]:
            process.kill()
        agent.wait()


DIED = "on {host} has died in step 0 (starting); rank {r} leaves in step 0 (starting)"
FAILED = "on {host} failed: our own fault: ImportError: a library is missing; rank {r} leaves"
FIRST = "on the first host has died by step 0 (starting); rank {r} leaves"


@pytest.mark.parametrize(
    ("struck", "how", "told"),
    [
        (2, "kill", DIED),
        pytest.param(2, "raise", FAILED, marks=pytest.mark.slow),
        pytest.param(0, "kill", FIRST, marks=pytest.mark.slow),
    ],
)
def test_a_death_while_others_load_is_told_to_all(launch, monkeypatch, struck, how, told) -> None:
    monkeypatch.setenv("HOW", how)
    launch.start(0, {0: 0, 1: 1}, 2, 4)
    launch.start(1, {2: 0, 3: 1}, 2, 4)
    others = [p for h in range(2) for p in launch.ranks(h, 4)]
    others.pop(struck)
    Path("strike").write_text(str(struck))
    assert faults.are_gone(others), launch.said()
    host = os.uname().nodename
    for r, said in launch.said().items():
        assert r == struck or said.startswith(
            f"partita: rank {struck} {told.format(host=host, r=r)}"
        )


@pytest.mark.slow
def test_a_rank_stopped_for_a_neighbour_that_never_started_names_that(launch) -> None:
    launch.start(0, {0: 0}, 1, 3)
    launch.start(1, {2: 1}, 2, 3)
    (first,), (second,) = (launch.ranks(h, 2) for h in range(2))
    second.send_signal(signal.SIGTERM)
    assert faults.are_gone([first, second]), launch.said()
    assert "did not start; beside it rank 2: stopped by SIGTERM; rank 0 leaves" in launch.said()[0]
    assert launch.said()[0].startswith("partita: rank 1 on ")


@pytest.mark.slow
def test_ranks_leave_with_their_launcher_and_the_others_hear_so(launch) -> None:
    launch.start(0, {0: 0}, 1, 2)
    launch.start(1, {1: 0}, 1, 2)
    (first,), (second,) = (launch.ranks(h, 2) for h in range(2))
    launch.agents[1].kill()
    launch.agents[1].wait()
    launch.agents.pop(1)
    assert faults.are_gone([first, second]), launch.said()
    assert " failed: its launcher is gone; rank 0 leaves" in launch.said()[0]


def test_an_error_before_torch_ends_the_others(launch) -> None:
    """A host without the job's file."""
    launch.start(0, {0: 0}, 1, 2)
    (first,) = launch.ranks(0, 1)
    launch.start(1, {1: 0}, 1, 2, "train", "missing.toml")
    assert faults.are_gone([first]), launch.said()
    assert " failed: missing.toml" in launch.said()[0] and "; rank 0 leaves" in launch.said()[0]


@pytest.mark.slow
def test_a_stop_while_a_failure_is_told_changes_nothing(launch) -> None:
    """Rank 0 is not there to tell it to: the rank waits for it."""
    launch.start(1, {1: 0}, 1, 2, "train", "missing.toml")
    launch.until(lambda: Path("err-1").exists() and "missing.toml" in Path("err-1").read_text())
    found = psutil.Process(launch.agents[1].pid).children()
    for process in found:
        process.terminate()
    assert faults.are_gone(found)
    assert "Traceback" not in Path("err-1").read_text()


@pytest.mark.parametrize("use_libuv", [True, False])
def test_the_wire_is_torchs(use_libuv) -> None:
    """What either of torch's servers is told by one is read by the other."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, use_libuv=use_libuv, wait_for_workers=False
    )
    wire = StoreWire("127.0.0.1", store.port, STARTED_S)
    wire.set("a/b", "said early")
    assert store.get("a/b") == b"said early"
    store.set("c", "said later")
    assert wire.get("c") == "said later"
    wire.close()


@pytest.mark.parametrize(("script", "told"), [("{}; true", "agent "), ("{} & exit", "CommError")])
def test_a_shell_may_stand_between_agent_and_rank_as_long_as_it_lives(script, told) -> None:
    code = (
        "import os, sys, time\n"
        "from partita.comm.processes import torchrun_agent\n"
        "parent = int(sys.argv[1])\n"
        f"while {script.endswith('exit')} and os.getppid() == parent: time.sleep(0.01)\n"
        "try: print('agent', torchrun_agent() == parent)\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    shell = ["sh", "-c", script.format('"$0" -c "$1" $$'), sys.executable, code]
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "hosts"}
    found = subprocess.run(shell, env=env, start_new_session=True, capture_output=True, text=True)
    assert found.stdout.startswith(told) and "False" not in found.stdout, found

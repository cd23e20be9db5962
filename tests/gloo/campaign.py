"""`python tests/gloo/campaign.py [WORD...]`: what befalls one of two hosts of a run, and what the others do.

Two hosts, namespaces of this machine (root, `ip`; netns.py), train under torchrun with `comm_timeout_s` 8,
one rank on each: nobody beside a lost rank could tell of it. A fault strikes one rank or its agent from
inside at a stated place (struck.py); two ranks on each, the link, and what is struck as processes start,
from outside. Printed: when ranks ended, with what codes, what they said last. The exit is 1 where a rank
that is able to leave has not, or after a death has not within 5 s. torchrun itself ends a stopped rank half
a minute later.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import psutil
from netns import Hosts, Program, missing

TIMEOUT_S = 8
DEATH_S = 5.0
START_S = 15  # for ranks to load what they need, on a busy machine
DEADLINE_S = TIMEOUT_S + 12 + START_S
PORT = 29555
STEP = 3  # that is struck; it ends with an evaluation and a checkpoint
LAST = 4
PLACES = {
    "loading torch": "import:torch",
    "joining": "call:partita.comm.distributed.torch:TorchWorld.__init__",
    "building": "call:partita.train.launch.rank:assemble",
    "loading a checkpoint": "call:partita.train.loop:Loop._restore",
    "data of the first step": "1:data",
    "first forward": "1:forward",
    "forward": f"{STEP}:forward",
    "backward": f"{STEP}:backward",
    "optimizer": f"{STEP}:optimizer",
    "evaluation": f"{STEP}:evaluation",
    "checkpoint": f"{STEP}:checkpoint",
    "last checkpoint": f"{LAST}:checkpoint",
    "last meeting": f"{LAST}:finished",
}
FIRST = {  # what rank 0 does alone
    "preparing": "call:partita.train.launch.start:run_folder",
    "sampling": "call:partita.train.launch.start:with_text",
}
KILL, STOP, TERM = (int(x) for x in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM))
Strike = Callable[[Hosts], None]


@dataclass(frozen=True)
class Fault:
    """A signal to a rank, or its agent, at a place; or what is done from outside at a moment of a run."""

    rank: int = 1
    how: str = str(KILL)
    place: str = "never"
    strike: Strike | None = None
    moment: str = "training"
    each: int = 1  # ranks of a host
    dies: bool = True  # a process, which is noticed at once


def agent(host: int, *words: str, each: int = 2, module: str = "partita") -> list[str]:
    """The torchrun of one host."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(each),
        "--rdzv-backend", "c10d", "--rdzv-id", "hosts", "--rdzv-endpoint",
        f"{Hosts.address(0)}:{PORT}", "--local-addr", Hosts.address(host), "-m", module, *words,
    ]  # fmt: skip


def ranks_of(hosts: Hosts, host: int) -> list[psutil.Process]:
    """The rank processes of a host, by rank."""
    found = []
    for pid in hosts.pids(host):
        try:
            process = psutil.Process(pid)
            if "RANK" in process.environ() and "struck" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def send(hosts: Hosts, number: int, host: int = 1, rank: int = 0) -> None:
    """A signal to a rank of a host."""
    ranks_of(hosts, host)[rank].send_signal(number)


def faults_of_ranks() -> dict[str, Fault]:
    """By title."""
    found = {}
    for name, place in PLACES.items():
        found[f"rank killed, {name}"] = Fault(1, str(KILL), place)
        found[f"rank 0 killed, {name}"] = Fault(0, str(KILL), place)
        found[f"launcher killed, {name}"] = Fault(1, f"a{KILL}", place)
        found[f"rank stopped, {name}"] = Fault(1, str(STOP), place)
    for name, place in FIRST.items():
        found[f"rank 0 killed, {name}"] = Fault(0, str(KILL), place)
        found[f"rank 0 stopped, {name}"] = Fault(0, str(STOP), place)
    for name in ("loading torch", "joining", "forward"):
        found[f"launcher stopped by SIGTERM, {name}"] = Fault(1, f"a{TERM}", PLACES[name])
        found[f"rank 0's launcher killed, {name}"] = Fault(0, f"a{KILL}", PLACES[name])
    return found


FAULTS = {
    **faults_of_ranks(),
    "of two ranks one killed, starting": Fault(
        strike=lambda h: send(h, KILL), moment="starting", each=2
    ),
    "rank 0 of two killed, starting": Fault(
        strike=lambda h: send(h, KILL, 0), moment="starting", each=2
    ),
    "of two ranks one killed, training": Fault(strike=lambda h: send(h, KILL), each=2),
    "of two ranks one stopped, training": Fault(strike=lambda h: send(h, STOP), each=2),
    "link down, training": Fault(strike=lambda h: h.link(1, "down"), each=2, dies=False),
}


def is_stopped(process: psutil.Process) -> bool:
    """Whether it is there and cannot leave."""
    return faults.is_alive(process.pid) and process.status() == psutil.STATUS_STOPPED


def reached(hosts: Hosts, fault: Fault) -> bool:
    """Whether the run has come to a fault's moment, or its place."""
    if fault.strike is None:
        return Path("struck").exists()
    if fault.moment == "training":
        path = faults.RUN / "metrics.jsonl"
        return path.exists() and path.read_text().count("\n") >= 3
    return all(len(ranks_of(hosts, h)) == fault.each for h in range(2))


def begin(hosts: Hosts, fault: Fault) -> list[Program]:
    """The agents of a run."""
    ends = fault.strike is None
    faults.write_job(
        plan=f"dp_replicate{2 * fault.each}",
        data={"eval_fraction": 0.05},
        train={
            "comm_timeout_s": TIMEOUT_S, "steps": LAST if ends else 100_000, "global_batch_size": 4,
            "checkpoint_every": STEP if ends else 0, "eval_every": STEP if ends else 0,
        },
    )  # fmt: skip
    words, env = ("train", "job.toml"), {"STRIKE": f"{fault.rank} {fault.how} {fault.place}"}
    return [
        hosts.start(
            h, agent(h, *words, each=fault.each, module="struck"), monotonic_s=9999 * h, env=env
        )
        for h in range(2)
    ]


def run(fault: Fault) -> dict[str, Any]:
    """One row of the campaign."""
    with Hosts() as hosts:
        agents = begin(hosts, fault)
        limit = time.monotonic() + 90
        there: dict[int, psutil.Process] = {}
        while not reached(hosts, fault):
            late = time.monotonic() > limit or any(a.process.poll() is not None for a in agents)
            if late:
                return {"still there": "never struck", "said": [a.err for a in agents]}
            if len(there) < 2 * fault.each:
                there |= {int(p.environ()["RANK"]): p for h in range(2) for p in ranks_of(hosts, h)}
            time.sleep(0.02)
        started = time.time()
        if fault.strike is not None:
            fault.strike(hosts)
        time.sleep(0.1)
        there |= {int(p.environ()["RANK"]): p for h in range(2) for p in ranks_of(hosts, h)}
        able = {r: p for r, p in there.items() if not is_stopped(p)}
        gone: dict[int, float] = {}
        while time.time() - started < DEADLINE_S and any(
            faults.is_alive(p.pid) for p in able.values()
        ):
            now = round(time.time() - started, 1)
            ended = [r for r, p in there.items() if not faults.is_alive(p.pid)]
            gone.update({r: now for r in ended if r not in gone})
            time.sleep(0.1)
        gone.update({r: round(time.time() - started, 1) for r in able if r not in gone})
        time.sleep(1.5)  # for the agents to tell
        orphans = [r for r, p in able.items() if faults.is_alive(p.pid)]
        codes = [a.process.poll() for a in agents]
        said = [[x for x in a.err.splitlines() if x.startswith("partita: ")] for a in agents]
        ranks = [re.findall(r"rank *: (\d+).*\n *exitcode *: (-?\d+)", a.err) for a in agents]
    told = faults.RUN / "failure.json"
    deadly = len(able) == len(there) and fault.dies
    return {
        "left after s": gone, "still there": orphans, "late": deadly and max(gone.values()) > DEATH_S,
        "agents' codes": codes, "ranks' codes": ranks, "said": said,
        "failure.json": json.loads(told.read_text()) if told.exists() else None,
    }  # fmt: skip


def main() -> int:
    if missing():
        sys.exit(f"no hosts on this machine: {missing()}")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    bad = 0
    for title, fault in FAULTS.items():
        if len(sys.argv) == 1 or any(w in title for w in sys.argv[1:]):
            os.chdir(tempfile.mkdtemp(prefix="hosts-"))
            found = run(fault)
            bad += bool(found["still there"] or found.get("late"))
            lines = [f"  {what}: {value}" for what, value in found.items()]
            sys.stdout.write("\n".join([f"== {title}", *lines, ""]))
            sys.stdout.flush()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

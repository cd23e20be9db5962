"""`python tests/gloo/campaign.py [WORD...]`: what befalls one of two hosts of a run, and what the others do.

Two hosts of two ranks each, namespaces of this machine (root, `ip`; netns.py), train under torchrun with
`comm_timeout_s` 8. Each fault strikes one of them in training, as its ranks join the others or as they
start. Printed: when ranks ended, with what codes, what they said last. The exit is 1 where a rank that is
able to leave has not. torchrun itself ends a stopped rank half a minute later.
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
from typing import Any

import faults
import psutil
from netns import Hosts, missing

TIMEOUT_S = 8
START_S = 15  # for ranks to load what they need, on a busy machine
DEADLINE_S = TIMEOUT_S + 12 + START_S
PORT = 29555
Strike = Callable[[Hosts], None]


def agent(host: int, *words: str) -> list[str]:
    """The torchrun of one host, two ranks each."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-id", "hosts", "--rdzv-endpoint",
        f"{Hosts.address(0)}:{PORT}", "--local-addr", Hosts.address(host), "-m", "partita", *words,
    ]  # fmt: skip


def ranks_of(hosts: Hosts, host: int) -> list[psutil.Process]:
    """The rank processes of a host, by rank."""
    found = []
    for pid in hosts.pids(host):
        try:
            process = psutil.Process(pid)
            if "RANK" in process.environ() and "partita" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def send(hosts: Hosts, number: int, host: int = 1, rank: int = 0) -> None:
    """A signal to a rank of a host."""
    ranks_of(hosts, host)[rank].send_signal(number)


def to_agent(hosts: Hosts, number: int, host: int = 1) -> None:
    """A signal to the torchrun of a host."""
    ranks_of(hosts, host)[0].parent().send_signal(number)


FAULTS: dict[str, Strike] = {
    "rank killed": lambda h: send(h, signal.SIGKILL),
    "rank stopped": lambda h: send(h, signal.SIGSTOP),
    "launcher killed": lambda h: to_agent(h, signal.SIGKILL),
    "launcher stopped by SIGTERM": lambda h: to_agent(h, signal.SIGTERM),
    "link down": lambda h: h.link(1, "down"),
    "first host's rank 0 killed": lambda h: send(h, signal.SIGKILL, 0),
    "first host's rank 0 stopped": lambda h: send(h, signal.SIGSTOP, 0),
    "first host's launcher killed": lambda h: to_agent(h, signal.SIGKILL, 0),
}
MOMENTS = ("training", "joining", "starting")


def is_stopped(process: psutil.Process) -> bool:
    """Whether it is there and cannot leave."""
    return faults.is_alive(process.pid) and process.status() == psutil.STATUS_STOPPED


def reached(hosts: Hosts, moment: str) -> bool:
    """Whether the run has come to a moment: it trains; a rank joins; the ranks' processes are there."""
    if moment == "training":
        path = faults.RUN / "metrics.jsonl"
        return path.exists() and path.read_text().count("\n") >= 3
    if moment == "joining":
        return (faults.RUN / "logs" / "rank-2.log").exists()
    return len(ranks_of(hosts, 0)) == 2 == len(ranks_of(hosts, 1))


def run(strike: Strike, moment: str) -> dict[str, Any]:
    """One row of the campaign."""
    faults.write_job(
        plan="dp_replicate2 tp2",
        train={"comm_timeout_s": TIMEOUT_S, "steps": 100_000, "checkpoint_every": 0},
    )
    with Hosts() as hosts:
        agents = [hosts.start(h, agent(h, "train", "job.toml"), monotonic_s=9999 * h)
                  for h in range(2)]  # fmt: skip
        limit = time.monotonic() + 90
        while not reached(hosts, moment):
            late = time.monotonic() > limit or any(a.process.poll() is not None for a in agents)
            if late:
                raise RuntimeError("\n".join(["no start", *(a.err for a in agents)]))
            time.sleep(0.02)
        started = time.monotonic()
        there = {int(p.environ()["RANK"]): p for h in range(2) for p in ranks_of(hosts, h)}
        strike(hosts)
        time.sleep(0.1)
        able = [p for p in there.values() if not is_stopped(p)]
        gone: dict[int, float] = {}
        while time.monotonic() - started < DEADLINE_S and any(faults.is_alive(p.pid) for p in able):
            now = round(time.monotonic() - started, 1)
            ended = [r for r, p in there.items() if not faults.is_alive(p.pid)]
            gone.update({r: now for r in ended if r not in gone})
            time.sleep(0.1)
        time.sleep(1.5)  # for the agents to tell
        orphans = [r for r, p in there.items() if p in able and faults.is_alive(p.pid)]
        codes = [a.process.poll() for a in agents]
        said = [[x for x in a.err.splitlines() if x.startswith("partita: ")] for a in agents]
        ranks = [re.findall(r"rank *: (\d+).*\n *exitcode *: (-?\d+)", a.err) for a in agents]
    told = faults.RUN / "failure.json"
    return {
        "left after s": gone, "still there": orphans, "agents' codes": codes, "ranks' codes": ranks,
        "said": said,
        "failure.json": json.loads(told.read_text()) if told.exists() else None,
    }  # fmt: skip


def main() -> int:
    if missing():
        sys.exit(f"no hosts on this machine: {missing()}")
    left = 0
    for name, strike in FAULTS.items():
        for moment in MOMENTS:
            title = f"{name}, {moment}"
            if len(sys.argv) == 1 or any(w in title for w in sys.argv[1:]):
                os.chdir(tempfile.mkdtemp(prefix="hosts-"))
                found = run(strike, moment)
                left += len(found["still there"])
                lines = [f"  {what}: {value}" for what, value in found.items()]
                sys.stdout.write("\n".join([f"== {title}", *lines, ""]))
                sys.stdout.flush()
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())

"""A search on several processes: the plans of one, whoever dies; nothing is left behind. Each in a process of
its own, which has one thread and no torch, and from which workers may be forked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from partita.planner.search import workers

ROOT = Path(__file__).parents[2]
BEGINS = """
import json, os, signal, sys
import partita as pt
from partita.planner.search.nodes import Goal
from partita.planner.search.search import Search, searcher

JOB = pt.Job.of("tiny", "4xh100", "", global_batch_size=8, seq_len=64)

def asked(processes, goal="time", budget_s=300.0, forbid=("offload",)):
    search = searcher(JOB, (), forbid)
    search.processes = processes
    found = search.best(Goal(goal), 5, budget_s)
    told = found.considered, found.considered - found.bounded - found.simulated, found.complete
    assert told[1] == found.rejected.total()
    return [[p.plan, p.step_time_s] for p in found.plans[:5]], found.considered, found.complete

def left_behind():
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
"""


def told_by(script: str):
    """What a script says of itself, as JSON."""
    words = [sys.executable, "-c", BEGINS + script]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_the_plans_of_several_processes_are_those_of_one():
    told = told_by("""
print(json.dumps([[asked(n, goal) for n in (1, 2, 3)] for goal in ("time", "memory")]))
assert left_behind() is None
""")
    for one, *several in told:
        assert one[2] and len(one[0]) == 5
        assert several == [one, one]


def test_what_a_worker_had_that_died_is_searched_again():
    """Killed with a unit in its hands; ended by an error; and at its end without a word."""
    told = told_by("""
work = Search._work

def killed(self, crew, queue, clock):
    crew.take()
    os.kill(os.getpid(), signal.SIGKILL)

def wrong(self, crew, queue, clock):
    crew.take()
    raise ValueError("no")

def dumb(self, crew, queue, clock):
    work(self, crew, queue, clock)
    os._exit(0)

found = [asked(1)]
for ends in (killed, wrong, dumb):
    Search._work = ends
    found.append(asked(3))
    assert left_behind() is None
print(json.dumps(found))
""")
    assert told[1:] == [told[0]] * 3


def test_a_search_that_is_stopped_or_late_leaves_no_process():
    told = told_by("""
late = asked(3, budget_s=0.0)
prove, parent = Search._prove, os.getpid()

def stopped(self, queue, *rest):
    if os.getpid() == parent:
        raise KeyboardInterrupt
    while True:  # a worker that does not end by itself
        signal.pause()

Search._prove = stopped
try:
    asked(3)
except KeyboardInterrupt:
    late = [*late, left_behind()]
print(json.dumps(late))
""")
    assert told[2:] == [False, None]


@pytest.mark.parametrize("what", ["torch", "threads", "cores"])
def test_one_process_is_enough_where_no_other_is_safe(what, monkeypatch):
    monkeypatch.setattr(workers.sys, "platform", "linux")
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(
        workers.threading, "enumerate", lambda: [workers.threading.current_thread()]
    )
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert workers.processes() == 3
    if what == "torch":
        monkeypatch.setitem(sys.modules, "torch", object())
    elif what == "threads":
        others = [workers.threading.current_thread(), object()]
        monkeypatch.setattr(workers.threading, "enumerate", lambda: others)
    else:
        monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: {1}, raising=False)
    assert workers.processes() == 1

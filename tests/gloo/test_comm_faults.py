"""A mismatch, a missing rank or a deadlock becomes one table, whatever carries the collectives.

`hosts` is gloo between ranks that share a store and nothing else. What thread ranks say of the same is in
tests/local/test_comm_local.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import comm_contract as contract
import pytest
import torch
import worlds

from partita.comm.board import Board
from partita.comm.table import Status

KINDS = ["shm", "gloo", "hosts"]
SHORT_S = 4  # where it must pass
LONG_S = 80  # where what is seen is seen without it
SLACK_S = 30  # for a busy machine
SEEN_BETWEEN_HOSTS = (
    "op",
)  # gloo takes the others for each other until the step is over: the last test
SITE = "blocks.3.attention.wo:reduce_from"


def befallen(world, how: str, starts: bool = False) -> tuple[float, str]:
    """Rank 1 is struck before its third collective, which the others may only start at first; (seconds, the
    error's text) on these."""
    comm = world.make(range(world.size), axis="tp", lane="tp")
    world.where.step, world.where.phase = 7, "B"
    for _ in range(2):
        comm.all_reduce(torch.ones(8), site="before")
    start = time.monotonic()
    if world.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "exits 0":
            os._exit(0)
        time.sleep(SHORT_S + SLACK_S)  # stuck in data loading; who has enough does not wait for it
    try:
        if starts:
            comm.start_all_reduce(torch.ones(8), site=SITE).wait()
        else:
            comm.all_reduce(torch.ones(8), site=SITE)
    except Exception as error:
        return time.monotonic() - start, str(error)
    return 0.0, ""


FAST = [("killed", "shm"), ("killed", "gloo"), ("killed", "hosts"), ("stopped", "shm")]
HOWS = ("killed", "exits 0", "stopped", "stuck in data loading")
SLOW = [(how, kind) for how in HOWS for kind in KINDS if (how, kind) not in FAST]


LATER = (pytest.mark.slow, pytest.mark.turns(2))


@pytest.mark.parametrize(("how", "kind"), [*FAST, *(pytest.param(*x, marks=LATER) for x in SLOW)])
def test_a_missing_rank_is_in_the_first_line(how, kind, tmp_path):
    gone = how in ("killed", "exits 0")
    told = gone and kind != "hosts"  # by the system
    patience = LONG_S if told else SHORT_S
    found = worlds.run(kind, 3, tmp_path, befallen, how, timeout_s=patience, enough=2)
    here = [what for r, (kind_of, what) in enumerate(found) if r != 1 and kind_of == "ok"]
    assert len(here) == 2, found
    # The second to fail may only see that the first has left.
    took, text = min(here, key=lambda x: ("rank 1 " not in x[1].splitlines()[0], x[0]))
    first, *table = text.splitlines()
    assert took < (0 if told else SHORT_S) + SLACK_S
    dies = "rank 1 has died" if told else "rank 1 did not come"
    assert first.startswith(dies), text
    for word in ("tp all_reduce #2", "group (0, 1, 2)", SITE, "phase B", "step 7"):
        assert word in first, text
    assert " ".join(table[0].split()) == "rank last call tensor site phase step state when line"
    assert any("entered" in line and "f32[8]" in line and "test_comm_faults.py:" in line
               for line in table), text  # fmt: skip


def chain(world) -> str:
    """Rank 0 waits for 1, which waits for 2, a second later; the error's text on these."""
    first, second = (world.make(pair, axis="pp", lane="pp_down") for pair in ((0, 1), (1, 2)))
    if world.rank == 2:
        time.sleep(SHORT_S + SLACK_S)
    first.barrier(site="before")
    if world.rank == 1:
        time.sleep(SHORT_S / 4)
    try:
        (second if world.rank else first).all_reduce(torch.ones(8), site=SITE)
    except Exception as error:
        return str(error).splitlines()[0]
    return ""


@pytest.mark.slow
def test_who_waits_is_not_taken_for_who_is_missing(tmp_path):
    found = worlds.run("shm", 3, tmp_path, chain, timeout_s=2 * SHORT_S, enough=2)
    assert found[1][1].startswith(f"rank 2 did not come within {2 * SHORT_S} s: pp "), found
    assert found[0][1].startswith("rank 1 has died: pp "), found


def test_a_board_tells_who_waits(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        board, other = Board(tmp_path / "board", 0, 2), Board(tmp_path / "board", 1, 2)
        other._pid = process.pid
        other.enter(Status(1, axis="tp", op="all_reduce", at=time.monotonic(), completed=False))
        assert board.waits(1, LONG_S) and not board.waits(1, 0) and not board.waits(0, LONG_S)
        process.send_signal(signal.SIGSTOP)
        while board.waits(1, LONG_S):  # until the signal has come
            time.sleep(0.01)
        process.send_signal(signal.SIGCONT)
        while not board.waits(1, LONG_S):
            time.sleep(0.01)
        other.leave()
        assert not board.waits(1, LONG_S)
        process.kill()


def late(world, folder) -> float:
    """Rank 1 comes once the run goes on again; how long that took on the clock, from before any rank could
    be stopped."""
    comm = world.make(range(world.size), axis="tp", lane="tp")
    start = time.monotonic()
    comm.barrier(site="before")
    if world.rank == 1:
        (folder / "waits").touch()
        while not (folder / "goes on").exists():
            time.sleep(0.01)
    comm.all_reduce(torch.ones(8), site=SITE)
    return time.monotonic() - start


@pytest.mark.slow
def test_a_run_that_is_stopped_as_a_whole_goes_on(tmp_path):
    """Ctrl-Z, for longer than a rank waits for another."""

    def stopped(pids: list[int]) -> None:
        while not (tmp_path / "waits").exists():
            time.sleep(0.01)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3 * SHORT_S)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        (tmp_path / "goes on").touch()

    found = worlds.run(
        "shm", 3, tmp_path, late, tmp_path, timeout_s=2 * SHORT_S, while_running=stopped
    )
    assert all(how == "ok" and took > 2 * SHORT_S for how, took in found), found


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        (how, kind)
        for how in ("op", "shape", "order")
        for kind in KINDS
        if kind != "hosts" or how in SEEN_BETWEEN_HOSTS
    ],
)
def test_unlike_calls_name_both_sides(how, kind, tmp_path):
    found = worlds.run(kind, 3, tmp_path, contract.disagreement, how, timeout_s=SHORT_S)
    texts = [what for kind_of, what in found if kind_of == "ok" and what]
    assert texts, found
    told = [t for t in texts if "ranks disagree" in t.splitlines()[0]]
    assert told, "\n".join(texts)
    first = max(told, key=len).splitlines()[0]
    assert "mlp.down:reduce_from" in first
    assert ("#1 of group (0, 1, 2)" if kind == "hosts" else "tp collective #1") in first
    other = {"op": "all_gather", "shape": "f32[5]", "order": "blocks.1.mlp.down:reduce_from"}[how]
    assert any(other in t and "f32[4]" in t for t in told), texts


@pytest.mark.parametrize(
    ("how", "starts"),
    [
        ("killed", True),
        pytest.param("killed", False, marks=pytest.mark.slow),
        pytest.param("stopped", False, marks=pytest.mark.slow),
    ],
)
def test_a_group_that_spans_hosts_names_the_missing_rank(how, starts, tmp_path):
    """Two hosts of two ranks: the one beside the lost rank sees it die, those of the other host ask. What is
    only started fails in its thread, and tells whoever waits for it."""
    found = worlds.run("hierarchy", 4, tmp_path, befallen, how, starts, timeout_s=SHORT_S, enough=3)
    texts = {r: what[1] for r, (kind, what) in enumerate(found) if kind == "ok"}
    assert set(texts) == {0, 2, 3}, found
    beside = texts[0].splitlines()[0]
    dies = "has died" if how == "killed" else f"did not come within {SHORT_S} s"
    number = 0 if starts else 2  # of those that a thread has made of the group's
    call = f"tp all_reduce #{number}"
    assert beside.startswith(f"rank 1 {dies}: {call}") and SITE in beside, texts
    assert any(texts[r].startswith(f"rank 1 did not come: {call}") for r in (2, 3)), texts


def test_a_group_that_spans_hosts_names_unlike_calls(tmp_path):
    found = worlds.run("hierarchy", 4, tmp_path, contract.disagreement, "op", timeout_s=SHORT_S)
    texts = [what for kind, what in found if kind == "ok" and "ranks disagree" in what]
    first = max(texts, key=len).splitlines()[0]
    assert "tp collective #1" in first and "mlp.down:reduce_from" in first, found
    assert any("all_gather" in t and "all_reduce" in t for t in texts), texts


def silent_mismatch(world) -> str:
    """Calls that gloo takes for each other: only their sites differ."""
    comm = world.make(range(world.size), axis="dp", lane="dp")
    site = f"blocks.{world.rank % 2}.unit:reduce"
    try:
        comm.all_reduce(torch.ones(4), site=site)
        world.check()
    except Exception as error:
        return str(error)
    return ""


def test_between_hosts_calls_are_compared_after_the_step(tmp_path):
    found = worlds.run("hosts", 2, tmp_path, silent_mismatch, timeout_s=SHORT_S)
    assert all("ranks disagree: the dp ranks (0, 1)" in what for _, what in found), found

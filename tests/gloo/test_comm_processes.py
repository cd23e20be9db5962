import os
import signal
import sys
import time
from pathlib import Path

import comm_contract as contract
import pytest
import torch
import worlds

KINDS = ["shm", "gloo"]
sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_every_collective(kind, size, tmp_path):
    assert worlds.run(kind, size, tmp_path, contract.collectives) == [("ok", 30)] * size


@pytest.mark.parametrize("kind", KINDS)
def test_large_tensors_and_overlap(kind, tmp_path):
    found = worlds.run(kind, 3, tmp_path, contract.large_and_overlapped)
    assert {how for how, _ in found} == {"ok"} and len(set(found)) == 1, found


@pytest.mark.parametrize("kind", KINDS)
def test_results_in_place(kind, tmp_path):
    assert worlds.run(kind, 3, tmp_path, contract.in_place) == [("ok", 3)] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_messages_by_key(kind, tmp_path):
    assert worlds.run(kind, 3, tmp_path, contract.messages) == [("ok", 12)] * 3


def test_shm_messages_beyond_the_ring_in_any_order(tmp_path):
    assert worlds.run("shm", 2, tmp_path, contract.messages, 40, 300_000) == [("ok", 40)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_clocked_transfers_between_processes(kind, tmp_path):
    done = worlds.run(kind, 3, tmp_path, contract.clocked, contract.collectives)
    assert done == [("ok", 30)] * 3
    (tmp_path / "two").mkdir()
    for how, what in worlds.run(kind, 2, tmp_path / "two", contract.overlap, 0.2):
        assert how == "ok", what
        assert [t - 0.2 for t in what] == pytest.approx([0.2, 0.2], abs=0.04)


@pytest.mark.parametrize("how", ["op", "shape", "order"])
def test_shm_disagreement_names_both_sides(how, tmp_path):
    found = worlds.run("shm", 3, tmp_path, contract.disagreement, how, timeout_s=5)
    text = max((what for kind, what in found if kind == "ok"), key=len)
    assert "ranks disagree at tp collective #1" in text, found
    assert "mlp.down:reduce_from" in text


def slow(world, victim: int) -> str:
    comm = world.make(range(world.size), axis="tp", lane="tp")
    world.where.step, world.where.phase = 7, "B"
    for _ in range(100_000):
        try:
            comm.all_reduce(torch.ones(8), site="blocks.3.attention.wo:reduce_from")
        except Exception as error:
            return f"{time.time()}\n{error}"
        if world.rank == victim:
            time.sleep(0.05)
    return ""


def leaves(world) -> str:
    comm = world.make(range(world.size), axis="tp", lane="tp")
    comm.all_reduce(torch.ones(8), site="first")
    if world.rank == 1:
        os._exit(0)
    try:
        comm.all_reduce(torch.ones(8), site="blocks.3.attention.wo:reduce_from")
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_is_named(kind, number, tmp_path):
    sent = []

    def strike(pids):
        time.sleep(3)
        sent.append(time.time())
        os.kill(pids[1], number)

    found = worlds.run(kind, 3, tmp_path, slow, 1, timeout_s=3, while_running=strike)
    how, text = found[0]
    assert how == "ok", found
    at, _, message = text.partition("\n")
    assert float(at) - sent[0] < 8
    assert message.startswith("rank 1 " if kind == "shm" else "rank "), message
    assert "all_reduce" in message and "step 7" in message and "attention.wo:reduce_from" in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_exits_in_order_is_named(kind, tmp_path):
    found = worlds.run(kind, 2, tmp_path, leaves, timeout_s=5)
    assert found[0][0] == "ok" and "rank 1 has died" in found[0][1], found


def test_nothing_is_left_in_shared_memory(tmp_path):
    before = set(Path("/dev/shm").iterdir())
    worlds.run("shm", 2, tmp_path, contract.messages)
    assert set(Path("/dev/shm").iterdir()) <= before

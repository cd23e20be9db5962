import fcntl
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import comm_contract as contract
import pytest
import worlds

from partita.comm.shm.shm import sweep
from partita.schedule.make import schedule

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


@pytest.mark.timed
@pytest.mark.parametrize("kind", KINDS)
def test_clocked_transfers_take_their_time_between_processes(kind, tmp_path):
    def totals():
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        found = worlds.run(kind, 2, folder, contract.overlap, 0.2)
        assert {how for how, _ in found} == {"ok"}, found
        return [t for _, what in found for t in what]

    contract.best_of(totals, 0.4, 0.44)


def all_bodies(world) -> list[int]:
    """One start of processes for all of them."""
    bodies = (contract.collectives, contract.uneven, contract.in_place, contract.messages)
    return [body(world) for body in (*bodies, contract.mixed_order)]


def test_groups_that_span_hosts(tmp_path):
    """Two hosts of two ranks: shared memory within each, gloo between them."""
    found = worlds.run("hierarchy", 4, tmp_path, all_bodies)
    assert found == [("ok", [30, 4, 4, 12, 12])] * 4


@pytest.mark.slow
def test_groups_that_span_hosts_with_large_tensors(tmp_path):
    found = worlds.run("hierarchy", 4, tmp_path, contract.large_and_overlapped)
    assert {how for how, _ in found} == {"ok"} and len(set(found)) == 1, found


def test_nothing_is_left_in_shared_memory_and_no_rank_runs_the_users_script(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("import os\nos._exit(3)")
    main = ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert worlds.run("shm", 2, tmp_path, contract.messages) == [("ok", 12)] * 2
    assert sys.modules["__main__"] is main
    assert not list(Path("/dev/shm").glob(f"{str(tmp_path).strip('/').replace('/', '-')}*"))


def test_what_a_run_left_that_never_joined_is_removed_by_the_next(tmp_path):
    left, held, young = (tmp_path / f"tmp-partita-{n}-ranks" for n in ("left", "held", "young"))
    for file in (left, held, young):
        file.touch()
        file.with_suffix(".board").touch()
        if file is not young:
            os.utime(file, (0, 0))
    with held.open() as rank:
        fcntl.flock(rank, fcntl.LOCK_SH)
        assert sweep(tmp_path) == [left]
    boards = {f.with_suffix(".board") for f in (held, young)}
    assert set(tmp_path.iterdir()) == {held, young} | boards
    assert sweep(tmp_path) == [held]


def hourglass_of(world, made) -> bool:
    """Its losses and gradients are one process's."""
    import hourglass
    import torch

    want, gradients = hourglass.one_process()
    before, loss, mine = hourglass.run(world, made)
    near = [torch.allclose(g, gradients[s], rtol=1e-12, atol=1e-13) for s, g in mine.items()]
    return before == loss and abs(loss - want) <= 1e-12 * abs(want) and all(near)


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_of_plain_modules(kind, tmp_path):
    made = schedule("interleaved_1f1b", num_ranks=2, num_microbatches=4, virtual_stages=2)
    assert worlds.run(kind, 2, tmp_path, hourglass_of, made) == [("ok", True)] * 2

"""Saves written behind the training: what was copied is what is written, by all ranks or by none."""

import errno
import threading
import types

import pytest
from saves import Meeting, alone, cut, header, is_step, save

from partita.base.errors import WriteError
from partita.train.checkpoints import background_save, checkpoint, pieces
from partita.train.checkpoints.manifest import read_manifest


@pytest.fixture
def disk(monkeypatch):
    """A disk that writes no tensors until it is told to, but of the rank that is `fast`; then it fails on the
    rank that is `hurt`."""
    state = types.SimpleNamespace(ready=threading.Event(), hurt=None, fast=None)
    write = checkpoint._write

    def slow(temporary, rank, step, parts):
        assert rank == state.fast or state.ready.wait(10)
        if rank == state.hurt:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(temporary, rank, step, parts)

    monkeypatch.setattr(checkpoint, "_write", slow)
    return state


def begin(folder, step, rank=0, world=1, ranks=checkpoint.ALONE, **more):
    """A save that has just begun, and the pieces it was given."""
    saves, parts = background_save.Behind(), list(cut(rank, world, step, 0))
    saves.start(checkpoint.Saving(folder, step, header(), ranks, 2), parts, **more)
    return saves, parts


def test_what_is_written_is_what_was_copied_bit_by_bit(tmp_path, disk):
    saves, parts = begin(tmp_path / "behind", 10)
    for part in parts:
        part.tensor.fill_(-1)  # training goes on
    assert saves.in_flight and not saves.advance() and not saves.advance()
    assert not checkpoint.list_checkpoints(tmp_path / "behind")
    disk.ready.set()
    saves.finish()
    assert not saves.in_flight and saves.advance()
    one = tmp_path / "behind" / "step-00000010"
    other = checkpoint.save_alone(tmp_path / "once", 10, 1, lambda r: cut(r, 1, 10, 0), header())
    assert is_step(one, 10)
    assert read_manifest(one).pieces == read_manifest(other).pieces
    raw = [(x / "rank-0.safetensors").read_bytes() for x in (one, other)]
    ids = [read_manifest(x).save_id.encode() for x in (one, other)]
    assert raw[0].replace(ids[0], ids[1]) == raw[1]


@pytest.mark.parametrize("hurt", [None, 0, 1])
def test_all_ranks_commit_or_all_raise_and_keep_the_old_one(hurt, tmp_path, disk):
    disk.ready.set()
    old = save(tmp_path, 10)
    disk.ready.clear()
    disk.hurt, meeting, found = hurt, Meeting(2), [None, None]

    def rank(r):
        saves, _ = begin(tmp_path, 20, r, 2, meeting.ranks(r, 2))
        over, error = saves.advance(), None
        meeting.barrier.wait(10)
        disk.ready.set()
        try:
            saves.finish()
        except WriteError as caught:
            error = caught
        found[r] = (over, saves.in_flight, error)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [f[:2] for f in found] == [(False, False)] * 2
    if hurt is None:
        assert [f[2] for f in found] == [None, None]
        assert is_step(checkpoint.newest_complete(tmp_path), 20)
    else:
        assert [f[2].echoes for f in found] == [hurt == 1, hurt == 0]
        assert "the disk is full" in found[hurt][2].message
        assert checkpoint.newest_complete(tmp_path) == old and is_step(old, 10)
    assert not list(tmp_path.glob(".step-*"))


def test_a_rank_that_is_through_trains_on_while_another_writes(tmp_path, disk):
    """It goes on to no stage in which it would wait for the other, whose next step waits for it."""
    disk.fast, meeting, step, found = 0, Meeting(2), threading.Barrier(2), {}

    def rank(r):
        saves, _ = begin(tmp_path, 10, r, 2, meeting.ranks(r, 2))
        if r == disk.fast:
            saves._thread.join(10)
        step.wait(10)
        over = saves.advance()
        step.wait(5)  # a collective of the next step
        disk.ready.set()
        saves.finish()
        found[r] = over, saves.in_flight

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {0: (False, False), 1: (False, False)}
    assert is_step(checkpoint.newest_complete(tmp_path), 10)


@pytest.mark.parametrize("in_files", [False, True])
def test_without_the_memory_for_a_copy_it_is_written_at_once(in_files, tmp_path, monkeypatch):
    """Nor are states copied into memory that lie in files, however much is free."""
    free = types.SimpleNamespace(available=10**12 if in_files else 100)
    monkeypatch.setattr(background_save.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(pieces.Piece, "copied", lambda self: pytest.fail("copied"))
    saves, _ = begin(tmp_path, 10, in_files=in_files)
    assert not saves.in_flight and is_step(tmp_path / "step-00000010", 10)
    alone(tmp_path, 10)  # is there already
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["step-00000010"]

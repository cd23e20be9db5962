"""The World of CPU ranks that share one host's memory: one mapped file, a region a group (shm_comm.py).

The file is unlinked once all have mapped it, so that a killed run leaves nothing behind. Where all were
killed before, the next run of the user finds it: nobody holds its lock.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from partita.base.errors import CommError
from partita.comm.board import Board
from partita.comm.protocol import Comm, Where
from partita.comm.shm.futex import SPINS, SPINS_OWN_CORE, Words, available
from partita.comm.shm.shm_comm import ShmComm, region_bytes
from partita.comm.single import SingleComm

__all__ = ["ShmComm", "ShmWorld", "available", "is_abandoned"]
FAST = Path("/dev/shm")
BOARD = ".board"
YOUNG_S = 60.0  # a file that may not be locked yet


def sweep(folder: Path = FAST) -> list[Path]:
    """Removes what runs of this user left that were killed before all their ranks had joined. Returns the
    files."""
    gone = []
    for file in folder.glob("*partita-*"):
        if file.suffix != BOARD and is_abandoned(file):  # a board goes with its file
            file.unlink(missing_ok=True)
            file.with_suffix(BOARD).unlink(missing_ok=True)
            gone.append(file)
    return gone


def is_abandoned(file: Path) -> bool:
    """Whether a file of this user is older than YOUNG_S and nobody holds it locked."""
    with suppress(OSError):
        found = file.stat()
        if found.st_uid == os.getuid() and time.time() - found.st_mtime >= YOUNG_S:
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            finally:
                os.close(descriptor)
    return False


class ShmWorld:
    """The ranks of a run on one host: all, or `ranks`. `path` names a new file that they can reach, on tmpfs
    if it may."""

    def __init__(
        self,
        rank: int,
        size: int,
        path: Path,
        *,
        timeout_s: float = 60.0,
        where: Where | None = None,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size, self.where = rank, size, where or Where()
        self.timeout_s = timeout_s
        here = tuple(ranks or range(size))
        self.spins = SPINS_OWN_CORE if len(here) <= len(os.sched_getaffinity(0)) else SPINS
        if rank == here[0]:
            sweep()
        name = str(path).strip("/").replace("/", "-")  # the run's own name keeps runs apart
        self.path = FAST / name if FAST.is_dir() else path
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        self._offset = 0
        self.board = Board(self.path.with_suffix(BOARD), rank, size, here)
        self.comms: list[ShmComm] = []
        everyone = self._region(here)
        words = Words(everyone, 1 + len(here))
        words.set(1 + here.index(rank), 1)
        late = next((r for i, r in enumerate(here) if not words.wait(1 + i, 1, timeout_s)), None)
        if rank == here[0] or late is not None:
            self.path.unlink(missing_ok=True)
            self.board.unlink()
        if late is not None:
            raise CommError(
                f"rank {late} did not join the {len(here)} ranks within {timeout_s:g} s"
            )
        self._joined = everyone

    def _region(self, ranks: tuple[int, ...]) -> mmap.mmap:
        """A group's part of the file."""
        return self.room(region_bytes(len(ranks)))

    def room(self, size: int) -> mmap.mmap:
        """The next whole pages of the file, the same on all ranks since all make all groups in one order."""
        start, self._offset = self._offset, self._offset + size
        if os.fstat(self._descriptor).st_size < self._offset:
            os.ftruncate(
                self._descriptor, self._offset
            )  # sparse: pages exist once they are touched
        return mmap.mmap(self._descriptor, size, offset=start)

    @property
    def shared_bytes(self) -> int:
        """Memory that the ranks' file takes: the pages that any of them has touched."""
        return 512 * os.fstat(self._descriptor).st_blocks

    def make(self, ranks: Sequence[int], *, axis: str, lane: str) -> Comm | None:
        """A Comm over `ranks`; every rank calls it for every group."""
        if len(ranks) == 1:
            return SingleComm(axis, lane, tuple(ranks)) if self.rank in ranks else None
        region = self._region(tuple(ranks))
        if self.rank not in ranks:
            region.close()
            return None
        comm = ShmComm(self, tuple(ranks), axis, lane, region)
        self.comms.append(comm)
        return comm

    def progress(self) -> None:
        """Moves sends that found their ring full: called by whoever waits."""
        for comm in self.comms:
            comm.mailbox.progress()

    def check(self) -> None:
        """Nothing to do: each meeting compares what ranks bring."""

    def close(self, drain: bool = True) -> None:
        """Leaves, once what was sent is in its rings; the kernel frees the memory with the last map."""
        deadline = time.monotonic() + self.timeout_s
        while (
            drain and any(c.mailbox.waiting() for c in self.comms) and time.monotonic() < deadline
        ):
            self.progress()
            if any(self.board.is_dead(r) for c in self.comms for r in c.mailbox.waiting()):
                break
            time.sleep(0.001)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

"""The status board: what each rank of a host entered last, in a small mapped file with one slot a rank.

A slot has one writer, its rank; a reader may see a torn line, which only garbles a message. Across hosts
there is no board: each rank then knows itself alone.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from partita.comm.processes import is_alive, is_stopped
from partita.comm.table import Status, describe

SLOT = 512
_HEAD = struct.Struct("<iii?dii")


class Board:
    """One rank's hold on the board; `path` None keeps it in this process. `here`: the ranks that write on it,
    all unless it is stated."""

    def __init__(
        self, path: Path | None, rank: int, size: int, here: Sequence[int] | None = None
    ) -> None:
        self.rank, self.size, self.here = rank, size, here or range(size)
        self.status = Status(rank)
        self._pid = os.getpid()
        self._map: mmap.mmap | None = None
        self._path, self.is_shared = path, path is not None
        if path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(descriptor, SLOT * size)
            self._map = mmap.mmap(descriptor, SLOT * size)
            os.close(descriptor)
        self._write()

    def unlink(self) -> None:
        """Removes the file; the map stays with those who have it."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def enter(self, status: Status) -> None:
        """Notes a call as entered."""
        self.status = status
        self._write()

    def leave(self) -> None:
        """Notes it as completed."""
        self.status.completed = True
        if self._map is not None:
            self._map[self.rank * SLOT + 12] = 1  # the head's flag

    def _write(self) -> None:
        if self._map is None:
            return
        s = self.status
        text = _text(s.axis, s.op, s.tensor, s.site, s.phase, s.file)
        numbers = (self._pid, s.sequence, s.step, s.completed, s.at, s.line, len(text))
        start = self.rank * SLOT
        _HEAD.pack_into(self._map, start, *numbers)
        self._map[start + _HEAD.size : start + _HEAD.size + len(text)] = text

    def read(self, rank: int) -> tuple[int, Status]:
        """(pid, status) of a rank; pid 0 where nothing is known."""
        if self._map is None:
            return (self._pid, self.status) if rank == self.rank else (0, Status(rank))
        start = rank * SLOT
        pid, sequence, step, completed, at, line, size = _HEAD.unpack_from(self._map, start)
        text = self._map[start + _HEAD.size : start + _HEAD.size + size].decode(errors="replace")
        words = text.split("\n")
        if len(words) != 6:  # torn
            return pid, Status(rank)
        axis, op, tensor, site, phase, file = words
        status = Status(
            rank, axis, op, tensor, sequence, site, phase, step, completed, at, file, line
        )
        return pid, status

    def is_dead(self, rank: int) -> bool:
        """Whether the rank was here and its process is gone."""
        pid, _ = self.read(rank)
        return bool(pid) and not is_alive(pid)

    def waits(self, rank: int, seconds: float) -> bool:
        """Whether the rank itself is held in a call, for less than that: it will tell for whom it waits. One
        that is stopped will not."""
        pid, status = self.read(rank)
        held = not status.completed and time.monotonic() - status.at < seconds
        return held and not is_stopped(pid)

    def statuses(self) -> list[Status | None]:
        """What every rank did last, and whether it is gone."""
        found: list[Status | None] = [self.read(r)[1] for r in range(self.size)]
        for status in found:
            if status is not None:
                status.left = self.is_dead(status.rank)
        return found

    def describe(self) -> str:
        """The table of all ranks."""
        found = self.statuses()
        here = [s for r in self.here if (s := found[r]) is not None]
        return describe(here, time.monotonic())


@lru_cache(maxsize=4096)
def _text(*words: str) -> bytes:
    """A slot's words: the same calls come back in every step."""
    return "\n".join(words).encode()[: SLOT - _HEAD.size]

"""The status board: what each rank of a host entered last, in a small mapped file with one slot a rank.

A slot has one writer, its rank; a reader may see a torn line, which only garbles a message. Across hosts
there is no board: each rank then knows itself alone.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from dataclasses import asdict
from pathlib import Path

from partita.comm.processes import is_alive
from partita.comm.table import Status, describe

SLOT = 512


class Board:
    """One rank's hold on the board; `path` None keeps it in this process."""

    def __init__(self, path: Path | None, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.status = Status(rank)
        self._map: mmap.mmap | None = None
        if path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(descriptor, SLOT * size)
            self._map = mmap.mmap(descriptor, SLOT * size)
            os.close(descriptor)
        self._write()

    def enter(self, status: Status) -> None:
        """Notes a call as entered."""
        self.status = status
        self._write()

    def leave(self) -> None:
        """Notes it as completed."""
        self.status.completed = True
        self._write()

    def _write(self) -> None:
        if self._map is None:
            return
        text = json.dumps({"pid": os.getpid(), **asdict(self.status)}).encode()[: SLOT - 1]
        start = self.rank * SLOT
        self._map[start : start + SLOT] = text + b"\0" * (SLOT - len(text))

    def read(self, rank: int) -> tuple[int, Status]:
        """(pid, status) of a rank; pid 0 where nothing is known."""
        if self._map is None:
            return (os.getpid(), self.status) if rank == self.rank else (0, Status(rank))
        raw = self._map[rank * SLOT : (rank + 1) * SLOT].rstrip(b"\0")
        try:
            found = json.loads(raw)
            return found.pop("pid"), Status(**found)
        except (ValueError, KeyError, TypeError):
            return 0, Status(rank)

    def is_dead(self, rank: int) -> bool:
        """Whether the rank was here and its process is gone."""
        pid, _ = self.read(rank)
        return bool(pid) and not is_alive(pid)

    def is_behind(self, rank: int, than: int) -> bool:
        """Whether a rank entered fewer calls of the axis another one waits on, or none."""
        mine, other = self.read(than)[1], self.read(rank)[1]
        if (mine.axis, mine.sequence, mine.op) == (other.axis, other.sequence, other.op):
            return False
        return other.at <= mine.at

    def describe(self) -> str:
        """The table of all ranks."""
        found = [self.read(r)[1] for r in range(self.size)]
        for status in found:
            status.left = self.is_dead(status.rank)
        return describe(found, time.monotonic())

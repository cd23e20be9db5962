"""What each rank of a group called, by number: gloo itself would add unlike tensors up, or wait.

On one host a mapped file holds, for every group and rank, a ring of its last collectives:

    word 2 k       the call's number + 1, where k = number mod RING
    word 2 k + 1   32 bits of its operation, shape, dtype and site

Each word has one writer. A rank posts before it calls and looks at the others' before it waits and after: of
ranks that disagree the last to come sees it at once. Without a file (several hosts) a rank keeps a sum of
its calls, which ranks compare once a step.
"""

from __future__ import annotations

import mmap
import os
import zlib
from pathlib import Path

from partita.comm.protocol import Message

RING = 64
_BYTES = 4 * 2 * RING


def page_bytes(num_ranks: int) -> int:
    """Bytes of a group's pages."""
    return -(-num_ranks * _BYTES // mmap.PAGESIZE) * mmap.PAGESIZE


class CallBook:
    """The file of one run, as one rank sees it; `path` None where ranks share no memory."""

    def __init__(self, path: Path | None) -> None:
        self._descriptor = -1
        self._size = 0
        if path is not None:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def pages(self, num_ranks: int) -> CallPages:
        """The part of the next group; all ranks make all groups in one order."""
        need = page_bytes(num_ranks)
        start, self._size = self._size, self._size + need
        if self._descriptor < 0:
            return CallPages(None)
        if os.fstat(self._descriptor).st_size < self._size:
            os.ftruncate(self._descriptor, self._size)
        return CallPages(mmap.mmap(self._descriptor, need, offset=start))

    def close(self) -> None:
        """Lets the file go; the pages stay with their groups."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class CallPages:
    """One group's calls."""

    def __init__(self, region: mmap.mmap | None) -> None:
        self.is_shared = region is not None
        self._words = memoryview(region).cast("I") if region is not None else None
        self.sum = 0  # of all own calls so far

    def post(self, rank: int, number: int, message: Message) -> int:
        """Notes the rank's own call; its 32 bits."""
        digest = zlib.crc32(repr(message).encode())
        self.sum = zlib.crc32(digest.to_bytes(4, "little"), self.sum)
        if self._words is not None:
            place = 2 * (rank * RING + number % RING)
            self._words[place + 1] = digest
            self._words[place] = (number + 1) & 0xFFFFFFFF
        return digest

    def differ(self, size: int, number: int, digest: int) -> bool:
        """Whether a rank of the group is known to have called something else under this number."""
        words = self._words
        if words is None:
            return False
        for rank in range(size):
            place = 2 * (rank * RING + number % RING)
            if words[place] == (number + 1) & 0xFFFFFFFF and words[place + 1] != digest:
                return True
        return False

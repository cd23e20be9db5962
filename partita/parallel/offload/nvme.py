"""States in files, streamed through bounded host memory (ZeRO-Infinity, Rajbhandari et al. 2021).

    reader    [0] [1] [2] [3]            buffers of host memory: SETS chunks of every state,
    update        [0] [1] [2] [3]        one read ahead, one updated, one written behind
    writer            [0] [1] [2] [3]

A file has no name (what dies leaves nothing) and all its bytes from the start: a disk that is too small
refuses before the first step. The update reads and writes past the page cache (O_DIRECT) where the file
system can; everything else (checkpoints, verify, initial values) sees the file as a mapped tensor.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from partita.base.errors import WriteError
from partita.base.units import format_bytes
from partita.comm.protocol import Where
from partita.parallel.offload.cpu import CHUNK, GRADIENT, MASTER, Away, Chunk, HostArena, Link

BLOCK = 4096  # what O_DIRECT wants offsets, lengths and addresses to be whole of
SETS = 3


def whole_blocks(size: int) -> int:
    """Bytes rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


class File:
    """A nameless file of flat tensors, each beginning on a block. Raises WriteError where the folder does
    not take it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                self._descriptor = self._direct = os.dup(file.fileno())
        except OSError as error:
            text = (
                f"offload:nvme cannot make files in {folder}: {error.strerror}; name another folder"
            )
            raise WriteError(f"{text} in cluster.disk_folder", file=str(folder)) from None
        weakref.finalize(self, os.close, self._descriptor)
        with suppress(
            OSError, AttributeError
        ):  # a file system without O_DIRECT, or none like Linux's
            self._direct = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDWR | os.O_DIRECT)
            weakref.finalize(self, os.close, self._direct)
        self._places: list[tuple[int, int, int]] = []  # address, bytes, offset

    @property
    def bytes_held(self) -> int:
        """Its size, as the file system has it."""
        return os.fstat(self._descriptor).st_size

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """A mapped tensor on the file's next blocks."""
        length = size * dtype.itemsize
        if not length:
            return torch.zeros(0, dtype=dtype)
        room, offset = whole_blocks(length), self.size
        try:
            os.posix_fallocate(self._descriptor, offset, room)
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            text = f"offload:nvme needs {format_bytes(offset + room)} or more in {self.folder}, "
            text += f"{format_bytes(free)} are free: {error.strerror}"
            raise WriteError(text, file=str(self.folder)) from None
        self.size += room
        mapped = torch.frombuffer(
            mmap.mmap(self._descriptor, room, offset=offset), dtype=dtype, count=size
        )
        self._places.append((mapped.data_ptr(), room, offset))
        return mapped

    def offset_of(self, part: Tensor) -> int:
        """Where a part of one of its tensors begins."""
        at = part.data_ptr()
        return next(o + at - a for a, n, o in self._places if a <= at < a + n)

    def read(self, offset: int, into: memoryview) -> None:
        """Fills a buffer of whole blocks."""
        done = 0
        while done < len(into):
            got = os.preadv(self._direct, [into[done:]], offset + done)
            if not got:
                raise OSError(f"the file of {self.folder} ends at {offset + done}")
            done += got

    def write(self, offset: int, data: memoryview) -> None:
        """Writes a buffer of whole blocks."""
        done = 0
        while done < len(data):
            done += os.pwritev(self._direct, [data[done:]], offset + done)


@dataclass
class DiskArena:
    """Flat tensors on disk, a file a ledger category; and the host's buffers they pass through."""

    where: Where
    folder: Path
    name: str = "disk"
    files: dict[str, File] = field(default_factory=dict)

    def zeros(self, category: str, size: int, dtype: torch.dtype) -> Tensor:
        """A mapped tensor of the category's file."""
        if category not in self.files:
            self.files[category] = File(self.folder)
        return self.files[category].zeros(size, dtype)

    def sizes(self) -> dict[str, int]:
        """Bytes on disk by category, as the file system has them."""
        return {c: f.bytes_held for c, f in self.files.items()}


class _Buffers:
    """Host memory of one chunk of every state, beginning on blocks; and what is still being written."""

    def __init__(self, away: Away, arena: HostArena) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.raw: dict[str, memoryview] = {}
        self.writing: list[Future[None]] = []
        for name, state in away.states.items():
            size = whole_blocks(CHUNK * state.element_size())
            room = arena.zeros("buffers", size + BLOCK, torch.uint8)
            start = -room.data_ptr() % BLOCK
            part = room[start : start + size]
            self.tensors[name], self.raw[name] = part.view(state.dtype), part.numpy().data

    def settle(self) -> None:
        """Waits until it may be filled again."""
        for future in self.writing:
            future.result()
        self.writing.clear()


@dataclass(frozen=True)
class _Part:
    """A chunk of a unit's states, and the buffers it passes through."""

    away: Away
    first: int
    end: int
    buffers: _Buffers


class DiskStream:
    """As HostStream, of states that lie in files: each chunk is read, yielded, and written back."""

    def __init__(self, aways: Sequence[Away], file: File, link: Link, arena: HostArena) -> None:
        self.file, self.link = file, link
        sets = [_Buffers(aways[0], arena) for _ in range(SETS)] if aways else []
        chunks = [(away, *part) for away in aways for part in away.parts()]
        self._parts = [_Part(*c, sets[i % SETS]) for i, c in enumerate(chunks)]
        threads = len(aways[0].states) if aways else 1
        self._reader, self._writer = ThreadPoolExecutor(threads), ThreadPoolExecutor(threads)

    def chunks(self) -> Iterator[Chunk]:
        """One pass over all states; when it is over, all is in the files."""
        start, parts = time.perf_counter(), self._parts
        ahead = self._read(parts[0]) if parts else []
        for i, part in enumerate(parts):
            for future in ahead:
                future.result()
            ahead = self._read(parts[i + 1]) if i + 1 < len(parts) else []
            unit, size = part.away.unit, part.end - part.first
            own = {name: t[:size] for name, t in part.buffers.tensors.items()}
            yield Chunk(
                part.away, part.first, {**own, GRADIENT: self.link.down(unit, part.first, part.end)}
            )
            self.link.up(unit, part.first, own[MASTER])
            self._write(part)
            if part.end == unit.master.numel():
                self._note(part.away, start)
                start = time.perf_counter()
        for part in parts[-SETS:]:
            part.buffers.settle()

    def _read(self, part: _Part) -> list[Future[None]]:
        part.buffers.settle()
        return [
            self._reader.submit(self.file.read, *self._place(part, name))
            for name in part.away.states
        ]

    def _write(self, part: _Part) -> None:
        part.buffers.writing = [
            self._writer.submit(self.file.write, *self._place(part, name))
            for name in part.away.states
        ]

    def _place(self, part: _Part, name: str) -> tuple[int, memoryview]:
        """Where in the file, and the whole blocks of its buffer."""
        state = part.away.states[name][part.first : part.end]
        return self.file.offset_of(state), part.buffers.raw[name][: whole_blocks(state.nbytes)]

    def _note(self, away: Away, start_s: float) -> None:
        size = sum(t.nbytes for t in away.states.values())
        for kind in ("read", "write"):
            self.link.moves.note("disk", f"{away.unit.name}:{kind}", size, start_s)
        self.link.note(away.unit, start_s)

"""States in files, streamed through bounded host memory (ZeRO-Infinity, Rajbhandari et al. 2021).

    update    [0] [1] [2] [3] [4]        buffers of host memory: SETS chunks of every state, one updated, the
    threads       [0] [1] [2] [3]        others written behind and then filled with the chunk SETS further on
               3   4   5   6

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
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from partita.base.errors import WriteError
from partita.base.units import format_bytes
from partita.comm.protocol import Where
from partita.parallel.offload.cpu import (
    GRADIENT,
    MASTER,
    WORKING,
    Away,
    Chunk,
    HostArena,
    Link,
    Moves,
)
from partita.parallel.offload.rules import CHUNK, SETS
from partita.parallel.units import Unit

BLOCK = 4096  # what O_DIRECT wants offsets, lengths and addresses to be whole of
THREADS = 8  # states of chunks read or written at a time


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

    def holds(self, part: Tensor) -> bool:
        """Whether a part of one of its tensors it is."""
        return any(a <= part.data_ptr() < a + n for a, n, _ in self._places)

    def read(self, part: Tensor, into: memoryview) -> None:
        """Fills the beginning of a buffer with a part of one of its tensors, past the mapping."""
        descriptor, offset, size = self._span(part)
        done = 0
        while done < size:
            done += os.preadv(descriptor, [into[done:size]], offset + done)

    def write(self, part: Tensor, data: memoryview) -> None:
        """Writes the beginning of a buffer into a part of one of its tensors, past the mapping."""
        descriptor, offset, size = self._span(part)
        done = 0
        while done < size:
            done += os.pwritev(descriptor, [data[done:size]], offset + done)

    def _span(self, part: Tensor) -> tuple[int, int, int]:
        """(descriptor, offset, bytes) of a part: past the page cache where it is whole blocks, or the last
        of its tensor, whose blocks belong to nobody else."""
        at = part.data_ptr()
        address, room, start = next(p for p in self._places if p[0] <= at < p[0] + p[1])
        offset, size = start + at - address, part.nbytes
        if offset % BLOCK:
            return self._descriptor, offset, size
        if at + whole_blocks(size) == address + room:
            size = whole_blocks(size)
        return (self._descriptor if size % BLOCK else self._direct), offset, size


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

    def read(self, part: Tensor, into: memoryview) -> None:
        """Fills the beginning of a buffer with a part of a mapped tensor."""
        self._file_of(part).read(part, into)

    def write(self, part: Tensor, data: memoryview) -> None:
        """Writes the beginning of a buffer into a part of a mapped tensor."""
        self._file_of(part).write(part, data)

    def _file_of(self, part: Tensor) -> File:
        return next(f for f in self.files.values() if f.holds(part))

    def sizes(self) -> dict[str, int]:
        """Bytes on disk by category, as the file system has them."""
        return {c: f.bytes_held for c, f in self.files.items()}


class Buffer:
    """Host memory of one chunk, beginning on a block: a tensor and its bytes; and what is written from it."""

    def __init__(self, elements: int, dtype: torch.dtype, arena: HostArena) -> None:
        size = whole_blocks(elements * dtype.itemsize)
        room = arena.zeros("buffers", size + BLOCK, torch.uint8)
        start = -room.data_ptr() % BLOCK
        part = room[start : start + size]
        self.tensor, self.raw = part.view(dtype), part.numpy().data
        self.writing: Future[None] | None = None

    def settle(self) -> None:
        """Waits until it may be filled again."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None


Buffers = Mapping[str, Buffer]  # by state


@dataclass(frozen=True)
class _Part:
    """A chunk of a unit's states, and the buffers it passes through."""

    away: Away
    first: int
    end: int
    buffers: Buffers

    def tensors(self) -> dict[str, Tensor]:
        """What is in the buffers."""
        size, names = self.end - self.first, (*self.away.states, *self.away.given)
        return {n: self.buffers[n].tensor[:size] for n in names}

    def reads(self, name: str) -> bool:
        """Whether the update starts from it: from the working shard too, without a master."""
        return name != WORKING or (self.away.working and MASTER not in self.away.states)

    def lies(self, name: str) -> Tensor:
        """The mapped part of a state."""
        every = {**self.away.states, **self.away.given, WORKING: self.away.unit.shard}
        return every[name][self.first : self.end]

    def goes_to(self, name: str) -> Tensor:
        """Where the updated state is written."""
        second = self.away.second.get(name)
        return self.lies(name) if second is None else second[self.first : self.end]


class DiskStream:
    """As HostStream, of states in files: each chunk is read, yielded, and its states written back."""

    def __init__(
        self, aways: Sequence[Away], disk: DiskArena, link: Link, arena: HostArena
    ) -> None:
        self.disk, self.link = disk, link
        self.aways, sets = aways, list[Buffers]()
        if aways:
            like = {**aways[0].states, **aways[0].given}
            if any(a.working for a in aways):
                like[WORKING] = aways[0].unit.working
            largest = max(min(a.unit.master.numel(), CHUNK) for a in aways)
            sets = [
                {n: Buffer(largest, t.dtype, arena) for n, t in like.items()} for _ in range(SETS)
            ]
        self._sets = sets
        self._threads = ThreadPoolExecutor(THREADS)

    def chunks(self, units: Collection[str]) -> Iterator[Chunk]:
        """One pass over all states of the units named; when it is over, all is in the files."""
        own = (a for a in self.aways if a.unit.name in units)
        places = [(away, *part) for away in own for part in away.parts()]
        parts = [_Part(*place, self._sets[i % SETS]) for i, place in enumerate(places)]
        start = time.perf_counter()
        turns = deque(self._turn(part, (), None) for part in parts[:SETS])
        for at, part in enumerate(parts):
            for future in turns.popleft():
                future.result()
            own, unit = part.tensors(), part.away.unit
            if GRADIENT not in own:
                own[GRADIENT] = self.link.down(unit, part.first, part.end)
            if MASTER not in own and part.away.working:
                narrow = part.buffers[WORKING].tensor[: part.end - part.first]
                own[MASTER] = self.link.widened(narrow)
            elif MASTER not in own:
                own[MASTER] = self.link.weights(unit, part.first, part.end)
            yield Chunk(part.away, part.first, own)
            written = list(part.away.states)
            if part.away.working:
                written.append(WORKING)
                part.buffers[WORKING].tensor[: part.end - part.first].copy_(own[MASTER])
            else:
                self.link.up(part.away, part.first, own[MASTER])
            following = parts[at + SETS] if at + SETS < len(parts) else None
            turns.append(self._turn(following, written, part))
            if part.end == unit.master.numel():
                self._note(part.away, start)
                start = time.perf_counter()
        for future in (f for turn in turns for f in turn):
            future.result()

    def _turn(
        self, comes: _Part | None, written: Sequence[str], goes: _Part | None
    ) -> list[Future[None]]:
        """Each buffer of a set is written where `goes` lies, as far as `written`, then filled with what
        `comes`: one piece of work, so that neither waits for the thread that computes."""
        one = comes or goes
        assert one is not None
        found = []
        for name, buffer in one.buffers.items():
            out = goes.goes_to(name) if goes is not None and name in written else None
            into = comes.lies(name) if comes is not None and comes.reads(name) else None
            found.append(self._threads.submit(self._write_then_read, buffer, out, into))
        return found

    def _write_then_read(self, buffer: Buffer, out: Tensor | None, into: Tensor | None) -> None:
        if out is not None:
            self.disk.write(out, buffer.raw)
        if into is not None:
            self.disk.read(into, buffer.raw)

    def _note(self, away: Away, start_s: float) -> None:
        note, name = self.link.moves.note, away.unit.name
        size = sum(t.nbytes for t in away.states.values())
        note("disk", f"{name}:read", size, start_s)
        note("disk", f"{name}:write", size, start_s)
        if away.working:
            note("disk", f"{name}:write", away.unit.shard.nbytes, start_s)
        if away.working and MASTER not in away.states:
            note("disk", f"{name}:read", away.unit.shard.nbytes, start_s)
        for given in away.given.values():
            note("disk", f"{name}:read", given.nbytes, start_s)
        self.link.note(away, start_s)


class DiskGradients:
    """Gradients in a file: what a microbatch makes is added to it chunk by chunk, written behind."""

    def __init__(
        self, units: Sequence[Unit], disk: DiskArena, arena: HostArena, moves: Moves
    ) -> None:
        self.disk, self.moves = disk, moves
        largest = max(min(u.sums.numel(), CHUNK) for u in units)
        made = [Buffer(largest, units[0].gradient.dtype, arena) for _ in range(SETS)]
        self._buffers, self._added = made[1:], made[0].tensor
        self._writer = ThreadPoolExecutor(1)

    def store(self, unit: Unit, into: Tensor, made: Tensor, adds: bool) -> None:
        """Adds `made`, on the device, to `into`, or puts it in its place."""
        start = time.perf_counter()
        for i, first in enumerate(range(0, made.numel(), CHUNK)):
            there, here = into[first : first + CHUNK], made[first : first + CHUNK]
            buffer = self._buffers[i % len(self._buffers)]
            buffer.settle()
            sums = buffer.tensor[: here.numel()]
            if adds:
                self.disk.read(there, buffer.raw)
                sums.add_(self._added[: here.numel()].copy_(here))
            else:
                sums.copy_(here)
            buffer.writing = self._writer.submit(self.disk.write, there, buffer.raw)
        self.moves.note("host", f"{unit.name}:offload", made.nbytes, start)
        for kind in ("read", "write") if adds else ("write",):
            self.moves.note("disk", f"{unit.name}:{kind}", made.nbytes, start)

    def fetch(self, unit: Unit, stored: Tensor) -> Tensor:
        """A copy on the device."""
        found = torch.empty(stored.shape, dtype=stored.dtype, device=unit.gradients.device)
        start = time.perf_counter()
        for first, part in self.chunks(unit, stored):
            found[first : first + part.numel()].copy_(part)
        self.moves.note("host", f"{unit.name}:reload", found.nbytes, start)
        return found

    def chunks(self, unit: Unit, stored: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first element, values in host memory) of all that is stored."""
        self.settle()
        start, buffer = time.perf_counter(), self._buffers[0]
        for first in range(0, stored.numel(), CHUNK):
            there = stored[first : first + CHUNK]
            self.disk.read(there, buffer.raw)
            yield first, buffer.tensor[: there.numel()]
        self.moves.note("disk", f"{unit.name}:read", stored.nbytes, start)

    def settle(self) -> None:
        """All that was stored is in the file."""
        for buffer in self._buffers:
            buffer.settle()

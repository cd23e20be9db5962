"""Where bytes wait: the host's memory, or a file that they pass the host's memory to.

put     device ──► buffer ──► file     written behind
expect             buffer ◄── file     read ahead
take    device ◄── buffer
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from partita.comm.protocol import Where
from partita.parallel.offload.cpu import HostArena
from partita.parallel.offload.nvme import Buffer, DiskArena, whole_blocks
from partita.parallel.offload.rules import KEPT_BUFFERS


class Shelf(Protocol):
    """Memory that bytes are put on and taken from again."""

    axes: tuple[str, ...]  # what a copy crosses on the way down

    def put(self, bytes_: Sequence[Tensor]) -> Any:
        """Takes copies of flat bytes, whose memory may be freed when it returns; a ticket for them."""
        ...

    def expect(self, ticket: Any) -> None:
        """They will be asked for soon."""
        ...

    def take(self, ticket: Any, into: Sequence[Tensor]) -> None:
        """Copies them back, in the order they were put; the ticket is spent."""
        ...


@dataclass
class HostShelf:
    """The host's memory; pinned where the device is an accelerator, so that nobody waits for a copy."""

    where: Where
    axes: tuple[str, ...] = ("host",)

    def put(self, bytes_: Sequence[Tensor]) -> list[Tensor]:
        """Copies, ordered on the current stream."""
        with self.where.on("host"):
            made = [torch.empty(b.shape, dtype=b.dtype, pin_memory=b.is_cuda) for b in bytes_]
        for there, here in zip(made, bytes_, strict=True):
            there.copy_(here, non_blocking=True)
        return made

    def expect(self, ticket: list[Tensor]) -> None:
        """Memory is at hand."""

    def take(self, ticket: list[Tensor], into: Sequence[Tensor]) -> None:
        """Copies back, ordered on the current stream."""
        for here, there in zip(into, ticket, strict=True):
            here.copy_(there, non_blocking=True)
        ticket.clear()


@dataclass
class _Slot:
    """Bytes in a file: what is being written there, and what is being read from it into which buffer."""

    place: Tensor
    size: int
    writing: Future[None]
    buffer: Buffer | None = None
    reading: Future[None] | None = None


class DiskShelf:
    """A file, of slots as long as `sizes` say from the start, and more when more is put. One buffer of host
    memory is filled while another is written, one read ahead while another is copied from."""

    axes = ("host", "disk")

    def __init__(self, disk: DiskArena, arena: HostArena, sizes: Sequence[int]) -> None:
        self.disk, self.arena = disk, arena
        self._slots = [self._slot(size) for size in sizes]
        each = KEPT_BUFFERS // 2
        self._out = [self._buffer(max(sizes, default=0)) for _ in range(each)]
        self._in = [self._buffer(max(sizes, default=0)) for _ in range(each)]
        self._reader, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def put(self, bytes_: Sequence[Tensor]) -> _Slot:
        """Copies into a buffer, which is written behind."""
        total = whole_blocks(sum(b.numel() for b in bytes_))
        buffer = self._out.pop(0)
        buffer.settle()
        buffer = self._long_enough(buffer, total)
        first = 0
        for b in bytes_:
            buffer.tensor[first : first + b.numel()].copy_(b)
            first += b.numel()
        place = self._free_slot(total)
        writing = self._writer.submit(self.disk.write, place[:total], buffer.raw)
        buffer.writing = writing
        self._out.append(buffer)
        return _Slot(place, total, writing)

    def expect(self, ticket: _Slot) -> None:
        """Reads ahead, if no other is."""
        if ticket.reading is None and len(self._in) > 1:
            self._read(ticket)

    def take(self, ticket: _Slot, into: Sequence[Tensor]) -> None:
        """Copies from the buffer; the slot is free."""
        if ticket.reading is None:
            self._read(ticket)
        assert ticket.buffer is not None and ticket.reading is not None
        ticket.reading.result()
        first = 0
        for b in into:
            b.copy_(ticket.buffer.tensor[first : first + b.numel()])
            first += b.numel()
        self._in.append(ticket.buffer)
        self._slots.append(ticket.place)

    def _read(self, ticket: _Slot) -> None:
        ticket.buffer = self._long_enough(self._in.pop(0), ticket.size)
        place, raw, writing = ticket.place[: ticket.size], ticket.buffer.raw, ticket.writing

        def read() -> None:
            writing.result()
            self.disk.read(place, raw)

        ticket.reading = self._reader.submit(read)

    def _slot(self, size: int) -> Tensor:
        return self.disk.zeros("activations", whole_blocks(size), torch.uint8)

    def _free_slot(self, size: int) -> Tensor:
        fits = [s for s in self._slots if s.numel() >= size]
        if not fits:
            return self._slot(size)
        best = min(fits, key=Tensor.numel)
        self._slots = [s for s in self._slots if s is not best]
        return best

    def _buffer(self, size: int) -> Buffer:
        return Buffer(size, torch.uint8, self.arena)

    def _long_enough(self, buffer: Buffer, size: int) -> Buffer:
        """Rows that a router chose may be more than an even share."""
        return buffer if buffer.tensor.numel() >= size else self._buffer(size)

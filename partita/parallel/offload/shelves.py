"""Where bytes wait: the host's memory, or a file that they pass the host's memory to.

put     device ──► buffer ──► file     written behind
expect             buffer ◄── file     read ahead
take    device ◄── buffer
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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
        """Copies flat bytes, which stay as they are until `left`; a ticket for them."""
        ...

    def lingers(self, ticket: Any) -> bool:
        """Whether a copy down is under way, so that `left` would wait."""
        ...

    def left(self, ticket: Any) -> None:
        """What is computed from now on may use the memory of what was put."""
        ...

    def expect(self, ticket: Any) -> None:
        """They will be asked for soon."""
        ...

    def take(self, ticket: Any, into: Sequence[Tensor]) -> None:
        """Copies them back, in the order they were put."""
        ...

    def arrived(self, ticket: Any) -> None:
        """What is computed from now on finds what was taken; the ticket is spent."""
        ...


@dataclass
class _Copies:
    """Of flat bytes in the host's memory; events on the device's streams, where it is an accelerator."""

    made: list[Tensor]
    down: torch.cuda.Event | None = None
    up: torch.cuda.Event | None = None


@dataclass
class HostShelf:
    """The host's memory. On a GPU it is pinned, and copies go on two streams of their own, down and up,
    beside what is computed: streams wait for each other, the host for none."""

    where: Where
    axes: tuple[str, ...] = ("host",)
    _streams: list[torch.cuda.Stream] = field(default_factory=list)

    def put(self, bytes_: Sequence[Tensor]) -> _Copies:
        """Copies, behind what is computed so far."""
        with self.where.on("host"):
            made = [torch.empty(b.shape, dtype=b.dtype, pin_memory=b.is_cuda) for b in bytes_]
        return _Copies(made, self._copied(0, made, bytes_))

    def lingers(self, ticket: _Copies) -> bool:
        """On a GPU."""
        return ticket.down is not None

    def left(self, ticket: _Copies) -> None:
        """The current stream waits for the copy down."""
        if ticket.down is not None:
            torch.cuda.current_stream().wait_event(ticket.down)

    def expect(self, ticket: _Copies) -> None:
        """Memory is at hand."""

    def take(self, ticket: _Copies, into: Sequence[Tensor]) -> None:
        """Copies back, behind what is computed so far, whose memory it may have been, and the copy down."""
        if ticket.down is not None:
            self._streams[1].wait_event(ticket.down)
        ticket.up = self._copied(1, into, ticket.made)
        ticket.made.clear()  # pinned memory is not used again before its copies are over

    def arrived(self, ticket: _Copies) -> None:
        """The current stream waits for the copy up."""
        if ticket.up is not None:
            torch.cuda.current_stream().wait_event(ticket.up)

    def _copied(
        self, way: int, into: Sequence[Tensor], given: Sequence[Tensor]
    ) -> torch.cuda.Event | None:
        """Copies on a stream (0 down, 1 up) and marks their end; on the CPU, at once."""
        device = next((t.device for t in (*into, *given) if t.is_cuda), None)
        if device is None:
            for there, here in zip(into, given, strict=True):
                there.copy_(here)
            return None
        if not self._streams:
            self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        stream = self._streams[way]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for there, here in zip(into, given, strict=True):
                there.copy_(here, non_blocking=True)
        return stream.record_event()


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

    def lingers(self, ticket: _Slot) -> bool:
        """All was copied when it was put."""
        return False

    def left(self, ticket: _Slot) -> None:
        """It has."""

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

    def arrived(self, ticket: _Slot) -> None:
        """It has."""

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

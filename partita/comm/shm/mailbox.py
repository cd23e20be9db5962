"""Keyed messages between ranks of a shared-memory group: a ring a directed pair.

    words   written (0, by the sender), read (16, by the receiver), both in chunks
    chunk   header (digest of the key, bytes of the message, offset) and CHUNK bytes of it

A send copies in as much as there is room for; the rest stays with the sender and moves whenever it waits or
sends again, so that no order of non-blocking sends can deadlock. The receiver parks what it did not expect.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from partita.base.errors import CommError
from partita.comm.board import Board
from partita.comm.protocol import Done, Handle, Key, Message, Sent, Where, message_of
from partita.comm.shm.futex import Words

CHUNK, CHUNKS = 1 << 18, 64  # 16 MB in flight a pair; pages exist once they are touched
_HEAD = struct.Struct("<IIQQ")
_HEAD_BYTES = 64


class Host(Protocol):
    """What groups ask of the World they are of."""

    rank: int
    spins: int
    timeout_s: float
    where: Where
    board: Board

    def progress(self) -> None:
        """Moves sends that found their ring full."""
        ...


class Group(Protocol):
    """What a mailbox asks of the group whose messages it carries."""

    rank: int
    size: int
    ranks: tuple[int, ...]
    world: Host

    def enter(self, op: str, x: Tensor, site: str) -> tuple[Message, int]:
        """Notes a call on the board."""
        ...

    def wait_word(
        self, words: Words, index: int, value: int, peer: int, note: tuple[Message, int]
    ) -> None:
        """Waits on a peer's word, and looks after the peer."""
        ...


def ring_bytes() -> int:
    """Bytes of one ring: a page of words, then chunks with their headers."""
    return mmap.PAGESIZE + CHUNKS * (CHUNK + _HEAD_BYTES)


class _Ring:
    """One directed pair's ring, as one of its two ends."""

    def __init__(self, region: mmap.mmap, start: int) -> None:
        self.memory = memoryview(region)[start + mmap.PAGESIZE : start + ring_bytes()]
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(region)) + start + mmap.PAGESIZE
        self.at = 0  # this end's own count

    @property
    def head(self) -> int:
        """Where the header of the chunk at hand begins; its payload is _HEAD_BYTES behind."""
        return (self.at % CHUNKS) * (CHUNK + _HEAD_BYTES)


SENT = Done(torch.empty(0))  # of every message


@dataclass(slots=True)
class _Outgoing:
    """A message that is on its way: `sent` bytes of `total` are in the ring."""

    data: Tensor  # contiguous
    total: int
    digest: int
    kind: int
    sent: int = 0
    done: bool = False


class Mailbox:
    """All rings of one group's rank."""

    def __init__(self, comm: Group, region: mmap.mmap, start: int) -> None:
        self.comm = comm
        n, me = comm.size, comm.rank
        self._rings: dict[tuple[int, int], _Ring] = {}
        self._words: dict[tuple[int, int], Words] = {}
        number = 0
        for a in range(n):
            for b in range(n):
                if a == b:
                    continue
                if me in (a, b):
                    place = start + number * ring_bytes()
                    self._rings[a, b] = _Ring(region, place)
                    self._words[a, b] = Words(region, 32, place, comm.world.spins)
                number += 1
        self._outgoing: dict[int, deque[_Outgoing]] = {r: deque() for r in range(n)}
        self._parked: dict[tuple[int, int, int], deque[Tensor]] = {}
        self._partial: dict[int, Tensor] = {}
        self._exchanges = 0

    def send(self, x: Tensor, to: int, key: Key, site: str) -> Sent:
        """Queues a copy and moves what fits; the handle does not hold x."""
        self.comm.enter("send", x, site)
        data = x.detach().contiguous()
        message = _Outgoing(data, data.numel() * data.element_size(), _digest(key), _kind(x.dtype))
        self._outgoing[to].append(message)
        self._move(to)
        if not message.done:  # the ring is full: the caller may change its tensor
            message.data = data.clone()
        self.comm.world.board.leave()
        return SENT

    def exchange(self, parts: Sequence[Tensor], counts: Sequence[int], site: str) -> Parts:
        """Sends every rank its part; `counts` are the rows that come from each.

        All ranks of the group number their exchanges alike: several under way may be waited for in any
        order."""
        me, self._exchanges = self.comm.rank, (self._exchanges + 1) % 65536
        for r, part in enumerate(parts):
            if r != me:
                self.send(part, r, Key("A", r, self._exchanges), site)
        coming = [parts[me].new_empty((n, *parts[me].shape[1:])) for n in counts]
        key = Key("A", me, self._exchanges)
        handles = [self.receive(x, r, key, site) if r != me else None for r, x in enumerate(coming)]
        return Parts(parts[me], handles)

    def progress(self) -> None:
        """Moves queued messages as far as there is room."""
        for to, queue in self._outgoing.items():
            if queue:
                self._move(to)

    def waiting(self) -> list[int]:
        """Ranks for whom messages are queued here."""
        return [self.comm.ranks[to] for to, queue in self._outgoing.items() if queue]

    def _move(self, to: int) -> None:
        ring, words = self._rings[self.comm.rank, to], self._words[self.comm.rank, to]
        queue = self._outgoing[to]
        while queue:
            message = queue[0]
            total, start = message.total, message.data.data_ptr()
            while message.sent < total or (total == 0 and not message.done):
                if not words.reached(16, ring.at - CHUNKS + 1):
                    return
                head, n = ring.head, min(CHUNK, total - message.sent)
                ctypes.memmove(ring.address + head + _HEAD_BYTES, start + message.sent, n)
                _HEAD.pack_into(
                    ring.memory, head, message.digest, message.kind, total, message.sent
                )
                message.sent += n
                message.done = message.sent >= total
                ring.at += 1
                words.set(0, ring.at)
            message.done = True
            queue.popleft()

    def receive(self, like: Tensor, source: int, key: Key, site: str) -> Handle:
        """Posts a receive; nothing moves until it is waited for."""
        message = message_of("receive", like.shape, like.dtype, site)
        return _Receive(self, like, source, key, message)

    def take(self, like: Tensor, source: int, key: Key, note: tuple[Message, int]) -> Tensor:
        """The message with this key, waited for; others that come first are parked."""
        want = (source, _digest(key), _kind(like.dtype))
        size = like.numel() * like.element_size()
        ring, words = self._rings[source, self.comm.rank], self._words[source, self.comm.rank]
        while not self._parked.get(want):
            if not words.reached(0, ring.at + 1):
                self.comm.world.progress()
                peer = self.comm.ranks[source]
                self.comm.wait_word(words, 0, ring.at + 1, peer, note)
            self._collect(ring, words, want, like)
        data = self._parked[want].popleft()
        if not self._parked[want]:
            del self._parked[want]
        if data.numel() * data.element_size() != size:
            raise CommError(
                f"rank {self.comm.world.rank} expects {size} bytes at {note[0].site}, rank "
                f"{self.comm.ranks[source]} sent {data.numel() * data.element_size()}"
            )
        return data if data.dtype == like.dtype else data.view(like.dtype).view(like.shape)

    def _collect(self, ring: _Ring, words: Words, want: tuple[int, int, int], like: Tensor) -> None:
        """Takes one chunk out of the ring: to a tensor like the one that is wanted, if it is that one; else
        to bytes, which are parked."""
        source, head = want[0], ring.head
        digest, kind, total, offset = _HEAD.unpack_from(ring.memory, head)
        if offset == 0:
            wanted = (source, digest, kind) == want and total == like.numel() * like.element_size()
            self._partial[source] = (
                torch.empty(like.shape, dtype=like.dtype)
                if wanted
                else torch.empty(total, dtype=torch.uint8)
            )
        data, n = self._partial[source], min(CHUNK, total - offset)
        ctypes.memmove(data.data_ptr() + offset, ring.address + head + _HEAD_BYTES, n)
        ring.at += 1
        words.set(16, ring.at)
        if offset + n >= total:
            del self._partial[source]
            self._parked.setdefault((source, digest, kind), deque()).append(data)


@dataclass(slots=True)
class _Receive:
    """A posted receive."""

    mailbox: Mailbox
    like: Tensor
    source: int
    key: Key
    message: Message
    value: Tensor | None = None

    def wait(self) -> Tensor:
        """The message."""
        if self.value is None:
            comm = self.mailbox.comm
            note = comm.enter("receive", self.like, self.message.site)
            self.value = self.mailbox.take(self.like, self.source, self.key, note)
            comm.world.board.leave()
        return self.value


@lru_cache(maxsize=4096)
def _digest(key: Key) -> int:
    """32 bits of a message's key."""
    return zlib.crc32(repr(key).encode())


@lru_cache(maxsize=64)
def _kind(dtype: torch.dtype) -> int:
    """A digest of the dtype."""
    return zlib.crc32(str(dtype).encode())


class Parts:
    """Rows of an all_to_all on their way; `own` stand where no handle is."""

    def __init__(self, own: Tensor, handles: list[Handle | None]) -> None:
        self._own, self._handles = own, handles
        self._value: Tensor | None = None

    def wait(self) -> Tensor:
        """All rows, in rank order."""
        if self._value is None:
            parts = [self._own if h is None else h.wait() for h in self._handles]
            self._value = torch.cat(parts)
        return self._value

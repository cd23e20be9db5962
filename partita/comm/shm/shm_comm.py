"""One group of CPU ranks in shared memory: a slot a rank, two buffers, one meeting a collective.

    rank 0   write slot 0 | word 0 := k | wait words 1..n >= k | read all slots
    rank 1   write slot 1 | word 1 := k | wait ...

Two buffers take turns: a rank may have two collectives under way, and writes for meeting k + 2 once all
have read meeting k (a word each says how far), so that no second meeting is needed. Sums go in rank
order; bf16 adds up in fp32 and rounds once. Larger tensors pass in chunks. A meeting compares a digest
of operation, shape, dtype and site first.
"""

from __future__ import annotations

import mmap
import time
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from partita.base.errors import CommError
from partita.comm.blocking import Blocking
from partita.comm.patience import Patience
from partita.comm.protocol import Handle, Key, Message, ReduceOp, Sent, message_of
from partita.comm.shm.futex import Words
from partita.comm.shm.mailbox import Host, Mailbox, ring_bytes
from partita.spec.hardware import SHARED_CHUNK_BYTES

SLOT = SHARED_CHUNK_BYTES  # both buffers of two ranks stay in the caches
PAGE = mmap.PAGESIZE
LOOK_S = 0.05  # how often a waiting rank looks whether its peers live
TELL_S = 3.5  # for a rank that waited in vain to say so: between hosts it asks all others first
LOW = (torch.bfloat16, torch.float16)


def region_bytes(num_ranks: int) -> int:
    """Bytes of a group's part of the file: words, slots, rings."""
    size = PAGE + 2 * num_ranks * SLOT + num_ranks * (num_ranks - 1) * ring_bytes()
    return -(-size // PAGE) * PAGE


class _Pending:
    """A collective that has its place in the group's order; `begun`: its first chunk is handed over."""

    def __init__(self, begin: Callable[[], int], finish: Callable[[_Pending], Tensor]) -> None:
        self._begin, self.begun, self.first = begin, False, 0
        self._finish: Callable[[_Pending], Tensor] | None = finish
        self._value: Tensor | None = None

    def begin(self) -> None:
        """Hands the first chunk over."""
        if not self.begun:
            self.first, self.begun = self._begin(), True

    def wait(self) -> Tensor:
        """Meets the others and returns the result."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._value = finish(self)
        assert self._value is not None
        return self._value


class ShmComm(Blocking):
    """One group on one axis and lane."""

    def __init__(
        self, world: Host, ranks: tuple[int, ...], axis: str, lane: str, region: mmap.mmap
    ) -> None:
        self.world, self.ranks, self.axis, self.lane = world, ranks, axis, lane
        self.rank, self.size = ranks.index(world.rank), len(ranks)
        self.called: Message | None = None  # what this call is a part of, where it is one
        n = self.size
        self._words = Words(region, 4 * n, spins=world.spins)  # written, two digests a rank, read
        self._bytes = torch.frombuffer(region, dtype=torch.uint8)
        self._meeting = 0  # chunks handed over so far
        self._sequence = 0
        self._pending: list[_Pending] = []
        self._digests: dict[tuple[object, ...], int] = {}
        self.mailbox = Mailbox(self, region, PAGE + 2 * n * SLOT)

    def moves(self, size: int) -> bool:
        """One chunk is handed over at once; of more, a rank copies each when it waits."""
        return size <= SLOT

    # Slots and meetings --------------------------------------------------------------------------

    def slot(self, rank: int, meeting: int, size: int) -> Tensor:
        """The first `size` bytes of a rank's buffer for a meeting."""
        start = PAGE + ((meeting & 1) * self.size + rank) * SLOT
        return self._bytes[start : start + size]

    def make_room(self, note: tuple[Message, int]) -> int:
        """The next meeting's number, once its buffer has been read by all."""
        k = self._meeting + 1
        for r in range(self.size):
            index = 3 * self.size + r
            if r != self.rank and k > 2 and not self._words.reached(index, k - 2):
                self.wait_word(self._words, index, k - 2, self.ranks[r], note)
        return k

    def hand_over(self, digest: int) -> int:
        """Says that this rank's slot is written; the meeting's number."""
        self._meeting += 1
        k = self._meeting
        self._words.view[self.size + 2 * self.rank + (k & 1)] = digest
        self._words.set(self.rank, k)
        return k

    def meet(self, k: int, digest: int, note: tuple[Message, int]) -> None:
        """Waits for all at meeting k, and compares what they bring."""
        for r in range(self.size):
            if r != self.rank and not self._words.reached(r, k):
                self.wait_word(self._words, r, k, self.ranks[r], note)
        view = self._words.view
        for r in range(self.size):
            if view[self.size + 2 * r + (k & 1)] != digest and view[r] - k < 2:
                raise self.disagreement(note)

    def wait_word(
        self, words: Words, index: int, value: int, peer: int, note: tuple[Message, int]
    ) -> None:
        """Waits on a peer's word; looks after the peer, and moves own sends, meanwhile. A peer that waits
        too, since later, is not who is missing: it is left the time to tell who is."""
        patience, timeout_s = Patience(self.world.timeout_s), self.world.timeout_s
        while not words.wait(index, value, LOOK_S):
            self.world.progress()
            if self.world.board.is_dead(peer):
                time.sleep(0.1)
                raise self.failure(peer, "has died", note)
            told_s = timeout_s + TELL_S
            if patience.is_over() and (
                patience.left_s < -told_s or not self.world.board.waits(peer, told_s)
            ):
                raise self.failure(peer, f"did not come within {timeout_s:g} s", note)

    def failure(self, peer: int, how: str, note: tuple[Message, int]) -> CommError:
        """The error of a wait: the cause first, then what was asked, then every rank's last call."""
        message, number = note
        where = self.world.where
        error = CommError(
            f"rank {peer} {how}: {self.axis} {message.op} #{number} of group {self.ranks} ({message.site}, "
            f"phase {where.phase}, step {where.step}) cannot complete on rank {self.world.rank}\n"
            f"{self.world.board.describe()}"
        )
        error.rank = peer
        return error

    def disagreement(self, note: tuple[Message, int]) -> CommError:
        """The error of ranks that call unlike collectives."""
        message, number = note
        time.sleep(0.02)  # the others' notes are written before they meet
        return CommError(
            f"ranks disagree at {self.axis} collective #{number} ({message.site}, phase "
            f"{self.world.where.phase}): rank {self.world.rank} brings {message}\n"
            f"{self.world.board.describe()}"
        )

    def enter(self, op: str, x: Tensor, site: str) -> tuple[Message, int]:
        """Notes the call on the board."""
        message = self.called or message_of(op, x.shape, x.dtype, site)
        number, self._sequence = self._sequence, self._sequence + 1
        status = self.world.board.status
        status.enter(self.axis, message, number, self.world.where)
        self.world.board.enter(status)
        return message, number

    def digest(self, message: Message, extra: int = 0) -> int:
        """32 bits of what must agree."""
        key = (message, extra)
        found = self._digests.get(key)
        if found is None:
            found = self._digests[key] = zlib.crc32(repr(key).encode())
        return found

    # Collectives ---------------------------------------------------------------------------------

    def _start(
        self,
        message: tuple[Message, int],
        write: Callable[[int, int], None],
        read: Callable[[int, int], None],
        chunks: int,
        result: Callable[[], Tensor],
        extra: int = 0,
    ) -> Handle:
        """`write(chunk, meeting)` fills the own slot, `read(chunk, meeting)` takes from all slots.

        There are two buffers: of the collectives under way the first two of one chunk are handed over
        at once; what comes later, and one of many chunks, waits with its bytes until its turn."""
        digest = self.digest(message[0], extra)

        def begin() -> int:
            write(0, self.make_room(message))
            return self.hand_over(digest)

        def finish(pending: _Pending) -> Tensor:
            while self._pending[0] is not pending:
                self._pending[0].wait()
            pending.begin()
            for chunk in range(chunks):
                k = pending.first + chunk
                if (
                    chunk + 1 < chunks
                ):  # the next one too: who is late there is waited for here alone
                    write(chunk + 1, self.make_room(message))
                    self.hand_over(digest)
                self.meet(k, digest, message)
                read(chunk, k)
                self._words.set(3 * self.size + self.rank, k)
            self._pending.remove(pending)
            self.world.board.leave()
            return result()

        pending = _Pending(begin, finish)
        at_once = chunks == 1 and len(self._pending) < 2 and all(p.begun for p in self._pending)
        self._pending.append(pending)
        if at_once:
            pending.begin()
        return pending

    def start_all_reduce(
        self, x: Tensor, *, site: str, op: ReduceOp = "sum", out: Tensor | None = None
    ) -> Handle:
        """Every rank adds up all slots, in rank order."""
        note = self.enter("all_reduce", x, site)
        source = x.detach().contiguous().view(-1)
        out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
        flat = out.view(-1)
        each = SLOT // x.element_size()
        size = x.element_size()

        def part(rank: int, meeting: int, count: int) -> Tensor:
            return self.slot(rank, meeting, count * size).view(x.dtype)

        def write(chunk: int, meeting: int) -> None:
            piece = source[chunk * each : (chunk + 1) * each]
            part(self.rank, meeting, piece.numel()).copy_(piece)

        def read(chunk: int, meeting: int) -> None:
            target = flat[chunk * each : (chunk + 1) * each]
            parts = [part(r, meeting, target.numel()) for r in range(self.size)]
            reduce_into(target, parts, op)

        chunks = max(-(-source.numel() // each), 1)
        return self._start(note, write, read, chunks, lambda: out, int(op == "max"))

    def start_all_gather(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Every rank copies all slots to their places."""
        note = self.enter("all_gather", x, site)
        small = x.numel() * x.element_size() <= SLOT
        shape = list(x.shape)
        shape[dim] *= self.size
        out = torch.empty(shape, dtype=x.dtype) if out is None else out
        if small:
            places = out.chunk(self.size, dim)
            size = x.numel() * x.element_size()

            def view(rank: int, meeting: int) -> Tensor:
                return self.slot(rank, meeting, size).view(x.dtype).view(x.shape)

            def write(_: int, meeting: int) -> None:
                view(self.rank, meeting).copy_(x.detach())

            def read(_: int, meeting: int) -> None:
                for r, place in enumerate(places):
                    place.copy_(view(r, meeting))

            return self._start(note, write, read, 1, lambda: out, dim)
        return self._chunked_gather(note, x, out, dim)

    def _chunked_gather(
        self, note: tuple[Message, int], x: Tensor, out: Tensor, dim: int
    ) -> Handle:
        source = x.detach().contiguous().view(-1)
        flat = (
            torch.empty(self.size, source.numel(), dtype=x.dtype)
            if dim
            else out.view(self.size, -1)
        )
        each, size = SLOT // x.element_size(), x.element_size()

        def write(chunk: int, meeting: int) -> None:
            piece = source[chunk * each : (chunk + 1) * each]
            self.slot(self.rank, meeting, piece.numel() * size).view(x.dtype).copy_(piece)

        def read(chunk: int, meeting: int) -> None:
            for r in range(self.size):
                target = flat[r, chunk * each : (chunk + 1) * each]
                target.copy_(self.slot(r, meeting, target.numel() * size).view(x.dtype))

        def result() -> Tensor:
            if dim:
                for place, row in zip(out.chunk(self.size, dim), flat, strict=True):
                    place.copy_(row.view(x.shape))
            return out

        return self._start(note, write, read, -(-source.numel() // each), result, dim)

    def start_reduce_scatter(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Every rank adds up its part of all slots."""
        note = self.enter("reduce_scatter", x, site)
        parts = x.detach().chunk(self.size, dim)
        shape, count, size = parts[0].shape, parts[0].numel(), x.element_size()
        each = SLOT // size // self.size
        out = torch.empty(shape, dtype=x.dtype) if out is None else out
        flat = out.view(-1)
        whole = count <= each  # then strided parts are copied straight into the slot
        rows = None if whole else [p.reshape(-1) for p in parts]

        def place(rank: int, meeting: int, part: int, n: int) -> Tensor:
            start = part * n * size
            return self.slot(rank, meeting, SLOT)[start : start + n * size].view(x.dtype)

        def write(chunk: int, meeting: int) -> None:
            for i, p in enumerate(parts):
                if rows is None:
                    place(self.rank, meeting, i, count).view(shape).copy_(p)
                else:
                    piece = rows[i][chunk * each : (chunk + 1) * each]
                    place(self.rank, meeting, i, piece.numel()).copy_(piece)

        def read(chunk: int, meeting: int) -> None:
            target = flat if whole else flat[chunk * each : (chunk + 1) * each]
            found = [place(r, meeting, self.rank, target.numel()) for r in range(self.size)]
            reduce_into(target, found, "sum")

        chunks = 1 if whole else -(-count // each)
        return self._start(note, write, read, chunks, lambda: out, dim)

    def broadcast(self, x: Tensor, *, site: str, root: int = 0) -> Tensor:
        """The root's tensor, through a gather (broadcasts here are a few bytes)."""
        every = self.start_all_gather(x.reshape(1, -1), site=site).wait()
        return every[root].reshape(x.shape)

    def barrier(self, *, site: str) -> None:
        """An all-reduce of nothing."""
        self.start_all_reduce(torch.zeros(1, dtype=torch.uint8), site=site).wait()

    def start_all_to_all(
        self, x: Tensor, *, site: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Handle:
        """Sends its parts; receives when it is waited for."""
        parts = x.detach().split(list(send_counts))
        return self.mailbox.exchange(parts, receive_counts, site)

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Sent:
        """Copies into the pair's ring, or keeps it until there is room; never waits."""
        return self.mailbox.send(x, to, key, site)

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """`wait` takes the message with this key."""
        return self.mailbox.receive(like, source, key, site)


def reduce_into(target: Tensor, parts: Sequence[Tensor], op: ReduceOp) -> None:
    """target = parts in rank order, summed or their maximum; low precision adds up in fp32."""
    if op == "max":
        torch.maximum(parts[0], parts[1], out=target)
        for p in parts[2:]:
            torch.maximum(target, p, out=target)
    elif target.dtype in LOW and len(parts) > 2:
        total = parts[0].float()
        for p in parts[1:]:
            total += p
        target.copy_(total)
    else:
        torch.add(parts[0], parts[1], out=target)
        for p in parts[2:]:
            target.add_(p)

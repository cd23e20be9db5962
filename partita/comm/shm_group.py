"""What the ranks of one group share: two buffers a rank, and rounds that pass through them.

Every collective is a number of rounds. In a round each rank *posts* (copies what the others need into its
buffer and stores its counter `posted`) and *takes* (reads what it needs out of all buffers and stores its
counter `taken`). Round k lives in buffer k % 2: it may be posted when all others have taken round k - 2.

              buffer 0   buffer 1   buffer 0
    rank 0    post 0     post 1     (waits until rank 1 has taken 0)   post 2
    rank 1         post 0    take 0       post 1   take 1

Counters have one writer each. A rank writes a digest of what it calls (operation, dtype, shape, site,
group) beside each buffer; a rank takes only from ranks whose digest is its own, so that a mismatch is found
before anything is handed out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from partita.comm.protocol import Message
from partita.comm.shm_segment import PAGE, Region, Segment

NUM_BUFFERS = 2
BUFFER_BYTES = 1 << 20
_POSTED, _TAKEN, _DIGEST = 0, 8, 16  # words of 64 bits, apart by cache lines
_TEXT, _TEXT_BYTES = 512, 1024  # bytes

Step = Callable[[int, int], None]  # (round of the operation, buffer)


@dataclass(slots=True, eq=False)
class Rounds:
    """A collective under way: `count` rounds from `base`, and what is done in each."""

    message: Message
    count: int
    post: Step
    take: Step
    result: Tensor
    alternates: bool = False  # round 2k + 1 posts what round 2k brought
    sequence: int = 0
    base: int = 0
    posted: int = 0
    taken: int = 0
    digest: int = 0
    text: bytes = field(default=b"")

    @property
    def done(self) -> bool:
        """All rounds have been taken."""
        return self.taken == self.count


class Mismatch(Exception):  # noqa: N818 (caught at once and told as a CommError)
    """The ranks of a group brought different calls."""


def group_bytes(size: int) -> int:
    """Address space of a group of `size` ranks."""
    return size * (PAGE + NUM_BUFFERS * BUFFER_BYTES)


class Group:
    """The shared memory of one group, as one member sees it."""

    def __init__(
        self, segment: Segment, offset: int, ranks: tuple[int, ...], axis: str, lane: str
    ) -> None:
        self.segment, self.ranks, self.size = segment, ranks, len(ranks)
        self.me = ranks.index(segment.rank)
        self.peers = tuple(m for m in range(self.size) if m != self.me)
        self.peer_ranks = tuple(ranks[m] for m in self.peers)
        self.region = Region(segment, offset, group_bytes(self.size))
        self.region.allocate(self.me * PAGE, PAGE)
        self._identity = [axis, lane, list(ranks)]
        self._headers: dict[Message, tuple[int, bytes]] = {}
        self._views: dict[tuple[int, int, torch.dtype, int, int], Tensor] = {}
        self._backed = [0] * NUM_BUFFERS
        self._free_until = NUM_BUFFERS
        self._words = self.region.words
        self._my_posted = self.me * PAGE // 8 + _POSTED
        self._my_taken = self.me * PAGE // 8 + _TAKEN
        self._peer_posted = [m * PAGE // 8 + _POSTED for m in self.peers]
        self._peer_taken = [m * PAGE // 8 + _TAKEN for m in self.peers]
        self._next_round = 0

    # Memory --------------------------------------------------------------------------------------

    def _start(self, member: int, buffer: int) -> int:
        return self.size * PAGE + (member * NUM_BUFFERS + buffer) * BUFFER_BYTES

    def address(self, member: int, buffer: int) -> int:
        """Where a member's buffer begins."""
        return self.region.address + self._start(member, buffer)

    def mine(self, buffer: int, length: int) -> int:
        """Where this rank's buffer begins, backed by memory for `length` bytes at least."""
        start = self._start(self.me, buffer)
        if length > self._backed[buffer]:
            length = min(-(-length // PAGE) * PAGE, BUFFER_BYTES)
            self.region.allocate(start, length)
            self._backed[buffer] = length
        return self.region.address + start

    def view(self, member: int, buffer: int, dtype: torch.dtype, first: int, count: int) -> Tensor:
        """`count` elements from byte `first` of a member's buffer, as a tensor on it."""
        key = (member, buffer, dtype, first, count)
        found = self._views.get(key)
        if found is None:
            if len(self._views) > 4096:
                self._views.clear()
            at = self._start(member, buffer) + first
            found = self.region.bytes[at : at + count * dtype.itemsize].view(dtype)
            self._views[key] = found
        return found

    # Rounds --------------------------------------------------------------------------------------

    def enroll(self, rounds: Rounds) -> None:
        """Gives an operation its place in the sequence of rounds."""
        header = self._headers.get(rounds.message)
        if header is None:
            if len(self._headers) > 4096:
                self._headers.clear()
            m = rounds.message
            text = json.dumps([m.op, m.shape, m.dtype, m.site, m.extra, self._identity])
            header = xxhash.xxh3_64_intdigest(text), text.encode()[:_TEXT_BYTES]
            self._headers[rounds.message] = header
        rounds.digest, rounds.text = header
        rounds.base = self._next_round
        self._next_round += rounds.count

    def advance(self, rounds: Rounds) -> bool:
        """All steps that are possible now without waiting; True when the operation is done.

        Raises Mismatch where another rank brought another call.
        """
        words = self._words
        while True:
            moved = False
            i = rounds.posted
            if (
                i < rounds.count
                and not (rounds.alternates and i & 1 and rounds.taken < i)
                and self._is_free(rounds.base + i)
            ):
                buffer = (rounds.base + i) % NUM_BUFFERS
                self._write_header(rounds, buffer, first=i == 0)
                rounds.post(i, buffer)
                rounds.posted = i + 1
                words[self._my_posted] = rounds.base + i + 1
                self.segment.bells.ring(self.peer_ranks)
                moved = True
            i = rounds.taken
            if i < rounds.posted and self._have_come(rounds.base + i):
                buffer = (rounds.base + i) % NUM_BUFFERS
                self.compare(rounds)
                rounds.take(i, buffer)
                rounds.taken = i + 1
                words[self._my_taken] = rounds.base + i + 1
                self.segment.bells.ring(self.peer_ranks)
                moved = True
            if not moved:
                return rounds.taken == rounds.count

    def _write_header(self, rounds: Rounds, buffer: int, *, first: bool) -> None:
        self._words[self.me * PAGE // 8 + _DIGEST + buffer] = rounds.digest
        if first:
            text, at = rounds.text, self.me * PAGE + _TEXT + buffer * _TEXT_BYTES
            self.region.raw[at : at + len(text)] = text
            self._words[self.me * PAGE // 8 + _DIGEST + NUM_BUFFERS + buffer] = len(text)

    def _is_free(self, number: int) -> bool:
        if number < self._free_until:
            return True
        words = self._words
        self._free_until = min([words[i] for i in self._peer_taken]) + NUM_BUFFERS
        return number < self._free_until

    def _have_come(self, number: int) -> bool:
        words = self._words
        return all([words[i] > number for i in self._peer_posted])  # noqa: C419 (a list is faster)

    def absent(self, rounds: Rounds) -> list[int]:
        """World ranks for which the operation waits now."""
        words, found = self._words, set()
        if rounds.taken < rounds.posted:
            number = rounds.base + rounds.taken
            found = {m for m in self.peers if words[m * PAGE // 8 + _POSTED] <= number}
        if not found and rounds.posted < rounds.count:
            number = rounds.base + rounds.posted - NUM_BUFFERS
            found = {m for m in self.peers if words[m * PAGE // 8 + _TAKEN] <= number}
        return sorted(self.ranks[m] for m in found)

    def compare(self, rounds: Rounds) -> None:
        """Raises Mismatch where a member that has come brought another call."""
        words, number = self._words, rounds.base + rounds.taken
        place = _DIGEST + number % NUM_BUFFERS
        for m in self.peers:
            if words[m * PAGE // 8 + place] != rounds.digest and (
                words[m * PAGE // 8 + _POSTED] > number
            ):
                raise Mismatch

    def brought(self, rounds: Rounds) -> dict[int, tuple[Message, list[object]]]:
        """What each member that has come called: world rank -> (message, [axis, lane, ranks])."""
        number = rounds.base + rounds.taken
        buffer = number % NUM_BUFFERS
        found = {self.ranks[self.me]: (rounds.message, self._identity)}
        for m in self.peers:
            if self._words[m * PAGE // 8 + _POSTED] <= number:
                continue
            length = self._words[m * PAGE // 8 + _DIGEST + NUM_BUFFERS + buffer]
            at = m * PAGE + _TEXT + buffer * _TEXT_BYTES
            text = bytes(self.region.raw[at : at + length]).decode(errors="replace")
            found[self.ranks[m]] = _read_header(text)
        return dict(sorted(found.items()))


def _read_header(text: str) -> tuple[Message, list[object]]:
    try:
        op, shape, dtype, site, extra, identity = json.loads(text)
    except ValueError:  # cut off: a very long site or shape
        return Message(text[:80], (), "", ""), []
    return Message(op, tuple(shape), dtype, site, tuple(extra)), identity

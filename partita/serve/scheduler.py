"""Which sequences run in the next step, and how much of each: continuous batching, pure.

A step has room for `max_batch_tokens` tokens. First come those that write their answer, a token each; then
prompts, in chunks. Every prompt under way gets an equal share of what is left, those that came first the
rest: a short prompt is not kept waiting by a long one. What comes is admitted in its order, when there are
pages for all its tokens, and nobody overtakes: those that run always came before those that wait.

    waiting --admit--> running --finish--> gone          pages: none    held    none
       ^------preempt-----'

Where the model works on several steps at once (`depth`), a step takes a part of the sequences, and of the
tokens: those that are under way are left alone, and may be preempted or end all the same. What a step
writes to pages that have gone to others meanwhile is written before those others' steps begin.

A sequence that needs a page when none is free preempts the one that came last. That one waits with its
tokens, in its place, and is computed again; sealed pages that nobody took meanwhile are found again. As the
first to have come always finds pages, everything ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from partita.serve.pages import PagePool, key_of


@dataclass(eq=False, slots=True)
class Seq:
    """One choice of a request. `tokens` only grow: the prompt's, then the chosen ones; keys and values of
    the first `computed` lie in `pages`."""

    order: tuple[int, int]  # number of the request, of the choice
    tokens: list[int]
    prompt: int  # tokens of it
    most: int  # tokens it may come to
    scores: bool = False  # whether logits are wanted at the prompt's positions
    leader: Seq | None = None  # waits until the prompt of this one is computed, to share its pages
    computed: int = 0
    scored: int = 0  # positions of the prompt whose logits were told
    sealed: int = 0
    cached: int | None = None  # tokens that were there when it was first admitted
    gone: bool = False
    share: Share | None = None  # under way
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens to be run before the next can be chosen; one while it writes."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """A sequence's part of a step: `count` tokens from `start` on, of which the last are the draft."""

    seq: Seq
    start: int
    count: int
    want: int  # of how many of them, the last, logits are needed
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """What runs."""
        count = self.count - len(self.draft)
        return (*self.seq.tokens[self.start : self.start + count], *self.draft)

    @property
    def chooses(self) -> bool:
        """Whether a token follows."""
        return self.start + self.count - len(self.draft) == len(self.seq.tokens)


Drafts = Callable[[Seq, int], Sequence[int]]  # at most so many tokens that may follow


def no_draft(seq: Seq, most: int) -> Sequence[int]:
    """Guesses nothing."""
    return ()


class Scheduler:
    """Sequences that wait and run, and the pages of those."""

    def __init__(
        self, pool: PagePool, max_batch_tokens: int, max_sequences: int, depth: int = 1
    ) -> None:
        self.pool, self.depth = pool, depth
        self.max_batch_tokens, self.max_sequences = max_batch_tokens, max_sequences
        self.waiting: list[Seq] = []  # both in the order they came
        self.running: list[Seq] = []
        self.preemptions = self.queried = self.hits = 0

    def add(self, seq: Seq) -> None:
        """The newest."""
        assert not self.waiting or self.waiting[-1].order < seq.order
        self.waiting.append(seq)

    def finish(self, seq: Seq) -> None:
        """It ends, wherever it stands; its pages are free, and only then is it gone for who looks on."""
        self._give_back(seq)
        (self.running if seq in self.running else self.waiting).remove(seq)
        seq.gone = True

    def plan(self, drafts: Drafts = no_draft) -> list[Share]:
        """The next step, of sequences that no step under way has. Without such only empty where nothing runs
        or waits. Each share must come back to `commit`, in the order of the steps."""
        before = self.preemptions
        writing: list[Seq] = []
        for seq in self._still():
            if len(writing) == self._part(len(self.running)):
                break
            # one before it may have preempted it
            if seq.pages and seq.left == 1 and self._room_to_write(seq):
                writing.append(seq)
        if self.preemptions == before:
            writing += self._admitted(self._part(self.max_sequences) - len(writing))
        reading = [seq for seq in self._still() if seq.left > 1]
        room = self._part(self.max_batch_tokens) - len(writing)
        if writing and not reading and drafts is not no_draft:
            shares = [self._with_draft(seq, room // len(writing), drafts) for seq in writing]
        else:
            shares = [Share(seq, seq.computed, 1, 1) for seq in writing]
            shares += self._chunks(reading, room)
        for share in shares:
            share.seq.share = share
        return shares

    def _still(self) -> list[Seq]:
        """Running sequences that no step under way has."""
        return [seq for seq in self.running if seq.share is None]

    def _part(self, whole: int) -> int:
        return -(-whole // self.depth)

    def counts(self, share: Share) -> bool:
        """Whether what it says is wanted: its sequence has neither ended nor been preempted since."""
        return share.seq.share is share

    def commit(self, share: Share) -> None:
        """A share has run, and what was chosen stands in the sequence's tokens: a draft's tokens count as
        far as they were chosen. Full pages can be taken by others. Only of one that `counts`."""
        seq = share.seq
        seq.share = None
        seq.computed = min(share.start + share.count, len(seq.tokens) - 1)
        full = seq.computed // self.pool.page_size
        for i, key in enumerate(self._keys(seq, full)[seq.sealed :], seq.sealed):
            self.pool.seal(seq.pages[i], key)
        seq.sealed = max(full, seq.sealed)

    def _chunks(self, reading: Sequence[Seq], room: int) -> list[Share]:
        """Equal shares of the room, the rest to the first."""
        if not reading or room < 1:
            return []
        equal = max(room // len(reading), 1)
        counts = []
        for seq in reading:
            counts.append(min(seq.left, equal, room))
            room -= counts[-1]
        for i, seq in enumerate(reading):
            more = min(seq.left - counts[i], room)
            counts[i] += more
            room -= more
        return [self._chunk(seq, n) for seq, n in zip(reading, counts, strict=True) if n]

    def _chunk(self, seq: Seq, count: int) -> Share:
        tells = seq.scores and seq.scored < seq.prompt - 1
        last = count == seq.left
        return Share(seq, seq.computed, count, count if tells else int(last))

    def _with_draft(self, seq: Seq, room: int, drafts: Drafts) -> Share:
        """A writing sequence, with guesses where pages are free for them."""
        size = len(seq.tokens)
        most = min(room, seq.most - size - 1)
        draft = tuple(drafts(seq, most))[: max(most, 0)] if most > 0 else ()
        missing = self.pool.needed(size + len(draft)) - len(seq.pages)
        if missing > 0:
            found = self.pool.allocate(missing)
            if found is None:
                draft = draft[: len(seq.pages) * self.pool.page_size - size]
            seq.pages += found or []
        return Share(seq, seq.computed, 1 + len(draft), 1 + len(draft), draft)

    def _room_to_write(self, seq: Seq) -> bool:
        """A page for its next token; those that came last give theirs, it itself if it is the last: False."""
        while self.pool.needed(len(seq.tokens)) > len(seq.pages):
            found = self.pool.allocate(1)
            if found is not None:
                seq.pages += found
                continue
            last = self.running[-1]
            self._preempt(last)
            if last is seq:
                return False
        return True

    def _preempt(self, seq: Seq) -> None:
        self.running.remove(seq)
        self._give_back(seq)
        insort(self.waiting, seq, key=lambda s: s.order)
        self.preemptions += 1

    def _give_back(self, seq: Seq) -> None:
        self.pool.release(seq.pages)
        seq.pages, seq.computed, seq.share = [], 0, None

    def _admitted(self, most: int) -> list[Seq]:
        """Admits what can be; of it up to `most` that can write at once."""
        before = len(self.running)
        while self._admit():
            pass
        return [seq for seq in self.running[before:] if seq.left == 1][: max(most, 0)]

    def _admit(self) -> bool:
        """Takes the first that waits, where pages are free for all its tokens and one for each that runs."""
        if not self.waiting or len(self.running) >= self.max_sequences:
            return False
        seq, size = self.waiting[0], self.pool.page_size
        if seq.leader is not None and not self._read(seq.leader):
            return False
        known = (len(seq.tokens) - 1) // size  # the last token is always run: its logits are needed
        told = seq.scores and seq.scored < seq.prompt - 1
        found = self.pool.lookup(() if told else self._keys(seq, known)[:known])
        missing = self.pool.needed(len(seq.tokens)) - len(found)
        if self.pool.free - self.pool.unheld(found) < missing + len(self.running):
            return False
        self.pool.take(found)
        seq.pages = found + (self.pool.allocate(missing) or [])
        seq.computed = len(found) * size
        seq.sealed = len(found)
        self.queried += len(seq.tokens)
        self.hits += seq.computed
        if seq.cached is None:
            seq.cached = seq.computed
        self.running.append(self.waiting.pop(0))
        return True

    def _read(self, leader: Seq) -> bool:
        """Whether its prompt's full pages are computed, or never will be."""
        size = self.pool.page_size
        return leader.gone or leader.computed // size >= (leader.prompt - 1) // size

    def _keys(self, seq: Seq, pages: int) -> list[bytes]:
        """Keys of its first full pages."""
        size = self.pool.page_size
        for i in range(len(seq.keys), pages):
            before = seq.keys[-1] if seq.keys else b""
            seq.keys.append(key_of(before, seq.tokens[i * size : (i + 1) * size]))
        return seq.keys[:pages]

"""What a runner is asked and what it answers: pieces of sequences, and logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from partita.base.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """One sequence's share of a step: `tokens` from position `start` on, whose keys and values go to `pages`,
    the sequence's page table; what stands before `start` is in them already. `want`: of how many of the last
    tokens logits are wanted."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    want: int = 1

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + len(self.tokens)


class Pending(Protocol):
    """A step under way."""

    def result(self) -> Tensor:
        """Its logits; waits for them."""
        ...


class Runner(Protocol):
    """A model on the ranks of a plan. `pages` of `page_size` tokens each are at hand, by number."""

    vocab: int
    max_len: int
    pages: int
    page_size: int
    depth: int  # steps that it works on at once: stages of its pipeline

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """One step. Logits [sum of want, vocab] on the host, fp32 (fp64 under fp64), in the order of pieces.

        Raises UsageError, before anything runs, for pieces that cannot be; RankLostError, which names the
        rank, where one is gone: such a runner answers nothing more."""
        ...

    def start(self, pieces: Sequence[Piece]) -> Pending:
        """The same, under way: stages of a pipeline work on several steps at once. Results come in the order
        of the starts, and a step may not need what an unfinished one chooses."""
        ...

    def close(self) -> None:
        """Ends the ranks; safe to call twice."""
        ...


@dataclass(frozen=True, slots=True)
class Room:
    """What pieces are held against."""

    vocab: int
    max_len: int
    pages: int
    page_size: int

    def require(self, pieces: Sequence[Piece]) -> None:
        """Raises UsageError of the first piece that cannot run, or of a step without tokens."""
        if not pieces:
            raise UsageError("a step has at least one piece", key="pieces")
        for at, piece in enumerate(pieces):
            if why := self._wrong(piece):
                raise UsageError(f"piece {at} of {len(pieces)}: {why}", key="pieces")

    def _wrong(self, piece: Piece) -> str:
        count = len(piece.tokens)
        if not count or piece.start < 0 or not 0 <= piece.want <= count:
            return f"{count} tokens from position {piece.start}, logits of {piece.want} are wanted"
        if min(piece.tokens) < 0 or max(piece.tokens) >= self.vocab:
            bad = next(t for t in piece.tokens if not 0 <= t < self.vocab)
            return f"token {bad} is not within the vocabulary of {self.vocab}"
        if piece.end > self.max_len:
            return f"position {piece.end - 1} is behind the last, {self.max_len - 1}"
        if len(piece.pages) * self.page_size < piece.end:
            held = f"{len(piece.pages)} pages of {self.page_size}"
            return f"{held} do not hold {piece.end} tokens"
        if min(piece.pages) < 0 or max(piece.pages) >= self.pages:
            return f"a page is not within 0 .. {self.pages - 1}"
        return ""

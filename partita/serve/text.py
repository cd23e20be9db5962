"""From tokens to text, piece by piece: no half characters, nothing of a stop text.

Text is UTF-8, whose bytes tokens may cut anywhere; and what may yet become a stop text is not told before it
has become something else.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from partita.serve.request import TokenLogprob


class Tokens(Protocol):
    """What inference needs of a tokenizer."""

    @property
    def size(self) -> int:
        """Ids it has."""
        ...

    @property
    def end(self) -> tuple[int, ...]:
        """What closes a text."""
        ...

    @property
    def specials(self) -> frozenset[int]:
        """Ids that are no text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def pieces(self) -> list[bytes]:
        """What each id stands for, in UTF-8."""
        ...


class Vocabulary:
    """The bytes behind ids; ids beyond the tokenizer's (a padded vocabulary) have none."""

    def __init__(self, tokenizer: Tokens) -> None:
        self.tokenizer = tokenizer
        self.specials = tokenizer.specials
        self.pieces = tokenizer.pieces()

    def bytes_of(self, token: int) -> bytes:
        """What it stands for."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else b""

    def text_of(self, tokens: Sequence[int]) -> str:
        """All of them as text, special tokens too; bytes that are no character read �."""
        return b"".join(map(self.bytes_of, tokens)).decode(errors="replace")


class Writer:
    """The text of one choice as it comes.

    `push` takes a token; `take` gives the text that can be told since the last call, and the tokens that
    it ends. `matched` is the stop text that was met: the text ends before it, and tokens that stand wholly
    behind its beginning are not told.
    """

    def __init__(
        self, vocabulary: Vocabulary, stops: Sequence[str] = (), skip_special: bool = True
    ) -> None:
        self.matched: str | None = None
        self._vocabulary, self._stops = vocabulary, tuple(stops)
        self._hidden = vocabulary.specials if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # text that is not told yet
        self._told = self._length = 0  # characters
        self._tokens: list[tuple[int, int, int, TokenLogprob | None]] = []  # from, to, id

    def push(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """The next token; nothing after a match."""
        raw = b"" if token in self._hidden else self._vocabulary.bytes_of(token)
        text, before = self._decoder.decode(raw), self._length
        self._held += text
        self._length += len(text)
        self._tokens.append((before, self._length, token, logprob))
        # the first to end, whatever tokens the text came in; of several the longest
        met = [
            (at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0
        ]
        if met:
            _, at, self.matched = min(met)
            self._held = self._held[:at]

    def take(self, last: bool = False) -> tuple[str, list[tuple[int, TokenLogprob | None]]]:
        """Text and tokens that can be told; at the last call all of it, but for half a character."""
        keep = 0 if last or self.matched is not None else self._may_become()
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        self._told += len(text)
        if self.matched is not None:
            told = [t for t in self._tokens if t[0] < self._told]
            self._tokens = []
        else:
            ready = len(self._tokens) if last else sum(t[1] <= self._told for t in self._tokens)
            told, self._tokens = self._tokens[:ready], self._tokens[ready:]
        return text, [(token, logprob) for _, _, token, logprob in told]

    def _may_become(self) -> int:
        """Characters at the end that begin a stop text."""
        held = self._held
        for size in range(min(len(held), max(map(len, self._stops), default=1) - 1), 0, -1):
            if any(stop.startswith(held[-size:]) for stop in self._stops):
                return size
        return 0

"""Texts that must follow a grammar, by the llguidance library: which tokens may come next.

    pip install 'partita[serve]'

A grammar is compiled where a request is submitted, within bounds of the library on its size; each choice has
a state of its own, and ends with an error where the library gives up or takes too long. Without the library
a request with a grammar is refused.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from partita.base.errors import UsageError
from partita.serve.request import Grammar
from partita.serve.text import Vocabulary

MASK_S = 0.5  # of the processor, for one token: all requests of a step wait for it


class State(Protocol):
    """How far one text has come."""

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow."""
        ...

    def mask(self) -> Tensor:
        """bool [vocab]: what may come next."""
        ...

    def accept(self, token: int) -> None:
        """One of them comes."""
        ...

    def fresh(self) -> State:
        """Another text at its beginning; only of one that has not begun."""
        ...


class Grammars:
    """Compiles grammars for one vocabulary of `vocab` ids; `end` are those that end a text."""

    def __init__(self, vocabulary: Vocabulary, vocab: int, end: Sequence[int]) -> None:
        self._vocabulary, self._vocab, self._end = vocabulary, vocab, tuple(end)
        self._inner: Any = None

    def start(self, grammar: Grammar) -> State:
        """A text at its beginning. Raises UsageError for a grammar that is none."""
        try:
            import llguidance
        except ImportError as error:
            text = "a grammar needs the llguidance library: pip install 'partita[serve]'"
            raise UsageError(text, key="grammar") from error
        if not self._end:
            raise UsageError(
                "a grammar needs an id that ends a text, and the tokenizer states none",
                key="grammar",
            )
        if self._inner is None:
            words = _Words(self._vocabulary, self._vocab, self._end)
            end = list(words.ends)
            self._inner = llguidance.LLTokenizer(
                llguidance.TokenizerWrapper(words),
                n_vocab=self._vocab,
                eos_token=end if len(end) > 1 else end[0],
            )
        inner, problem = None, ""
        try:
            source = llguidance.grammar_from(grammar.kind, grammar.text)
            inner = llguidance.LLMatcher(self._inner, source, log_level=0)
            problem = inner.get_error()
        except Exception as error:  # the library raises of several kinds
            problem = str(error) or type(error).__name__
        if problem:
            first = problem.strip().splitlines()[0]
            raise UsageError(f"grammar ({grammar.kind}): {first}", key="grammar")
        return _Text(inner, self._vocab)


class _Text:
    def __init__(self, inner: Any, vocab: int) -> None:
        self._inner, self._vocab = inner, vocab

    @property
    def is_done(self) -> bool:
        return self._inner.is_stopped()

    def mask(self) -> Tensor:
        began = time.thread_time()
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        wide = np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool)
        took = time.thread_time() - began
        if took > MASK_S:
            raise UsageError(
                f"grammar: what may follow took {took:.2f} s to find, and {MASK_S:g} s are allowed: the "
                "grammar is too ambiguous"
            )
        self._require(True, "what may follow")
        return torch.from_numpy(wide)

    def accept(self, token: int) -> None:
        self._require(self._inner.consume_token(token), f"token {token} cannot follow")

    def _require(self, holds: bool, what: str) -> None:
        """Raises UsageError where it does not hold, or the library has given up."""
        if not holds or self._inner.is_error():
            first = (self._inner.get_error().strip() or "it is over").splitlines()[0]
            raise UsageError(f"grammar: {what}: {first}")

    def fresh(self) -> State:
        return _Text(self._inner.deep_copy(), self._vocab)


class _Words:
    """The vocabulary as the library reads it."""

    def __init__(self, vocabulary: Vocabulary, vocab: int, end: Sequence[int]) -> None:
        self._tokenizer = vocabulary.tokenizer
        self.tokens = [vocabulary.bytes_of(i) for i in range(vocab)]
        self.special_token_ids = sorted({*vocabulary.specials, *end})
        self.ends = tuple(end)
        self.eos_token_id, self.bos_token_id = end[0], None

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode(errors="replace")
        return self._tokenizer.encode(text)

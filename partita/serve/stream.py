"""A request as its client holds it: deltas as they come, a way to end it, and what it used."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from partita.serve.request import Delta, Output, SamplingParams, TokenLogprob, Usage, joined


@dataclass(frozen=True)
class Asked:
    """A request: its number in the order of arrival, the prompt's ids, and the seed it draws by."""

    number: int
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrived_s: float


class Stream:
    """Deltas of all choices of one request, each as it comes; every choice ends with exactly one that has a
    `finish_reason`.

    To be iterated once, by any one thread. With `on_delta` they go there instead, from the engine's thread,
    which waits for it: it must be quick, and one that raises ends this request alone, with "error".
    """

    def __init__(
        self,
        asked: Asked,
        cancel: Callable[[Stream], None],
        on_delta: Callable[[Delta], None] | None = None,
    ) -> None:
        self.asked = asked
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.completion_tokens = self.cached_tokens = 0
        self._cancel, self._on_delta = cancel, on_delta
        self._queue: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._open = asked.params.n  # choices without an end

    @property
    def number(self) -> int:
        """Of the request, in the order they came."""
        return self.asked.number

    @property
    def prompt(self) -> tuple[int, ...]:
        """Ids of the prompt."""
        return self.asked.prompt

    @property
    def params(self) -> SamplingParams:
        """As submitted."""
        return self.asked.params

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(len(self.asked.prompt), self.completion_tokens, self.cached_tokens)

    @property
    def done(self) -> bool:
        """Whether all choices have ended."""
        return not self._open

    def cancel(self) -> None:
        """Ends it: what has not ended by itself ends with "abort". Does nothing to one that is done."""
        self._cancel(self)

    def __iter__(self) -> Iterator[Delta]:
        left = self.asked.params.n
        while left:
            delta = self._queue.get()
            left -= delta.finish_reason is not None
            yield delta

    def collect(self) -> tuple[Output, ...]:
        """Waits for the end: all choices, in their order."""
        parts: list[list[Delta]] = [[] for _ in range(self.asked.params.n)]
        for delta in self:
            parts[delta.index].append(delta)
        return tuple(map(joined, parts))

    def tell(self, delta: Delta) -> Exception | None:
        """The engine's: hands a delta over. Returns what the client's function raised."""
        if delta.finish_reason is not None:
            self._open -= 1
        if self._on_delta is None:
            self._queue.put(delta)
            return None
        try:
            self._on_delta(delta)
        except Exception as error:
            return error
        return None

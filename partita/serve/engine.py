"""The engine: requests from any thread, one thread that steps the model, deltas as they come.

    submit (any thread) --> inbox --> engine's thread: take in, step, tell --> Stream (any thread)

What a request asks is checked, its text encoded and its grammar compiled where it is submitted; the engine's
thread only runs the model and chooses. A failure of the model ends every request with "error" and the
engine with it; a failure in one request ends that one.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from partita.base.errors import PartitaError, UsageError
from partita.serve.core import Core
from partita.serve.grammar import Grammars, State
from partita.serve.piece import Runner
from partita.serve.request import (
    Delta,
    EngineStoppedError,
    OverloadedError,
    SamplingParams,
    check,
)
from partita.serve.stats import Stats
from partita.serve.stream import Asked, Stream
from partita.serve.text import Tokens, Vocabulary

CLOSE_S = 30.0  # how long close waits for a step under way


class Engine:
    """Inference on one model. `end`: ids that end an answer, the tokenizer's own where None; `speculate`:
    tokens guessed ahead where the text repeats itself, 0 for none; `max_waiting`: requests that may wait.
    Closes the runner with itself."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokens,
        *,
        max_batch_tokens: int = 2048,
        max_sequences: int = 64,
        max_waiting: int = 1024,
        speculate: int = 0,
        end: Sequence[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 1 <= max_sequences <= max_batch_tokens:
            raise UsageError(
                f"max_batch_tokens = {max_batch_tokens}, max_sequences = {max_sequences}: a step holds a "
                "token of each sequence, and at least one",
                key="max_batch_tokens",
            )
        self.runner, self.vocabulary = runner, Vocabulary(tokenizer)
        self.end = tuple(tokenizer.end if end is None else end)
        self.max_len = min(runner.max_len, runner.pages * runner.page_size)
        self._core = Core(
            runner,
            self.vocabulary,
            self.end,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            speculate=speculate,
            clock=clock,
        )
        self._grammars = Grammars(self.vocabulary, runner.vocab, self.end)
        self._clock, self._max_waiting = clock, max_waiting
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._asked = self._arriving = 0  # requests; choices in the inbox
        self._closed: str | None = None  # why nothing is taken any more
        self._leaving = False
        self._failed: str | None = None
        self._worked_s = clock()
        self._thread = threading.Thread(target=self._work, name="partita-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> Stream:
        """Asks for `params.n` continuations of a text or of ids; see Stream for what comes back.

        Raises UsageError of all that is wrong, OverloadedError where too many wait, EngineStoppedError where
        the engine is closed, ends or failed.
        """
        params = params or SamplingParams()
        ids = self.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        check(ids, params, self.runner.vocab, self.max_len)
        grammar = self._grammars.start(params.grammar) if params.grammar is not None else None
        seed = secrets.randbits(63) if params.seed is None else params.seed
        with self._changed:
            if self._closed is not None:
                raise EngineStoppedError(self._closed)
            waiting = len(self._core.scheduler.waiting) + self._arriving
            if waiting + params.n > self._max_waiting:
                raise OverloadedError(
                    f"{waiting} choices wait, and at most {self._max_waiting} may: ask again later"
                )
            asked = Asked(self._asked, ids, params, seed, self._clock())
            stream = Stream(asked, self._cancel, on_delta)
            self._asked += 1
            self._arriving += params.n
            self._post(lambda: self._take_in(stream, grammar))
        return stream

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text. Raises UsageError for one that is no Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the prompt is no Unicode text: a half of a surrogate pair at character {error.start}",
                key="prompt",
            ) from error
        return tuple(self.vocabulary.tokenizer.encode(text))

    def stats(self) -> Stats:
        """As it stands, from any thread."""
        counts, scheduler = self._core.counts, self._core.scheduler
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + self._arriving,
            pages=self._core.pool.pages,
            pages_free=self._core.pool.free,
            max_sequences=scheduler.max_sequences,
            idle_s=self._clock() - self._worked_s,
            failed=self._failed,
            steps=counts.steps,
            preemptions=scheduler.preemptions,
            prefix_queried_tokens=scheduler.queried,
            prefix_hit_tokens=scheduler.hits,
            prompt_tokens=counts.prompt,
            generated_tokens=counts.generated,
            drafted_tokens=counts.drafted,
            accepted_tokens=counts.accepted,
            requests=counts.requests,
            finished=dict(counts.finished),
            time_to_first_token=counts.first.seen(),
            between_tokens=counts.between.seen(),
            request_time=counts.whole.seen(),
        )

    def drain(self, timeout: float) -> bool:
        """Takes no more requests and waits for those that are here; after `timeout` seconds the rest ends
        with "abort". Returns whether all ended by themselves."""
        with self._changed:
            self._closed = self._closed or "the engine ends: it takes no more requests"
            calm = self._changed.wait_for(self._calm, timeout)
            if not calm:
                self._post(lambda: self._core.end_all("abort"))
                self._changed.wait_for(self._calm, CLOSE_S)
        return calm and self._failed is None

    def close(self) -> None:
        """Ends what is here with "abort", then the thread and the runner. Safe to call twice."""
        with self._changed:
            self._closed = self._closed or "the engine is closed"
            self._leaving = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)
        self.runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _calm(self) -> bool:
        return not self._inbox and not self._core.busy

    def _post(self, call: Callable[[], None]) -> None:
        """To the engine's thread, with the lock held."""
        if self._calm():
            self._worked_s = self._clock()
        self._inbox.append(call)
        self._changed.notify_all()

    def _cancel(self, stream: Stream) -> None:
        with self._changed:
            if not stream.done and self._failed is None:
                self._post(lambda: self._core.cancel(stream))

    def _take_in(self, stream: Stream, grammar: State | None) -> None:
        self._arriving -= stream.params.n
        self._core.add(stream, grammar)

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _work(self) -> None:
        """The engine's thread."""
        try:
            while self._turn():
                pass
        except Exception as error:
            text = (
                error.message
                if isinstance(error, PartitaError)
                else f"{type(error).__name__}: {error}"
            )
            self._fail(text)

    def _turn(self) -> bool:
        """One step, and what came before it; False where it was the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._leaving or not self._calm())
            self._read_inbox()
            if self._leaving:
                self._core.end_all("abort")
                self._changed.notify_all()
                return False
        self._core.step()
        with self._changed:
            self._worked_s = self._clock()
            if self._calm():
                self._changed.notify_all()
        return True

    def _fail(self, text: str) -> None:
        with self._changed:
            self._failed, self._closed = text, f"the model failed: {text}"
            self._read_inbox()
            self._core.end_all("error", text)
            self._changed.notify_all()

"""The engine without its thread: requests at work, a step at a time.

    plan (scheduler) -> run (the model) -> choose, a token a row -> write text -> commit, tell

A choice that fails (logits that are no numbers, a client's function that raises) ends with "error", alone.
What the model raises is not caught here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from partita.base.errors import PartitaError
from partita.serve.drafts import Lookup
from partita.serve.grammar import State
from partita.serve.pages import PagePool
from partita.serve.piece import Pending, Piece, Runner
from partita.serve.request import Delta, Finish, TokenLogprob
from partita.serve.sampler import Drawing, choose, likeliest, logprob
from partita.serve.scheduler import Scheduler, Seq, Share, no_draft
from partita.serve.stats import Times
from partita.serve.stream import Stream
from partita.serve.text import Vocabulary, Writer


@dataclass(eq=False, slots=True)
class Choice:
    """One answer under way."""

    stream: Stream
    seq: Seq
    drawing: Drawing
    writer: Writer
    grammar: State | None
    lookup: Lookup
    chosen: int = 0
    last_s: float | None = None  # when its last token came
    finish: Finish | None = None
    matched: str | int | None = None
    error: str | None = None

    @property
    def index(self) -> int:
        """Of the choice in its request."""
        return self.drawing.index


class Counts:
    """What grows."""

    def __init__(self) -> None:
        self.steps = self.prompt = self.generated = self.requests = 0
        self.drafted = self.accepted = 0
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.first, self.between, self.whole = Times(), Times(), Times()


class Core:
    """Requests that wait and run on one model. `speculate`: tokens guessed at a time; `end`: ids that end
    a text."""

    def __init__(
        self,
        runner: Runner,
        vocabulary: Vocabulary,
        end: Sequence[int],
        *,
        max_batch_tokens: int,
        max_sequences: int,
        speculate: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.vocabulary = runner, vocabulary
        self.pool = PagePool(runner.pages, runner.page_size)
        self.scheduler = Scheduler(self.pool, max_batch_tokens, max_sequences, runner.depth)
        self._under_way: deque[tuple[list[Share], Pending]] = deque()
        self.counts = Counts()
        self._ends, self._speculate, self._clock = frozenset(end), speculate, clock
        self._choices: dict[Seq, Choice] = {}
        self._scores: dict[Stream, list[TokenLogprob | None]] = {}  # of prompts under way

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self._choices)

    def add(self, stream: Stream, grammar: State | None = None) -> None:
        """A request that has been checked; the newest. `grammar`: a state at its beginning."""
        asked, params = stream.asked, stream.params
        self.counts.requests += 1
        self.counts.prompt += len(asked.prompt)
        if params.prompt_logprobs is not None:
            self._scores[stream] = [None]
        leader = None
        seen = frozenset(asked.prompt) if params.repetition_penalty != 1 else frozenset()
        for index in range(params.n):
            seq = Seq(
                (asked.number, index),
                list(asked.prompt),
                len(asked.prompt),
                len(asked.prompt) + params.max_tokens,
                scores=params.prompt_logprobs is not None and index == 0,
                leader=leader,
            )
            leader = leader or seq
            self._choices[seq] = Choice(
                stream,
                seq,
                Drawing(params, asked.seed, index, seen),
                Writer(self.vocabulary, params.stop, params.skip_special_tokens),
                grammar.fresh() if grammar is not None else None,
                Lookup(),
            )
            self.scheduler.add(seq)

    def cancel(self, stream: Stream) -> None:
        """What of a request has not ended ends."""
        self._end([c for c in self._choices.values() if c.stream is stream], "abort")

    def end_all(self, finish: Finish, error: str | None = None) -> None:
        """Everything ends."""
        self._end(list(self._choices.values()), finish, error)

    def step(self) -> None:
        """Hands the model as many steps as it works on at once, where there is anything to run; tells what
        follows from the oldest."""
        while len(self._under_way) < self.runner.depth:
            shares = self.scheduler.plan(self._draft if self._speculate else no_draft)
            if not shares:
                break
            pieces = [Piece(s.tokens, s.start, tuple(s.seq.pages), s.want) for s in shares]
            self._under_way.append((shares, self.runner.start(pieces)))
        if not self._under_way:
            assert not self.busy, "requests wait, and nothing runs"
            return
        shares, pending = self._under_way.popleft()
        logits = pending.result()
        best = likeliest(logits)
        self.counts.steps += 1
        at, now = 0, self._clock()
        for share in shares:
            choice, rows = self._choices.get(share.seq), slice(at, at + share.want)
            at += share.want
            if choice is None or not self.scheduler.counts(share):
                continue
            try:
                self._score(choice, share, logits[rows])
                self._follow(choice, share, logits[rows], best[rows], now)
            except Exception as error:
                choice.finish, choice.error = "error", _told(error)
            self.scheduler.commit(share)
            self._tell(choice, now)

    def _score(self, choice: Choice, share: Share, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens behind those of a share."""
        seq = share.seq
        if not seq.scores or seq.scored >= seq.prompt - 1:
            return
        count = choice.stream.params.prompt_logprobs
        found = self._scores[choice.stream]
        first = max(seq.scored, share.start)
        for place in range(first, min(share.start + share.count, seq.prompt - 1)):
            row = logits[place - share.start]
            found.append(logprob(row, seq.tokens[place + 1], count or 0))
            seq.scored = place + 1

    def _follow(
        self, choice: Choice, share: Share, logits: Tensor, best: Sequence[int], now: float
    ) -> None:
        """The tokens that follow a share: one, and one more for each of a draft that is what was chosen."""
        if not share.chooses:
            return
        if choice.stream.params.max_tokens == 0:
            choice.finish = "length"
            return
        self.counts.drafted += len(share.draft)
        first = len(logits) - 1 - len(share.draft)
        for i, guess in enumerate((*share.draft, None)):
            token = self._choose(choice, logits[first + i], best[first + i])
            self._accept(choice, token, logits[first + i], now)
            if choice.finish is not None or token != guess:
                return
            self.counts.accepted += 1

    def _choose(self, choice: Choice, logits: Tensor, best: int) -> int:
        if choice.stream.params.plain and best >= 0:
            return best
        allowed = choice.grammar.mask() if choice.grammar is not None else None
        return choose(logits, choice.drawing, choice.chosen, allowed)

    def _accept(self, choice: Choice, token: int, logits: Tensor, now: float) -> None:
        """A chosen token, and whether it is the last."""
        params, asked = choice.stream.params, choice.stream.asked
        since = asked.arrived_s if choice.last_s is None else choice.last_s
        (self.counts.first if choice.last_s is None else self.counts.between).add(now - since)
        choice.last_s = now
        choice.seq.tokens.append(token)
        choice.chosen += 1
        choice.drawing.add(token)
        choice.stream.completion_tokens += 1
        self.counts.generated += 1
        if choice.grammar is not None:
            choice.grammar.accept(token)
        ends = token in params.stop_token_ids or (token in self._ends and not params.ignore_eos)
        if ends:
            choice.finish, choice.matched = "stop", token
            return
        told = None if params.logprobs is None else logprob(logits, token, params.logprobs)
        choice.writer.push(token, told)
        if choice.writer.matched is not None:
            choice.finish, choice.matched = "stop", choice.writer.matched
        elif choice.grammar is not None and choice.grammar.is_done:
            choice.finish = "stop"
        elif choice.chosen == params.max_tokens:
            choice.finish = "length"

    def _tell(self, choice: Choice, now: float) -> None:
        """Hands over what is new; a choice that has ended goes."""
        stream, seq = choice.stream, choice.seq
        if seq.cached is not None and choice.index == 0:
            stream.cached_tokens = seq.cached
        if seq.scores and seq.scored >= seq.prompt - 1 and stream in self._scores:
            stream.prompt_logprobs = tuple(self._scores.pop(stream))
        text, tokens = choice.writer.take(last=choice.finish is not None)
        if choice.finish is not None:
            self._leave(choice, now)
        elif not text and not tokens:
            return
        known = tuple(told for _, told in tokens if told is not None)
        failed = stream.tell(
            Delta(
                choice.index,
                text,
                tuple(token for token, _ in tokens),
                None if stream.params.logprobs is None else known,
                choice.finish,
                choice.matched,
                choice.error,
            )
        )
        if failed is not None:
            mine = [c for c in self._choices.values() if c.stream is stream]
            self._end(mine, "error", _told(failed))

    def _leave(self, choice: Choice, now: float) -> None:
        assert choice.finish is not None
        self.scheduler.finish(choice.seq)
        del self._choices[choice.seq]
        self.counts.finished[choice.finish] += 1
        self.counts.whole.add(now - choice.stream.asked.arrived_s)
        if choice.seq.scores:
            self._scores.pop(choice.stream, None)

    def _end(self, choices: Sequence[Choice], finish: Finish, error: str | None = None) -> None:
        now = self._clock()
        for choice in choices:
            if choice.seq in self._choices:
                choice.finish, choice.error = finish, error
                self._tell(choice, now)

    def _draft(self, seq: Seq, most: int) -> Sequence[int]:
        return self._choices[seq].lookup.draft(seq.tokens, min(most, self._speculate))


def _told(error: Exception) -> str:
    """An error in a line."""
    text = error.message if isinstance(error, PartitaError) else f"{type(error).__name__}: {error}"
    return text or type(error).__name__

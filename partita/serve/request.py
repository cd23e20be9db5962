"""What a client asks of a model, and what it gets: values, checked all at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from partita.base.errors import PeerError, UsageError, raise_all

Finish = Literal["stop", "length", "abort", "error"]
MOST_LOGPROBS = 20  # alternatives of a token, as OpenAI's interface has them
MOST_CHOICES = 128
MOST_STOPS = 16
MOST_TEMPERATURE = 100.0
SEEDS = 1 << 63


class EngineStoppedError(PeerError):
    """The engine takes no requests any more: it was closed, is ending, or its model failed."""


class OverloadedError(UsageError):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Grammar:
    """What the text must be: of a JSON schema (its text), a regular expression, or Lark's notation."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when that ends.

    The chain, in order: the grammar's mask and `logit_bias` (added); `repetition_penalty` on tokens of the
    prompt and of the answer (a positive logit is divided by it, a negative one multiplied);
    `presence_penalty` and `frequency_penalty` as OpenAI defines them, on the answer's tokens alone (logit -
    count * frequency - [count > 0] * presence); temperature (0: the likeliest, the lowest id of equals);
    the `top_k` likeliest (0: all); the fewest whose probability reaches `top_p`; those of at least `min_p`
    times the likeliest's. A draw is a function of (seed, choice, number of the token).
    Log-probabilities are the model's own, before any of it.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None  # None: one is drawn when the request comes
    stop: tuple[str, ...] = ()  # the text ends before the first of them
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives told beside each token; 0 is the chosen one's alone
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    grammar: Grammar | None = None
    n: int = 1
    skip_special_tokens: bool = True  # in the text; ids and log-probabilities keep them

    @property
    def plain(self) -> bool:
        """Whether each token is the likeliest of the logits as they are."""
        return self.temperature == 0 and not self.changes

    @property
    def changes(self) -> bool:
        """Whether logits are changed before temperature."""
        penalties = self.presence_penalty or self.frequency_penalty
        return bool(
            penalties or self.repetition_penalty != 1 or self.logit_bias or self.grammar is not None
        )

    def problems(self, vocab: int, max_len: int, prompt: int = 1) -> list[tuple[str, str]]:
        """(key, text) of all that is wrong, for a model of `vocab` ids that sees `max_len` tokens and a
        prompt of `prompt` tokens."""
        found = [
            (key, f"{key} = {value!r}: {rule}")
            for key, value, holds, rule in self._rules(vocab)
            if not holds
        ]
        if prompt < 1:
            found.append(("prompt", "the prompt is empty: give at least one token"))
        elif prompt + max(self.max_tokens, 0) > max_len:
            found.append(
                (
                    "max_tokens" if prompt < max_len else "prompt",
                    f"{prompt} tokens of the prompt and max_tokens = {self.max_tokens} are "
                    f"{prompt + self.max_tokens}, and the model sees {max_len}: at most "
                    f"{max(max_len - prompt, 0)} tokens can follow this prompt",
                )
            )
        return found

    def _rules(self, vocab: int) -> list[tuple[str, object, bool, str]]:
        """(key, value, whether it holds, the rule)."""
        bias = self.logit_bias
        wrong_ids = [i for i in (*self.stop_token_ids, *bias) if not 0 <= i < vocab]
        of_ids = f"ids are 0 to {vocab - 1}"
        return [
            ("max_tokens", self.max_tokens, self.max_tokens >= 0, "at least 0"),
            ("temperature", self.temperature, _in(self.temperature, 0, MOST_TEMPERATURE),
             f"0 to {MOST_TEMPERATURE:g}"),
            ("top_p", self.top_p, _in(self.top_p, 0, 1) and self.top_p > 0, "above 0, at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0, where 0 is all"),
            ("min_p", self.min_p, _in(self.min_p, 0, 1), "0 to 1"),
            ("seed", self.seed, self.seed is None or -SEEDS <= self.seed < SEEDS, "64 bits"),
            ("stop", self.stop, all(self.stop), "an empty text stops nothing"),
            ("stop", len(self.stop), len(self.stop) <= MOST_STOPS, f"at most {MOST_STOPS} texts"),
            ("stop", "a surrogate", all(map(_writable, self.stop)), "text is Unicode"),
            ("logprobs", self.logprobs, _count(self.logprobs), f"0 to {MOST_LOGPROBS}"),
            ("prompt_logprobs", self.prompt_logprobs, _count(self.prompt_logprobs),
             f"0 to {MOST_LOGPROBS}"),
            ("presence_penalty", self.presence_penalty, _in(self.presence_penalty, -2, 2), "-2 to 2"),
            ("frequency_penalty", self.frequency_penalty, _in(self.frequency_penalty, -2, 2),
             "-2 to 2"),
            ("repetition_penalty", self.repetition_penalty,
             _in(self.repetition_penalty, 0, math.inf) and 0 < self.repetition_penalty < math.inf,
             "above 0"),
            ("logit_bias", dict(bias), all(_in(v, -100, 100) for v in bias.values()), "-100 to 100"),
            ("stop_token_ids or logit_bias", wrong_ids, not wrong_ids, of_ids),
            ("n", self.n, 1 <= self.n <= MOST_CHOICES, f"1 to {MOST_CHOICES}"),
        ]  # fmt: skip


def check(prompt: Sequence[int], params: SamplingParams, vocab: int, max_len: int) -> None:
    """Raises UsageError of all that is wrong with a request."""
    problems = params.problems(vocab, max_len, len(prompt))
    wrong = [i for i in prompt if not 0 <= i < vocab]
    if wrong:
        problems.append(("prompt", f"prompt: id {wrong[0]} is none of the model's {vocab}"))
    raise_all(problems)


def _in(value: float, low: float, high: float) -> bool:
    """False for what is not a number, too."""
    return low <= value <= high


def _count(value: int | None) -> bool:
    return value is None or 0 <= value <= MOST_LOGPROBS


def _writable(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the likeliest tokens there with theirs, best first; `token` itself
    stands among them only where it is one of them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What one step adds to one choice of a request.

    Tokens come with the text that they end, and their log-probabilities beside them where asked for. What
    stands behind a stop text is told nowhere; nor is the token that stopped, but in `matched_stop`. The last
    delta of a choice, and no other, has a `finish_reason`; an "error" says which.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: Finish | None = None
    matched_stop: str | int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of its prompt, chosen (in all choices, the one that stopped counted), and of the
    prompt those whose keys and values were kept from before."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Output:
    """All deltas of a choice as one."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: Finish
    matched_stop: str | int | None = None
    error: str | None = None


def joined(deltas: Sequence[Delta]) -> Output:
    """The deltas of one choice, the last of which has its end, as one."""
    last = deltas[-1]
    assert last.finish_reason is not None
    known = [d.logprobs for d in deltas if d.logprobs is not None]
    return Output(
        last.index,
        "".join(d.text for d in deltas),
        tuple(i for d in deltas for i in d.token_ids),
        tuple(entry for part in known for entry in part) if known else None,
        last.finish_reason,
        last.matched_stop,
        last.error,
    )

"""The engine over the judge: what a request gets is its own, whoever else is there."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from serving_judge import JudgeRunner

from partita.base.errors import UsageError
from partita.serve import grammar
from partita.serve.engine import Engine
from partita.serve.request import (
    EngineStoppedError,
    Grammar,
    OverloadedError,
    SamplingParams,
    joined,
)
from partita.spec.model import ModelSpec
from partita.train.data.tokenizer import Tokenizer

SPEC = ModelSpec(
    family="llama",
    layers=1,
    hidden=16,
    heads=2,
    kv_heads=1,
    ffn_hidden=24,
    vocab=256,
    max_seq_len=96,
)
BYTES = Tokenizer("byte")
PROMPTS = (
    [7, 3, 250, 7, 3, 9, 1, 2, 4, 4, 8, 99, 100, 7],
    [7, 3, 250, 7, 3, 9, 1, 2, 5],
    [9] * 30,
)


def judge(**given) -> JudgeRunner:
    return JudgeRunner(SPEC, **{"pages": 64, "page_size": 4} | given)


def engine(runner: JudgeRunner | None = None, **given) -> Engine:
    given = {"max_batch_tokens": 16, "max_sequences": 8, "end": ()} | given
    return Engine(runner or judge(), BYTES, **given)


def params(**given) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "temperature": 0.0} | given)


@pytest.fixture(scope="module")
def reference():
    return judge().reference


def logits_of(reference, ids) -> torch.Tensor:
    with torch.no_grad():
        return reference.logits(torch.tensor([ids]))[0]


def greedy(reference, prompt, new) -> tuple[int, ...]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(logits_of(reference, ids)[-1].argmax()))
    return tuple(ids[len(prompt) :])


KINDS = {  # the last to come repeats itself, so that a draft holds when all others have been read
    "greedy": params(logprobs=2),
    "seeded": params(temperature=1.0, seed=5, top_p=0.9, top_k=40, logprobs=0, max_tokens=9),
    "three": params(
        temperature=1.2,
        seed=9,
        n=3,
        min_p=0.02,
        max_tokens=7,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
    ),
    "repeats": params(logit_bias={65: 100.0}, max_tokens=20),
}


@pytest.fixture(scope="module")
def alone():
    """Each by itself, in an engine that has seen nothing before."""
    runner, found = judge(), {}
    for name, asked in KINDS.items():
        for i, prompt in enumerate(PROMPTS):
            with engine(runner) as one:
                found[name, i] = one.submit(prompt, asked).collect()
    return found


def test_greedy_is_the_reference(alone, reference):
    for i, prompt in enumerate(PROMPTS):
        assert alone["greedy", i][0].token_ids == greedy(reference, prompt, 12)


@pytest.mark.parametrize(
    "given, runner, happens",
    [
        ({}, {}, "prefix_hit_tokens"),
        ({"speculate": 4}, {}, "accepted_tokens"),
        ({"max_batch_tokens": 9}, {"pages": 17, "page_size": 3}, "preemptions"),
        ({}, {"depth": 2, "pages": 24}, "preemptions"),
        ({"max_sequences": 1, "speculate": 2}, {"page_size": 1, "pages": 60}, "prefix_hit_tokens"),
    ],
    ids=["together", "speculation", "preemption", "two steps at once", "one by one"],
)
def test_the_same_tokens_in_any_company(alone, given, runner, happens):
    """Beside others, with prefixes taken from others, after preemption, behind drafts."""
    model = judge(**runner)
    model.gate.clear()
    with engine(model, **given) as one:
        one.submit([1], params(max_tokens=1))  # the others come while it waits
        streams = {
            (name, i): one.submit(PROMPTS[i], asked)
            for i in range(len(PROMPTS))
            for name, asked in KINDS.items()
        }
        model.gate.set()
        found = {key: stream.collect() for key, stream in streams.items()}
        stats = one.stats()
    assert getattr(stats, happens) > 0
    for key, outputs in found.items():
        for output, other in zip(outputs, alone[key], strict=True):
            assert output.token_ids == other.token_ids and output.text == other.text
            assert (output.logprobs is None) == (other.logprobs is None)
            for a, b in zip(output.logprobs or (), other.logprobs or (), strict=True):
                assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=1e-9)
    assert stats.pages_free == stats.pages and stats.running == stats.waiting == 0
    assert stats.finished == {"length": 6 * len(PROMPTS) + 1, "stop": 0, "abort": 0, "error": 0}


def test_choices_and_seeds_differ(alone):
    texts = {output.token_ids for output in alone["three", 0]}
    assert len(texts) == 3


def test_log_probabilities_are_the_models(alone, reference):
    prompt = PROMPTS[0]
    with engine() as one:
        stream = one.submit(prompt, params(logprobs=20, prompt_logprobs=3, max_tokens=5))
        (output,) = stream.collect()
    ids = [*prompt, *output.token_ids]
    expected = logits_of(reference, ids).log_softmax(-1)
    told = [*(stream.prompt_logprobs or ()), *(output.logprobs or ())]
    assert told[0] is None and len(told) == len(ids)
    for place, entry in enumerate(told[1:], 1):
        row = expected[place - 1]
        assert entry is not None and entry.token == ids[place]
        assert entry.logprob == pytest.approx(float(row[ids[place]]), abs=1e-9)
        best = row.topk(len(entry.top))
        assert [i for i, _ in entry.top] == best.indices.tolist()
        assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-9)
    assert len(told[1].top) == 3 and len(told[-1].top) == 20


def test_a_prompt_can_be_scored_alone(reference):
    """Nothing is chosen; a step's chunks tell the whole, and a second time too, prefix or not."""
    prompt = [i % 50 for i in range(40)]
    rows = logits_of(reference, prompt).log_softmax(-1)
    whole = sum(float(rows[i, t]) for i, t in enumerate(prompt[1:]))
    with engine() as one:
        for _ in range(2):
            stream = one.submit(prompt, params(max_tokens=0, prompt_logprobs=0))
            (output,) = stream.collect()
            assert output.token_ids == () and output.finish_reason == "length"
            told = [entry.logprob for entry in stream.prompt_logprobs or () if entry is not None]
            assert sum(told) == pytest.approx(whole, abs=1e-8)


def test_an_answer_ends_at_an_id_a_text_or_the_end(alone):
    ids = alone["greedy", 0][0].token_ids
    third = ids[2]
    before = ids[: ids.index(third)]
    for given, matched in (
        ({"stop_token_ids": (third,)}, third),
        ({"ignore_eos": True, "stop_token_ids": (third,)}, third),
    ):
        with engine() as one:
            stream = one.submit(PROMPTS[0], params(**given))
            (output,) = stream.collect()
        assert output.finish_reason == "stop" and output.matched_stop == matched
        assert output.token_ids == before and stream.usage.completion_tokens == len(before) + 1
    with engine(end=(third,)) as one:
        (output,) = one.submit(PROMPTS[0], params()).collect()
        (whole,) = one.submit(PROMPTS[0], params(ignore_eos=True)).collect()
    assert output.token_ids == before and output.finish_reason == "stop"
    assert whole.token_ids == ids and whole.finish_reason == "length"


def test_bias_forces_and_forbids():
    with engine() as one:
        (forced,) = one.submit([1], params(logit_bias={65: 100.0})).collect()
        first = forced.token_ids[0]
        (other,) = one.submit([1], params(logit_bias={65: -100.0})).collect()
    assert forced.text == "A" * 12 and first == 65 and 65 not in other.token_ids


def test_a_cancelled_request_ends_once_and_holds_nothing():
    told, first = [], threading.Event()

    def on_delta(delta):
        told.append(delta)
        first.set()

    with engine() as one:
        stream = one.submit([5, 6], params(max_tokens=90, n=2), on_delta)
        other = one.submit([5, 6, 7], params())
        assert first.wait(30)
        stream.cancel()
        stream.cancel()
        assert one.drain(30)
        stats = one.stats()
        assert len(other.collect()[0].token_ids) == 12
    ends = Counter((d.index, d.finish_reason) for d in told if d.finish_reason)
    assert ends == {(0, "abort"): 1, (1, "abort"): 1} and stream.done
    assert stats.pages_free == stats.pages and stats.finished["abort"] == 2


def test_an_error_in_one_request_ends_that_one(reference):
    def broken(delta):
        raise RuntimeError("the client's own")

    class NotFinite(JudgeRunner):
        """Logits behind token 77 are no numbers."""

        def run(self, pieces):
            found, at = super().run(pieces), 0
            for piece in pieces:
                at += piece.want
                if piece.want and piece.tokens[-1] == 77:
                    found[at - 1] = torch.nan
            return found

    runner = NotFinite(SPEC, pages=64, page_size=4)
    with engine(runner) as one:
        streams = [
            one.submit([1, 77], params(temperature=t, seed=1, n=2), None) for t in (0.0, 1.0)
        ]
        one.submit([4, 4], params(n=2), broken)
        good = one.submit(PROMPTS[0], params())
        assert good.collect()[0].token_ids == greedy(reference, PROMPTS[0], 12)
        for stream in streams:
            for output in stream.collect():
                assert output.finish_reason == "error" and "not finite" in (output.error or "")
        assert one.drain(30)
        stats = one.stats()
    assert stats.failed is None and stats.finished["error"] == 6
    assert stats.pages_free == stats.pages


def test_a_failure_of_the_model_ends_everything_and_says_why():
    class Lost(JudgeRunner):
        def run(self, pieces):
            if len(self.runs) == 3:
                raise RuntimeError("rank 1 is gone")
            return super().run(pieces)

    runner = Lost(SPEC, pages=64, page_size=4)
    one = engine(runner)
    streams = [one.submit(p, params(n=2)) for p in PROMPTS]
    for stream in streams:
        for output in stream.collect():
            assert output.finish_reason == "error" and "rank 1 is gone" in (output.error or "")
    assert "rank 1 is gone" in (one.stats().failed or "")
    with pytest.raises(EngineStoppedError, match="rank 1 is gone"):
        one.submit([1], params())
    one.close()
    one.close()
    assert runner.closed


def test_draining_ends_what_is_there_and_takes_nothing_new():
    with engine() as one:
        stream = one.submit([1, 2], params())
        assert one.drain(30)
        assert stream.collect()[0].finish_reason == "length"
        with pytest.raises(EngineStoppedError, match="takes no more"):
            one.submit([1], params())
    with engine() as one:
        stream = one.submit([1, 2], params(max_tokens=90))
        assert not one.drain(0.0)
        assert stream.collect()[0].finish_reason == "abort"


def test_a_request_is_refused_with_all_that_is_wrong():
    with engine(max_waiting=4) as one:
        with pytest.raises(UsageError) as caught:
            one.submit([300], params(top_p=0, temperature=-1, n=0, logprobs=21, max_tokens=99))
        assert [key for key, _ in caught.value.all] == [
            "temperature", "top_p", "logprobs", "n", "max_tokens", "prompt",
        ]  # fmt: skip
        for prompt, text in (("", "empty"), ("\ud83d", "surrogate"), ([1] * 90, "at most 6")):
            with pytest.raises(UsageError, match=text):
                one.submit(prompt, params())
        with pytest.raises(UsageError, match="at most 0 tokens"):
            one.submit([1] * 96, params(max_tokens=1))
        with pytest.raises(OverloadedError, match="at most 4"):
            one.submit([1], params(n=5))
        assert one.submit([1], params(max_tokens=1)).collect()[0].finish_reason == "length"
    with pytest.raises(UsageError, match="max_sequences"):
        engine(max_batch_tokens=3, max_sequences=4)


@pytest.mark.parametrize("speculate", [0, 3])
def test_a_grammar_holds_at_any_temperature(speculate):
    pytest.importorskip("llguidance")
    digits = Grammar("regex", "[0-9]{3}-[a-c]{1,3}")
    with engine(speculate=speculate, end=(10,)) as one:
        stream = one.submit([1], params(grammar=digits, temperature=2.0, seed=3, n=3))
        other = one.submit([1, 2], params(ignore_eos=True))
        for output in stream.collect():
            head, _, tail = output.text.partition("-")
            assert len(head) == 3 and head.isdigit() and 1 <= len(tail) <= 3
            assert set(tail) <= set("abc") and output.finish_reason == "stop"
        assert other.collect()[0].finish_reason == "length"
        for wrong in (Grammar("regex", "(("), Grammar("json_schema", '{"type": 3}')):
            with pytest.raises(UsageError, match="grammar"):
                one.submit([1], params(grammar=wrong))
        assert one.stats().failed is None
    with engine(end=()) as one, pytest.raises(UsageError, match="an id that ends a text"):
        one.submit([1], params(grammar=digits))


@pytest.mark.parametrize("slow", [False, True])
def test_a_grammar_that_takes_too_much_ends_its_request(monkeypatch, slow):
    pytest.importorskip("llguidance")
    if slow:
        monkeypatch.setattr(grammar, "MASK_S", 0.0)
    wide = Grammar("regex", "[ab]*" if slow else "(a?){2000}a{2000}")
    with engine(end=(10,)) as one:
        bad = one.submit([1], params(grammar=wide, max_tokens=50), None)
        good = one.submit([1, 2], params())
        (output,) = bad.collect()
        assert output.finish_reason == "error"
        assert ("s to find" if slow else "too many expressions") in (output.error or "")
        assert good.collect()[0].finish_reason == "length" and one.stats().failed is None


def test_deltas_join_to_the_whole():
    parts = []
    done = threading.Event()

    def on_delta(delta):
        parts.append(delta)
        if delta.finish_reason:
            done.set()

    with engine() as one:
        one.submit(PROMPTS[1], params(logprobs=1), on_delta)
        assert done.wait(30)
        (whole,) = one.submit(PROMPTS[1], params(logprobs=1)).collect()
        assert one.stats().time_to_first_token.count == 2
        assert one.stats().between_tokens.count == 22
    assert joined(parts) == whole and len(parts) > 3

"""The engine over a model's ranks: the reference's tokens under every plan; a lost rank ends everything."""

from __future__ import annotations

import pytest
import tokenizers
import torch
from serve_models import Random, model, opening, sequences

from partita.model.families.export import export
from partita.serve.continued import continued
from partita.serve.engine import Engine
from partita.serve.part import Part
from partita.serve.request import EngineStoppedError, SamplingParams
from partita.serve.runner import started
from partita.train.data.tokenizer import Tokenizer

NEW = 8


@pytest.mark.parametrize(
    ("family", "plan"),
    [("llama", "tp2"), ("qwen2", "tp2 pp2"), ("gpt2", "pp2"), ("moe", "tp2+sp ep2")],
)
def test_tokens_are_the_references(family, plan):
    """Greedy, with log-probabilities; prompts in chunks, shared beginnings, few pages, drafts."""
    spec = model(family)
    judge, prompts = Random(spec).reference(), sequences(spec, 19, 7, 3)
    prompts.append([*prompts[0][:13], 5])
    with Engine(
        started(opening(spec, plan)), Tokenizer("byte"),
        max_batch_tokens=12, max_sequences=3, speculate=2, end=(),
    ) as engine:  # fmt: skip
        asked = SamplingParams(max_tokens=NEW, temperature=0.0, logprobs=0, prompt_logprobs=0)
        streams = [engine.submit(prompt, asked) for prompt in prompts]
        for prompt, stream in zip(prompts, streams, strict=True):
            (output,) = stream.collect()
            assert output.finish_reason == "length" and len(output.token_ids) == NEW
            ids = [*prompt, *output.token_ids]
            with torch.no_grad():
                logits = judge.logits(torch.tensor([ids]))[0]
            best = logits.argmax(-1).tolist()
            assert list(output.token_ids) == best[len(prompt) - 1 : -1]
            right = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
            told = [*(stream.prompt_logprobs or ())[1:], *(output.logprobs or ())]
            mine = [entry.logprob for entry in told if entry is not None]
            assert mine == pytest.approx(right, abs=1e-9)
        stats = engine.stats()
    assert stats.pages_free == stats.pages and stats.finished["length"] == 4


def test_a_hugging_face_folder_is_continued_behind_its_mark(tmp_path):
    """Beyond what the model sees, too: by the end of the text."""
    spec = model("llama", vocab=258, max_seq_len=16)
    export(tmp_path, spec, Random(spec).values().__getitem__, dtype=torch.float64)
    words = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    found = continued(tmp_path, "a cat", SamplingParams(max_tokens=14, temperature=0.0), "tp2")
    judge, ids = (
        Random(spec).reference(),
        [256, *inner.encode("a cat", add_special_tokens=False).ids],
    )
    for _ in range(14):
        with torch.no_grad():
            ids.append(int(judge.logits(torch.tensor([ids[-15:]]))[0, -1].argmax()))
    assert found.token_ids == ids[6:] and found.text == inner.decode(ids[6:], False)


def test_a_lost_rank_ends_every_stream(monkeypatch):
    right = Part.run

    def run(part, pieces):
        if part.context.rank == 1 and pieces[0].start > 6:
            raise RuntimeError("out of luck")
        return right(part, pieces)

    monkeypatch.setattr(Part, "run", run)
    spec = model("llama")
    with Engine(started(opening(spec, "tp2")), Tokenizer("byte"), end=()) as engine:
        asked = SamplingParams(max_tokens=20, temperature=0.0, n=2)
        streams = [engine.submit([1, 2, x], asked) for x in (3, 4, 5)]
        for stream in streams:
            for output in stream.collect():
                assert output.finish_reason == "error" and len(output.token_ids) < 20
                assert "rank 1 is lost" in (output.error or "")
        assert "rank 1 is lost" in (engine.stats().failed or "")
        with pytest.raises(EngineStoppedError, match="rank 1 is lost"):
            engine.submit([1], asked)

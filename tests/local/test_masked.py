"""Masked tokens as data: which they are, what stands there, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers
import torch

import partita as pt
from partita.base.errors import UsageError
from partita.train.build import open_job_data
from partita.train.data.masked import Masking
from partita.train.data.streams import Stream

L, B, VOCAB, MASK = 64, 32, 99, 98


def job(tmp_path, model=None, **data):
    if not (tmp_path / "t.npy").exists():
        np.save(tmp_path / "t.npy", np.random.default_rng(0).integers(0, 90, 100 * L))
    return pt.Job.load(
        {
            "model": {"preset": "tiny", "causal": False, "vocab": VOCAB, **(model or {})},
            "data": {"source": f"tokens:{tmp_path / 't.npy'}", "mlm_token": MASK, **data},
            "cluster": {"preset": "laptop", "devices": 1},
            "train": {"global_batch_size": B, "seq_len": L},
        }
    )


def test_shares_are_those_asked_for_and_the_rest_stands(tmp_path):
    """Of 100 sequences, which n tokens fill without one more behind."""
    data = open_job_data(job(tmp_path))
    assert data.num_sequences == 100
    whole = data.train.batch(range(B), L)
    batch = data.microbatch(0, range(B))
    n, chosen = B * L, batch.valid
    assert float(chosen.sum()) / n == pytest.approx(0.15, abs=0.03)
    assert torch.equal(batch.targets, torch.where(chosen, whole.ids, 0))
    assert torch.equal(batch.ids[~chosen], whole.ids[~chosen])
    masked = batch.ids[chosen] == MASK
    itself = batch.ids[chosen] == whole.ids[chosen]
    shares = [float(s.float().mean()) for s in (masked, itself, ~masked & ~itself)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.06)
    assert len(set(batch.ids[chosen][~masked & ~itself].tolist())) > 10


def test_masks_belong_to_samples(tmp_path):
    """A sample's are its own, whoever asks for it; of another seed, step or epoch they are others; held-out
    sequences keep theirs."""
    data = open_job_data(job(tmp_path))
    whole, part = data.microbatch(1, range(B)), data.microbatch(1, [30, 7])
    for name in ("ids", "targets", "valid"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[30, 7]])
    again = data.microbatch(25, range(B))  # 25 steps of 32 are eight epochs of 100
    assert data.sample(25, 3) == data.sample(0, 3)
    assert not torch.equal(again.valid, data.microbatch(0, range(B)).valid)
    other = open_job_data(pt.Job.load(job(tmp_path).to_table(), "seed=1"))
    assert not torch.equal(other.microbatch(1, range(B)).valid, whole.valid)
    held = open_job_data(job(tmp_path, eval_source=job(tmp_path).data.source))
    one, two = (torch.cat([b.valid for b in held.eval_batches(size)]) for size in (7, 20))
    assert torch.equal(one, two) and 0.1 < float(one.float().mean()) < 0.2


def test_marks_and_what_is_not_counted_are_never_chosen():
    ids = np.arange(40).repeat(2)
    held = Stream(ids, mask=(np.arange(80) % 3 > 0).astype(np.uint8), ahead=0)
    masking = Masking(1.0, (1.0, 0.0, 0.0), 50, 50, 0, frozenset({0, 7}))
    batch = masking(held.batch(range(2), 40), range(2))
    want = (np.arange(80) % 3 > 0) & ~np.isin(ids, [0, 7])
    assert batch.valid.flatten().tolist() == want.tolist()
    assert (batch.ids == 50).flatten().tolist() == want.tolist()


def test_what_is_asked_of_whom(tmp_path):
    """An encoder's tokens are masked unless a job says otherwise, which no plan can mend; a causal model's
    where it says so."""
    assert job(tmp_path).mlm_probability == 0.15 and job(tmp_path).problems() == []
    (found,) = job(tmp_path, mlm_probability=0.0).problems()
    assert found.severity == "error" and "each token sees its own" in found.message
    causal = job(tmp_path, {"causal": True})
    assert causal.mlm_probability == 0 and open_job_data(causal).masking is None
    (found,) = job(tmp_path, {"causal": True}, mlm_probability=0.3).problems()
    assert found.severity == "warning"


def test_a_tokenizer_says_what_masks_and_what_is_a_mark(tmp_path):
    """BERT's: records end with [SEP], which is never chosen; [MASK] stands for what is."""
    marks = ["[PAD]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*marks, *map(str, range(50))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[PAD]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(marks)
    made.save(str(tmp_path / "tokenizer.json"))
    lines = [{"text": " ".join(str((7 * i + k) % 50) for k in range(9))} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"source": str(tmp_path / "t.jsonl"), "tokenizer": str(tmp_path / "tokenizer.json")}
    source |= {"mlm_probability": 1.0, "mlm_as": [1.0, 0.0, 0.0], "eval_fraction": 0.0}
    whole = job(tmp_path, {"vocab": 53}).to_table()
    del whole["data"]
    data = open_job_data(pt.Job.load({**whole, "data": source}))
    batch = data.microbatch(0, [0])
    assert data.masking is not None and data.masking.token == 2
    assert set(batch.ids[0].tolist()) == {1, 2}
    assert batch.valid.equal(batch.ids == 2) and int((batch.ids == 1).sum()) == L // 10


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"mlm_token": None}, "have no mask token: state its id"),
        ({"mlm_token": VOCAB}, "outside"),
        ({"source": "python-stdlib", "mlm_token": None}, "set model.vocab to 257 or more"),
    ],
)
def test_a_mask_token_is_wanted(data, told, tmp_path):
    stated = {**job(tmp_path).to_table(), "data": job(tmp_path).to_table()["data"] | data}
    stated["data"] = {k: v for k, v in stated["data"].items() if v is not None}
    stated["model"]["vocab"] = VOCAB if "source" not in data else 256
    with pytest.raises(UsageError, match=told):
        open_job_data(pt.Job.load(stated))


def test_shares_that_do_not_add_up():
    with pytest.raises(UsageError, match="add up to 1"):
        pt.Job.load(
            {
                "model": "tiny",
                "data": {"mlm_as": [0.8, 0.1, 0.2]},
                "train": {"global_batch_size": 1, "seq_len": 8},
            }
        )

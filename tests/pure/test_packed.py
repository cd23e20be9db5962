"""Packed documents: each microbatch costs what its documents do."""

from dataclasses import replace

import numpy as np
import pytest

import partita as pt
from partita.base.errors import DataError
from partita.simulate.packed import attention_seconds, microbatch_shares, sequence_shares
from partita.spec.train import DataSpec

LENGTH = 8192


def job(tmp_path, documents, plan="pp2:1f1b/4mb dp_replicate2 tp4+sp bf16"):
    path = tmp_path / "documents.npy"
    np.save(path, np.append(np.concatenate(documents), -1))
    one = pt.Job.of("llama3-8b", "16xh100", plan, global_batch_size=8, seq_len=LENGTH)
    return replace(one, data=DataSpec(source="tokens:x.npy", documents=str(path)))


def packed(*lengths):
    assert sum(lengths) == LENGTH
    return np.repeat(np.arange(len(lengths)), lengths)


def test_shares_are_counted_pairs():
    ids = np.concatenate([packed(LENGTH), packed(LENGTH // 2, LENGTH // 2), packed(*[1] * LENGTH)])
    whole = LENGTH * (LENGTH + 1) / 2
    half = LENGTH // 2 * (LENGTH // 2 + 1)
    assert sequence_shares(ids, LENGTH) == pytest.approx([1.0, half / whole, LENGTH / whole])
    assert sequence_shares(ids, LENGTH, False) == pytest.approx([1.0, 0.5, 1 / LENGTH])


def test_microbatches_and_replicas_are_those_of_the_sample_order(tmp_path):
    """Sample i is sequence i; microbatch m has samples 2m and 2m + 1, one a replica."""
    documents = [packed(LENGTH)] * 5 + [packed(LENGTH // 2, LENGTH // 2)] + [packed(LENGTH)] * 2
    found = microbatch_shares(job(tmp_path, documents))
    assert found.shape == (4, 2)
    assert found[2, 1] == pytest.approx(0.5, rel=1e-3)
    assert np.delete(found.ravel(), 5) == pytest.approx(1.0)


def test_one_document_a_sequence_is_the_plain_step(tmp_path):
    p = pt.simulate(job(tmp_path, [packed(LENGTH)] * 8))
    found = p.to_json()["packed"]
    assert found["step_time_s"] == pytest.approx(p.step_time_s, rel=1e-12)
    assert found["attention_share"] == {"mean": 1.0, "max": 1.0}


def test_without_a_pipeline_the_step_loses_exactly_its_attention(tmp_path):
    """One replica packs halves, the other nothing: the other's step stands; both: half the attention goes."""
    plan = "dp_replicate2 tp8+sp bf16 4mb"
    halves = packed(LENGTH // 2, LENGTH // 2)
    one = pt.simulate(job(tmp_path, [packed(LENGTH), halves] * 4, plan))
    assert one.to_json()["packed"]["step_time_s"] == pytest.approx(one.step_time_s, rel=1e-12)
    both = pt.simulate(job(tmp_path, [halves] * 8, plan))
    assert both.timed is not None
    attention = sum(attention_seconds(both.timed.works.stages[0], both.timed.machine).values())
    share = both.to_json()["packed"]["attention_share"]["mean"]
    assert both.step_time_s - both.to_json()["packed"]["step_time_s"] == pytest.approx(
        4 * attention * (1 - share), rel=1e-9
    )


def test_a_bad_file_is_told(tmp_path):
    with pytest.raises(DataError, match="less than one sequence"):
        microbatch_shares(job(tmp_path, [np.zeros(10, dtype=int)]))
    one = job(tmp_path, [packed(LENGTH)])
    (tmp_path / "documents.npy").write_text("text")
    with pytest.raises(DataError):
        microbatch_shares(one)

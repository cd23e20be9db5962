"""Models whose tokens see those that follow them: every axis makes one device's numbers."""

from dataclasses import replace

import pytest
import verify_jobs

import partita as pt
from partita.base.errors import UsageError
from partita.model.core import Tiled
from partita.simulate.serving.served import request_of
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan
from partita.verify.parity import verify

LLAMA = ModelSpec.from_preset("llama3-8b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = [
    ("cp2:ring tp2+sp fp64", "llama", {"packed": True}),
    ("cp2:ulysses pp2/2mb fp64", "llama", {"sliding_window": 3}),
    ("cp2:ring fp64", "llama", {"seq": 7}),
    ("tp2+sp fp64", "gpt2", {"seq": 7, "dropout": 0.2}),
    ("cp2:ring recompute:full bf16", "gpt_neox", {}),
    slow("cp4:hybrid2x2 pp2/2mb fp64", "gpt_neox", {"parallel_residual": True}),
    slow("cp4:ring dp_shard2.zero3 fp64", "llama", {}),
    slow("cp2:all_gather offload:cpu fp64", "llama", {"sliding_window": 3, "packed": True}),
    slow("cp2:ring recompute:full fp16", "llama", {**verify_jobs.MLA, "seq": 7}),
    slow("cp2:ring ep2 fp64", "llama", {**verify_jobs.EXPERTS, "seq": 7}),
    slow("cp2:ring fp64", "gpt2", {"dropout": 0.2, "packed": True, "sliding_window": 3}),
    slow("cp2:all_gather tp2 fp64", "gpt2", {"dropout": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "family", "model"), CASES)
def test_a_plan_equals_one_device(plan, family, model, folder):
    """Whole, packed, within a window to both sides, and filled up."""
    model = {"layers": 2, **model, "causal": False}
    found = verify(verify_jobs.job(folder, plan, family, batch=4, **model))
    assert found.equal and found.traffic_equal, str(found)


def test_what_follows_left_unseen_is_found(folder, monkeypatch):
    right = Tiled.forward

    def wrong(ctx, *given):
        return right(ctx, *given[:-1], True)

    monkeypatch.setattr(Tiled, "forward", staticmethod(wrong))
    found = verify(verify_jobs.job(folder, "tp2 fp64", batch=4, layers=1, causal=False))
    assert not found.equal and "blocks.0.attention" in str(found)


def test_attention_costs_twice():
    """FLOPs by every convention, and the simulator's seconds; nothing else costs more."""
    encoder = replace(LLAMA, causal=False)
    causal, full = (m.attention_flops_per_token(8192) for m in (LLAMA, encoder))
    assert full == 2 * causal == encoder.attention_flops_per_token(8192, "model_full")
    near = (
        replace(m, sliding_window=1024).attention_flops_per_token(8192) for m in (LLAMA, encoder)
    )
    assert next(near) * 2 == next(near)
    plan = {"plan": "tp8+sp bf16", "global_batch_size": 1, "seq_len": 8192}
    there, both = (pt.simulate(pt.Job.of(m.to_toml(), "8xh100", **plan)) for m in (LLAMA, encoder))
    assert there.timed is not None and both.timed is not None

    def flops(p, kind):
        part = p.timed.works.stages[0].parts[1]
        return sum(k.flops for k in (*part.work.forward, *part.work.input) if k.kind == kind)

    assert flops(both, "attention") == 2 * flops(there, "attention") > 0
    assert flops(both, "matmul") == flops(there, "matmul")
    assert both.step_time_s > there.step_time_s and both.mfu > there.mfu
    assert both.to_json()["memory"]["peak_bytes"] == there.to_json()["memory"]["peak_bytes"]


def test_what_an_encoder_is_not():
    with pytest.raises(UsageError, match="family bloom has no causal = false"):
        ModelSpec.from_toml({"preset": "bloom-560m", "causal": False})
    with pytest.raises(UsageError, match=r"an encoder \(causal = false\) writes no text"):
        request_of(replace(LLAMA, causal=False), Plan(), "fp32")

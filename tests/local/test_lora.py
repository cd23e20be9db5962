"""LoRA as it runs: equal to one device, kept, computed and sent as declared; read by any plan, merged."""

from __future__ import annotations

import pytest
import test_drift
import test_frozen_weights
import verify_jobs

from partita.comm.local import local
from partita.verify.parity import verify

TARGETS = {
    "llama": ("wq", "wk", "wv", "wo", "gate_up", "down"),
    "gpt2": ("wq", "wo", "fc1", "fc2"),
}
CASES = [
    ("tp4+sp dp_shard2.zero3 2mb bf16", "llama", {}),
    ("tp2 dp_shard2.zero1 cp2:ring fp64", "llama", {}),
    ("pp2:zb_v/4mb tp2+sp dp_shard2.zero2 recompute:full fp64", "gpt2", {}),
    ("dp_shard2.zero3 tp2+sp ep2 2mb fp64", "llama", {**verify_jobs.EXPERTS, "layers": 5}),
    ("tp2 dp2 fp8", "llama", {}),
]  # fmt: skip


def job(folder, plan, family="llama", **model):
    low = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": TARGETS[family]}
    return verify_jobs.job(folder, plan, family, **low, **model)


@pytest.mark.parametrize(("plan", "family", "model"), CASES)
def test_a_plan_equals_one_device(plan, family, model, tmp_path):
    found = verify(job(tmp_path, plan, family, **model))
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.parametrize(
    ("plan", "family"),
    [
        ("tp2+sp 2mb bf16", "llama"),
        ("tp2 2mb recompute:selective recompute.modules=core,norm,act", "gpt2"),
    ],
)
def test_kept_storages_and_flops_are_the_declared(plan, family, tmp_path):
    made = job(tmp_path, plan, family)
    with local(made.plan.world_size, 20) as ranks:
        for rows in ranks.run(test_drift.look, made):
            for name, kept, declared_kept, flop, declared in rows:
                assert (kept, flop) == (declared_kept, declared), name


def test_backward_flops_are_the_declared(tmp_path):
    seen, declared = test_frozen_weights.step_flops(job(tmp_path, "1mb fp32"))
    assert seen == declared


def test_any_plan_reads_a_checkpoint(tmp_path):
    one = job(tmp_path, "dp_shard2.zero3 2mb fp32")
    with local(2, 20) as ranks:
        whole, _ = ranks.run(test_frozen_weights.trained, one, tmp_path / "whole", 3)[0]
        _, saved = ranks.run(test_frozen_weights.trained, one, tmp_path / "part", 2)[0]
        there = one.with_plan("tp2+sp fp32")
        losses, _ = ranks.run(test_frozen_weights.trained, there, tmp_path / "tp", 3, saved)[0]
        assert losses[0] == pytest.approx(whole[2], rel=1e-5)

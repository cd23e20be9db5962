"""LoRA as it runs: equal to one device, kept, computed and sent as declared; read by any plan, merged."""

from __future__ import annotations

import json

import hf_models
import pytest
import test_drift
import test_frozen_weights
import test_pretrained
import torch
import verify_jobs

from partita.base.errors import UsageError
from partita.comm.single import SingleWorld
from partita.comm.threads.local import local
from partita.model.dropout import RowDropout
from partita.model.reference import Reference, weight_shapes
from partita.parallel.lora import Drop
from partita.spec.lora import adapter_fields
from partita.train.build import assemble
from partita.train.checkpoints.export import export_adapter, export_checkpoint
from partita.verify.parity import verify
from partita.verify.runs import boxes

TARGETS = {
    "llama": ("wq", "wk", "wv", "wo", "gate_up", "down"),
    "gpt2": ("wq", "wo", "fc1", "fc2"),
}
EXPERTS = {
    **verify_jobs.EXPERTS,
    "lora_targets": ("wo", "gate_up", "expert_gate_up", "expert_down", "shared_gate_up", "shared_down"),
}  # fmt: skip
LATENT = {
    **EXPERTS, **verify_jobs.MLA,
    "lora_targets": ("q_a", "kv_a", "k_pe", "wq", "wk", "wv", "wo", "expert_gate_up", "expert_down"),
}  # fmt: skip
DROPS = {**EXPERTS, "lora_dropout": 0.3}
CASES = [
    ("tp4+sp dp_shard2.zero3 2mb bf16", "llama", {}),
    ("tp2 dp_shard2.zero1 cp2:ring fp64", "llama", {}),
    ("pp2:zb_v/4mb tp2+sp dp_shard2.zero2 recompute:full fp64", "gpt2", {}),
    ("dp_shard2.zero3 tp2+sp ep2 2mb fp64", "llama", {**EXPERTS, "layers": 5}),
    ("pp2:zb_h1/2mb tp2+sp ep2 etp1 recompute:full fp64", "llama", LATENT),
    ("tp2 etp2 bf16", "llama", EXPERTS),
    ("tp2 dp2 fp8", "llama", {}),
    ("cp2:ring tp2+sp ep2 etp2 expert.chunks=2 recompute:full fp64", "llama", {**DROPS, "layers": 2}),
    ("cp2:ring tp2+sp dp_shard2.zero1 2mb fp64", "llama", {"lora_dropout": 0.3}),
    ("pp2:zb_h1/4mb tp2 dp_shard2.zero3 recompute:full fp64", "gpt2", {"lora_dropout": 0.3, "dropout": 0.1}),
]  # fmt: skip


def job(folder, plan, family="llama", **model):
    low = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": TARGETS[family]}
    return verify_jobs.job(folder, plan, family, **{**low, **model})


LATER = (5, 8)  # in test-slow: what other cases hold a part of


@pytest.mark.turns(2)
@pytest.mark.parametrize(
    ("plan", "family", "model"),
    [pytest.param(*c, marks=pytest.mark.slow if i in LATER else []) for i, c in enumerate(CASES)],
)
def test_a_plan_equals_one_device(plan, family, model, tmp_path):
    found = verify(job(tmp_path, plan, family, **model), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_a_mask_that_a_rank_does_not_draw_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(Drop, "of_now", lambda self: lambda x: x)
    found = verify(job(tmp_path, "tp2 fp64", layers=1, lora_dropout=0.3))
    assert not found.equal and found.traffic_equal


def test_rows_of_experts_that_take_each_other_s_masks_are_seen(tmp_path, monkeypatch):
    right = RowDropout.mask
    monkeypatch.setattr(
        RowDropout, "mask", lambda self, step, counts, at: right(self, step, counts, at.flip(0))
    )
    found = verify(job(tmp_path, "dp2 ep2 fp64", **{**DROPS, "layers": 2}), brief=True)
    assert not found.equal and found.traffic_equal


@pytest.mark.parametrize(
    ("plan", "family", "model"),
    [
        ("tp2+sp 2mb bf16", "llama", {}),
        ("tp2 2mb recompute:selective recompute.modules=core,norm,act", "gpt2", {}),
        ("tp2+sp ep2 2mb bf16", "llama", {**DROPS, "layers": 2}),
        ("tp2 etp2 2mb bf16", "llama", {**LATENT, "layers": 2}),
    ],
)
def test_kept_storages_and_flops_are_the_declared(plan, family, model, tmp_path):
    made = job(tmp_path, plan, family, **model)
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


def tuned(tmp_path, kind="llama", **more):
    """A pretrained folder trained a little under tp and ZeRO; its job and its checkpoint."""
    folder = hf_models.save_model(tmp_path / "model", kind, torch.float32)
    own = {"gpt2": ("wo", "fc1", "fc2"), "deepseek-v3": LATENT["lora_targets"]}
    targets = list(own.get(kind, TARGETS["llama"]))
    low = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": targets, **more}
    made = test_pretrained.job(folder, tmp_path, "tp2+sp dp_shard2.zero3", **low)
    with local(4, 20) as ranks:
        _, saved = ranks.run(test_frozen_weights.trained, made, tmp_path / "run", 2)[0]
    return folder, made, saved


@pytest.mark.parametrize("kind", ["llama", "gpt2", "deepseek-v3"])
def test_the_merged_folder_has_the_adapted_model_s_logits(kind, tmp_path):
    folder, made, saved = tuned(tmp_path, kind)
    done = export_checkpoint(saved, tmp_path / "out")
    assert done["bytes"] < 4 * made.model.parameters()  # no A, no B
    again = made.with_plan("1mb")
    alone = assemble(again, SingleWorld())
    test_frozen_weights.load_run(saved, again, alone.model, alone.update, alone.fingerprint)
    held = boxes(alone.model, lambda unit: unit.master)
    weights = {n: held[n][0][1] for n in weight_shapes(made.model)}
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        ours = Reference(made.model, weights).logits(ids)
        theirs = hf_models.load_model(tmp_path / "out", torch.float32)(ids).logits
        before = hf_models.load_model(folder, torch.float32)(ids).logits
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 1e-5
    assert float((before - theirs).abs().max() / ours.abs().max()) > 1e-4  # it has learnt


def test_an_adapter_is_written_and_read_in_the_format_of_peft(tmp_path):
    folder, made, saved = tuned(tmp_path)
    export_adapter(saved, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
    assert sorted(config["target_modules"]) == sorted(
        f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert adapter_fields(tmp_path / "adapter") == {
        "lora_rank": 3, "lora_alpha": 6.0, "lora_targets": list(TARGETS["llama"]),
    }  # fmt: skip
    spec = {"adapter": str(tmp_path / "adapter")}
    read = test_pretrained.job(folder, tmp_path, "tp2+sp", **spec)
    assert read.model == made.model
    with local(2, 20) as ranks:
        found = ranks.run(lambda w: boxes(assemble(read, w).model, lambda unit: unit.master))
        _, kept = ranks.run(test_frozen_weights.trained, read, tmp_path / "again", 0)[0]
    assert {n for rank in found for n in rank} == set(weight_shapes(read.model))
    export_adapter(kept, tmp_path / "second")
    first, second = (
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("adapter", "second")
    )
    assert first == second


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"use_dora": True}, "use_dora"), ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
        ({"target_modules": ["gate_proj"]}, "target_modules"), ({"peft_type": "IA3"}, "peft_type"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_kind_is_refused(change, key, tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.1}))
    assert adapter_fields(tmp_path)["lora_dropout"] == 0.1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_fields(tmp_path)["lora_targets"] == ["wq"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match=key):
        adapter_fields(tmp_path)

"""Frozen weights as they run: equal to one device, stored and kept as declared, saved and read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import test_drift
import torch
import verify_jobs
from saves import save_run
from torch.utils.flop_counter import FlopCounterMode

from partita.base.errors import UsageError
from partita.comm.single import SingleWorld
from partita.comm.threads.local import local
from partita.parallel.read import flops, state_bytes, tensor_bytes
from partita.simulate.predict import simulate
from partita.train.build import assemble
from partita.train.checkpoints.checkpoint import Ranks
from partita.train.checkpoints.resume import load_run
from partita.verify.parity import verify

ATTENTION = {"frozen": ("blocks.*.attention.w[qk]*", "*.mlp.[df]*", "embedding.*")}
FIRST = {"frozen": ("embedding.*", "blocks.[012].*")}
EXPERTS = {"frozen": ("*experts*", "*.norm")}
LATENT = {"frozen": ("*q_a", "*kv_a*", "*attention.wk", "*mlp*")}
ROUTER = {"trainable": ("*router*", "*.wq", "head.*")}
CASES = [
    ("tp2+sp dp_shard2.zero3 2mb fp64", "llama", ATTENTION),
    ("dp_shard2.zero1 tp2 cp2:ring bf16", "llama", ATTENTION),
    ("pp2:zb_h1/4mb dp_shard2.zero2 recompute:full fp64", "gpt2", ATTENTION),
    ("pp2:dualpipev/4mb dp_replicate2 bf16 offload:cpu", "llama", FIRST),
    ("dp_shard2.zero2 tp2+sp ep2 etp2 2mb fp64", "moe", EXPERTS),
    ("dp_shard2.zero3 tp2+sp ep2 2mb bf16", "moe", ROUTER),
    ("dp_shard2.zero3 tp2+sp 2mb fp64", "latent", LATENT),
]  # fmt: skip


def job(folder, plan, family="llama", rule=ATTENTION, **changes):
    fields = {"moe": {**verify_jobs.EXPERTS, "layers": 5}, "latent": test_drift.LATENT}
    more = fields.get(family, {})
    made = verify_jobs.job(folder, plan, "llama" if more else family, **more)
    return replace(made, train=replace(made.train, **rule, **changes))


@pytest.mark.turns(2)
@pytest.mark.parametrize(("plan", "family", "rule"), CASES)
def test_a_plan_equals_one_device(plan, family, rule, tmp_path):
    found = verify(job(tmp_path, plan, family, rule), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_an_asynchronous_pipeline_keeps_versions_of_what_is_trained(tmp_path):
    found = verify(job(tmp_path, "pp2:pipedream_2bw/4mb fp64", clip_grad_norm=0.0))
    assert found.equal, str(found)


def test_versions_of_what_is_trained_are_predicted(tmp_path):
    """Two of a weight that is trained, in bf16 apart from its masters; one of a frozen one."""
    predicted = simulate(job(tmp_path, "pp2:pipedream_2bw/4mb bf16", clip_grad_norm=0.0))
    assert predicted.laid is not None
    for place, ledger in enumerate(predicted.ledgers):
        units = [
            t
            for stage in predicted.laid.stages_of(place)
            for block in stage.blocks
            for t in block.tensors.values()
            if t.role == "parameter"
        ]
        frozen = [t.name.startswith("frozen") for t in units]
        held = [tensor_bytes(t, predicted.laid.sizes) for t in units]
        assert 0 < sum(frozen) < len(frozen)
        want = sum(n * (1 if f else 2) for n, f in zip(held, frozen, strict=True))
        assert ledger.at_peak["parameters"] == want


@pytest.mark.parametrize(
    "plan", ["tp2+sp 2mb bf16", "2mb fp32 recompute:selective recompute.modules=core,norm,act"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kept_storages_and_flops_are_the_declared(plan, family, tmp_path):
    made = job(tmp_path, plan, family)
    with local(made.plan.world_size, 20) as ranks:
        for rows in ranks.run(test_drift.look, made):
            for name, kept, declared_kept, flop, declared in rows:
                assert (kept, flop) == (declared_kept, declared), name


def step_flops(made):
    """FLOPs of a step's matmuls on one rank without those of attention's kernel, seen and declared."""
    built = assemble(made, SingleWorld())
    model, batch = built.model, built.batch(0)
    model.begin(batch)
    aten = torch.ops.aten
    flash = (
        test_drift.CPU_FLASH,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )
    ours = dict.fromkeys(flash, lambda *a, **_: 0)
    ours[aten.addmm_] = lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        model.executor.run(batch.microbatches)
    declared = 0.0
    for block in model.laid.stages[0].blocks:
        dense = [op for op in block.ops() if op.kind != "attention"]
        segments = tuple(
            replace(s, ops=tuple(o for o in s.ops if o in dense)) for s in block.segments
        )
        found = flops(replace(block, segments=segments), model.laid.sizes)
        declared += found["F"] + found["B"]
    return counter.get_total_flops(), declared


def test_backward_flops_are_the_declared(tmp_path):
    rule = {"frozen": (*ATTENTION["frozen"], "head.table")}
    seen, declared = step_flops(job(tmp_path, "1mb fp32", rule=rule))
    assert seen == declared


def stored(world, made):
    """Bytes of the units' storages after a step, and what is declared."""
    built = assemble(made, world)
    built.model.forward_backward(built.batch(0))
    built.update.step()
    model, held = built.model, {"parameters": 0, "gradients": 0, "optimizer": 0}
    for unit in model.units:
        whole = unit.gradients.tensor if unit.spec.stage < 2 else unit.gradient
        held["parameters"] += unit.working.untyped_storage().nbytes()
        if unit.spec.frozen:
            assert unit.gradients.tensor is None and not unit.gradient.numel()
            assert unit.master.data_ptr() == unit.shard.data_ptr()
            continue
        held["gradients"] += whole.untyped_storage().nbytes()
        if unit.master.dtype != unit.working.dtype:
            held["optimizer"] += unit.master.untyped_storage().nbytes()
    for states in built.update.optimizer.state.values():
        held["optimizer"] += sum(s.nbytes for s in states.values() if s.dim())
    blocks = [b for s in model.laid.stages_of(model.place) for b in s.blocks]
    return held, sum((state_bytes(b, model.laid.sizes) for b in blocks), Counter())


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_stored_bytes_are_the_declared(zero, tmp_path):
    with local(4, 20) as ranks:
        for held, declared in ranks.run(stored, job(tmp_path, f"dp_shard2.zero{zero} tp2+sp bf16")):
            assert held["parameters"] == declared["parameters"]
            assert held["gradients"] == declared["gradients"] > 0
            padding = (
                declared["optimizer"] - held["optimizer"]
            )  # of last shards, which no optimizer sees
            assert 0 <= padding <= 12 * 3 * len(declared) * 7


def trained(world, made, folder, steps, start=None):
    """Trains, saves; returns losses from where it started."""
    built = assemble(made, world)
    model, update, data = built.model, built.update, built.fingerprint
    first = load_run(start, made, model, update, data) if start else 0
    losses = []
    for step in range(first, steps):
        losses.append((model.forward_backward(built.batch(step)), update.step()))
    ranks = Ranks(world.rank, world.size, built.agree)
    return losses, save_run(folder, steps, made, model, update, data, ranks)


def test_any_plan_reads_a_checkpoint_and_the_same_weights_are_frozen(tmp_path):
    one = job(tmp_path, "dp_shard2.zero3 2mb fp32")
    with local(2, 20) as ranks:
        whole = ranks.run(trained, one, tmp_path / "whole", 3)[0]
        _, saved = ranks.run(trained, one, tmp_path / "part", 2)[0]
        for line in ("tp2 fp32", "pp2/2mb fp32"):
            losses, _ = ranks.run(trained, one.with_plan(line), tmp_path / line[:3], 3, saved)[0]
            assert losses[0] == pytest.approx(whole[0][2], rel=1e-5)
        low, _ = ranks.run(trained, one.with_plan("tp2 bf16"), tmp_path / "low", 3, saved)[0]
        assert low[0][0] == pytest.approx(whole[0][2][0], rel=2e-2)
        _, rounded = ranks.run(trained, one.with_plan("tp2 bf16"), tmp_path / "bf16", 1)[0]
        ranks.run(trained, one, tmp_path / "wide", 2, rounded)
        with pytest.raises(UsageError, match=r"train\.frozen"):
            ranks.run(trained, job(tmp_path, "tp2 fp32", rule=FIRST), tmp_path / "x", 3, saved)

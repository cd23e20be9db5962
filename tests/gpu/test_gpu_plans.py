"""Plans of many features on thread ranks that share one GPU: each equal to one device, the CPU, in float64
and at its own precision, within the bounds of docs/verify.md; traffic equal to the byte."""

from __future__ import annotations

from dataclasses import replace

import gpu_jobs
import image_jobs
import pytest
import torch
import verify_jobs
from gpu_jobs import DEVICE

from partita.comm.threads.local import local
from partita.model.reference import Reference, loss_and_gradients
from partita.verify.batches import open_data, whole_batch
from partita.verify.judge import start_weights
from partita.verify.parity import verify

EXPERTS, MLA = verify_jobs.EXPERTS, verify_jobs.MLA
KEPT = "offload.targets=activations"
EIGHT = {"layers": 2, "hidden": 32, "ffn_hidden": 32, "seq": 16}  # sizes that kernels take
LORA = {"lora_rank": 2, "lora_targets": ("wq", "wo"), "lora_dropout": 0.1}
PLANS = [
    ("llama", {}, "dp_shard2.zero1 tp2+sp 2mb fp64"),
    ("llama", {"tied": True}, "dp_replicate2 dp_shard2.zero2 2mb bf16 recompute:selective"),
    ("llama", verify_jobs.QWEN, "dp_shard2.zero3 tp2+sp fp32 recompute:full"),
    ("llama", {"packed": True}, "cp2:ring bf16"),
    ("llama", {}, "cp4:hybrid2x2 recompute:full fp16"),
    ("llama", {"sliding_window": 3}, "cp2:all_gather fp32"),
    ("gpt2", {"dropout": 0.1}, "cp2:ulysses bf16"),
    ("llama", {"tied": True}, f"pp2:zb_h1/2mb bf16 offload:cpu {KEPT}"),
    ("llama", {"layers": 4}, "pp2:dualpipev/4mb bf16"),
    ("llama", {"layers": 4}, "pp2:interleaved_1f1bx2/2mb fp16"),
    ("llama", EXPERTS, "dp2 tp2+sp ep2 etp2 bf16"),
    ("llama", {**EXPERTS, **MLA, "router": "sigmoid"}, "dp2 ep2 expert.chunks=2 fp64"),
    ("llama", MLA, "tp2+sp bf16 recompute:selective recompute.modules=core,norm,act"),
    ("llama", {}, f"dp_shard2.zero3 2mb bf16 offload:cpu {KEPT},parameters,gradients,optimizer"),
    ("llama", {}, f"2mb bf16 offload:nvme {KEPT},gradients,optimizer"),
    ("llama", {}, "dp_shard2.zero1 bf16 precision.rounding=stochastic"),
    ("llama", LORA, "tp2+sp 2mb bf16"),
    ("bloom", {"packed": True}, "tp2+sp bf16"),
    ("llama", EIGHT, "tp2+sp 2mb fp8"),
    ("llama", EIGHT, "2mb fp8 precision.fp8_granularity=row"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize(("family", "model", "plan"), PLANS, ids=[f"{p} {f}" for f, _, p in PLANS])
def test_a_plan_equals_the_cpu(family, model, plan, folder):
    job = gpu_jobs.job(folder, plan, family, **{"layers": 2, **model})
    found = verify(job, brief=True)
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.parametrize("plan", ["tp2 2mb fp32", "cp2:halo bf16"])
def test_images(plan, folder):
    found = verify(replace(image_jobs.job(folder, plan), device=DEVICE.type), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_a_step_was_made_on_the_device(folder):
    """Not by chance on the CPU, which the plans are compared with."""
    from partita.train.build import assemble
    from partita.train.devices import shared_device

    job = gpu_jobs.job(folder, "dp_shard2.zero3 tp2+sp 2mb bf16")

    def run(world, job):
        built = assemble(job, world, device=shared_device(job))
        loss = built.model.forward_backward(built.batch(0))
        return {unit.gradient.device.type for unit in built.model.units}, loss

    with local(4, 60) as ranks:
        devices, losses = zip(*ranks.run(run, job), strict=True)
    assert set().union(*devices) == {DEVICE.type} and len(set(losses)) == 1


@pytest.mark.parametrize(("family", "model"), [("llama", EXPERTS), ("gpt2", {"dropout": 0.1})])
def test_the_reference_on_the_device_is_the_cpus(family, model, folder):
    job = gpu_jobs.job(folder, "2mb fp64", family, **model)
    data, found = open_data(job, job), []
    for device in (torch.device("cpu"), DEVICE):
        weights = {n: w.to(device) for n, w in start_weights(job, torch.float64).items()}
        judge = Reference(job.model, weights, torch.float64, job.seed)
        batches = [b.to(device) for b in whole_batch(data, job, 0)]
        found.append(loss_and_gradients(judge, batches))
    (loss, gradients), (there, theirs) = found
    assert there == pytest.approx(loss, rel=1e-12)
    for name, g in gradients.items():
        torch.testing.assert_close(theirs[name].cpu(), g, rtol=1e-9, atol=1e-12)

"""A rank computes where its weights are: a step on torch's `meta` device.

No GPU is needed to see a layer that makes a tensor on the CPU: on `meta` values are not computed, but an op
whose tensors lie on two devices raises as it would on a GPU.
"""

from dataclasses import replace

import image_jobs
import pytest
import torch
import verify_jobs

from partita.base.errors import UsageError
from partita.comm.blocking import Blocking
from partita.comm.single import SingleComm
from partita.comm.threads.local import local
from partita.train.build import assemble
from partita.train.devices import device_of
from partita.verify.parity import verify

META = torch.device("meta")
MLA = {**verify_jobs.EXPERTS, **verify_jobs.MLA, "router": "sigmoid", "router_groups": 2}
LORA = {"lora_rank": 2, "lora_targets": ("wq", "wo"), "lora_dropout": 0.1}
PLANS = [
    ("llama", {}, "dp2 tp2+sp pp2:1f1b/2mb bf16"),
    ("llama", verify_jobs.EXPERTS, "dp2 ep2 2mb bf16"),
    pytest.param("llama", MLA, "dp2 ep2 expert.chunks=2 2mb", marks=pytest.mark.slow),
    pytest.param("llama", LORA, "tp2+sp 2mb fp8", marks=pytest.mark.slow),
    ("gpt2", {"dropout": 0.1}, "dp_shard2.zero3 tp2+sp pp2:zb_h1/2mb"),
    ("llama", {}, "dp_shard2.zero2 cp2:ring 2mb recompute:full"),
    ("llama", {}, "cp4:hybrid2x2 recompute:selective fp16"),
]


def run(world, job):
    built = assemble(job, world, device=META)
    model, update = built.model, built.update
    batch = built.batch(0)
    for b in batch.microbatches:
        assert b.ids.device == b.valid.device == b.samples.device == META
    if model.holds_loss:
        model.blocks[-1].total_valid = 64
    model.reducer.begin()
    loss = model.executor.run(batch.microbatches)
    model.reducer.finish()
    update.gradient_norm = lambda: 1.0  # the one number that the host reads
    update.step()
    return loss.device == META if model.holds_loss else True


def without_values(monkeypatch):
    """What hosts read of a GPU, of nothing: every rank's rows of each expert are four."""
    counted = torch.bincount

    def bincount(x, minlength=0):
        if not x.is_meta:
            return counted(x, minlength=minlength)
        return torch.zeros(minlength, dtype=torch.int64, device=x.device)

    def counts(self, x, site):
        return [[4] * x.numel() for _ in range(self.size)]

    monkeypatch.setattr(torch, "bincount", bincount)
    monkeypatch.setattr(Blocking, "counts", counts)
    monkeypatch.setattr(SingleComm, "counts", counts)


@pytest.mark.parametrize(
    "plan", ["tp2 2mb bf16", pytest.param("cp2:halo 2mb", marks=pytest.mark.slow)]
)
def test_a_step_of_images_touches_one_device(plan, tmp_path):
    low = {"lora_rank": 2, "lora_dropout": 0.1, "lora_targets": ("linear", "kernel")}
    job = image_jobs.job(tmp_path, plan, **low)
    with local(job.plan.world_size, 20) as ranks:
        assert all(ranks.run(run, job))


@pytest.mark.parametrize(("family", "model", "plan"), PLANS)
def test_a_step_touches_one_device(family, model, plan, tmp_path, monkeypatch):
    without_values(monkeypatch)
    job = verify_jobs.job(tmp_path, plan, family, seq=16, **{"layers": 2, **model})
    with local(job.plan.world_size, 20) as ranks:
        assert all(ranks.run(run, job))


def test_a_cpu_tensor_among_them_is_seen(tmp_path, monkeypatch):
    from partita.model import transformer

    made = transformer.tables
    monkeypatch.setattr(transformer, "tables", lambda *a: _Stuck(made(*a)))
    job = verify_jobs.job(tmp_path, "2mb")
    with local(1, 20) as ranks, pytest.raises(Exception, match="device"):
        ranks.run(run, job)


class _Stuck(tuple):
    """Tables that stay on the CPU."""

    def __getitem__(self, i):
        return super().__getitem__(i).as_subclass(_Cpu)


class _Cpu(torch.Tensor):
    def to(self, *_, **__):
        return self.as_subclass(torch.Tensor)


def test_a_gpu_that_is_not_there_is_a_user_error(tmp_path):
    job = replace(verify_jobs.job(tmp_path, "dp2"), device="cuda")
    if torch.cuda.is_available():
        return
    with pytest.raises(UsageError, match="sees no GPU on this host; accepted here: auto, cpu"):
        device_of(job, 0)
    with pytest.raises(
        UsageError, match=r"nccl \(2 ranks, 0 GPUs on this host\): accepted here are local"
    ):
        verify(verify_jobs.job(tmp_path, "dp2"), backend="nccl")

"""Experts' products by the device's one kernel for all, and a step of them whose host does not wait."""

from __future__ import annotations

import warnings

import gpu_jobs
import pytest
import torch
import verify_jobs
from gpu_jobs import DEVICE

from partita.comm.random.seeds import normal_box
from partita.comm.single import SingleWorld
from partita.parallel.ep import experts
from partita.parallel.ep.loads import Loads
from partita.train.build import assemble
from partita.verify.parity import verify

BF16 = torch.bfloat16
MODEL = {**verify_jobs.EXPERTS, "expert_ffn_hidden": 16, "experts": 8}
GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="its kernel, and its waits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu_experts")


def drawn(*shape: int) -> torch.Tensor:
    whole = [(0, n) for n in shape]
    return normal_box(1, f"{shape}", shape, whole, device=DEVICE).to(BF16)


@GPU
@pytest.mark.parametrize(
    "counts", [[3, 1, 0, 300, 7, 0, 129, 0], [0, 0, 5, 0, 0, 0, 0, 0], [256] * 8]
)
def test_one_kernel_makes_every_experts_product(counts):
    """Forward, input gradient and weight gradient; those without rows get none, whatever lay there before."""
    n, k = 96, 64
    x, dy, w = drawn(sum(counts), k), drawn(sum(counts), n), drawn(len(counts), n, k)
    assert experts.has_grouped(x, w) and experts.has_grouped(dy, x)
    torch.full(
        (len(counts), n, k), torch.nan, dtype=BF16, device=DEVICE
    )  # for the allocator to lend again
    found = [
        experts.grouped(dy.t(), x, Loads(counts)), experts.grouped(x, w.mT, counts),
        experts.grouped(dy, w, counts),
    ]  # fmt: skip
    wide = [[p.double() for p in t.split(counts)] for t in (x, dy)]
    each = list(zip(*wide, w.double(), strict=True))
    wanted = [
        torch.stack([d.t() @ rows for rows, d, _ in each]), torch.cat([rows @ e.t() for rows, _, e in each]),
        torch.cat([d @ e for _, d, e in each]),
    ]  # fmt: skip
    for made, want in zip(found, wanted, strict=True):
        assert made.shape == want.shape
        torch.testing.assert_close(
            made.double(), want, rtol=2.0**-7, atol=2.0**-12 * float(want.abs().max())
        )


def a_step(folder, plan, **model):
    """(loss, gradients, the model's part and its batch) of one."""
    built = assemble(gpu_jobs.job(folder, plan, **{**MODEL, **model}), SingleWorld(), device=DEVICE)
    batch = built.batch(0)
    loss = float(built.model.forward_backward(batch))
    return loss, {unit.name: unit.gradient.clone() for unit in built.model.units}, built, batch


@GPU
@pytest.mark.parametrize("plan", ["2mb bf16", "1mb bf16 expert.chunks=2 recompute:full"])
def test_a_step_is_that_of_one_expert_after_the_other(plan, folder, monkeypatch):
    loss, gradients, built, _ = a_step(folder, plan)
    rows = [b.log.total().counts.tolist() for b in built.model.blocks if getattr(b, "log", None)]
    monkeypatch.setattr(experts, "groups", lambda device: False)
    want, others, built, _ = a_step(folder, plan)
    assert rows == [
        b.log.total().counts.tolist() for b in built.model.blocks if getattr(b, "log", None)
    ]
    assert loss == pytest.approx(want, rel=2.0**-7)
    for name, other in others.items():
        off = (gradients[name] - other).abs().max()
        assert off <= 2.0**-6 * other.abs().max(), name


@GPU
def test_the_host_waits_as_often_however_many_layers_there_are(folder):
    """Numbers of rows stay on the device."""
    found = []
    for layers in (2, 4):
        *_, built, batch = a_step(folder, "2mb bf16", layers=layers)  # what is made once, is
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                built.model.forward_backward(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append([w for w in told if "called a synchronizing" in str(w.message)])
    assert len(found[0]) == len(found[1])
    gpu_jobs.TABLE.append(f"waits of a step with experts: {len(found[0])}")


@pytest.mark.parametrize("plan", ["2mb bf16", "dp2 ep2 expert.chunks=2 bf16"])
def test_a_plan_equals_the_cpu(plan, folder):
    found = verify(gpu_jobs.job(folder, plan, **MODEL), brief=True)
    assert found.equal and found.traffic_equal, str(found)

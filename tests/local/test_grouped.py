"""All experts' products by one kernel, whose numbers of rows the host is not told: here by torch's own loop,
as on a GPU it would go. Equal to one matmul an expert, and to one device."""

import pytest
import torch
import verify_jobs

from partita.comm.single import SingleWorld
from partita.parallel.deferred import WeightQueue
from partita.parallel.ep import dispatch, experts, loads
from partita.parallel.kernels.product import PLAIN
from partita.train.build import assemble
from partita.verify.parity import verify

SIZES = {**verify_jobs.EXPERTS, "expert_ffn_hidden": 16}
LORA = {
    "lora_rank": 2,
    "lora_targets": ("wq", "expert_gate_up", "expert_down"),
    "lora_dropout": 0.1,
}
BF16 = torch.bfloat16
PLANS = [
    ("2mb", {"experts": 16}), ("dp2 ep2 expert.chunks=2 2mb", {}), ("pp2:zb_h1/4mb dp2 ep2", {"experts": 8}),
    ("tp2 etp2 2mb recompute:full", {}), ("dp_shard2.zero3 2mb", {"capacity_factor": 0.75}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grouped")


@pytest.fixture
def as_a_gpu(monkeypatch):
    """How often the kernel was called."""
    found, kernel = [], experts.grouped
    monkeypatch.setattr(experts, "groups", lambda device: True)
    monkeypatch.setattr(dispatch, "is_told_late", lambda device: True)
    monkeypatch.setattr(experts, "grouped", lambda *given: found.append(1) or kernel(*given))
    return found


class Stacked:
    """A weight of experts, as Grouped reads it."""

    shape = (4, 24, 16)
    trains = True

    def __init__(self):
        dice = torch.Generator().manual_seed(0)
        self.value = torch.randn(self.shape, generator=dice).to(BF16)
        self.gradient, self.queue = torch.ones(self.shape), WeightQueue()


def made(counts):
    weight, dice = Stacked(), torch.Generator().manual_seed(1)
    layer = experts.Grouped(weight, (PLAIN,) * 4)  # type: ignore[arg-type]
    x = torch.randn(sum(counts), 16, generator=dice).to(BF16).requires_grad_()
    y = layer(x, counts)
    y.backward(torch.randn(sum(counts), 24, generator=dice).to(BF16))
    assert x.grad is not None
    return y.detach(), x.grad, weight.gradient


@pytest.mark.parametrize("counts", [[3, 5, 1, 8], [0, 7, 0, 2], [0, 0, 0, 0]])
def test_one_kernel_makes_what_one_each_does(counts, request):
    want, calls = made(counts), request.getfixturevalue("as_a_gpu")
    for a, b in zip(made(counts), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.02)
    assert len(calls) == (3 if sum(counts) else 0)


def a_step(folder, plan, **model):
    """(loss, gradients, rows of each expert, rows that were sent) of one."""
    job = verify_jobs.job(folder, plan, **{**SIZES, **model})
    built = assemble(job, SingleWorld())
    loss = built.model.forward_backward(built.batch(0))
    gradients = {unit.name: unit.gradient.clone() for unit in built.model.units}
    logs = [b.log for b in built.model.blocks if getattr(b, "log", None) is not None]
    return (
        loss,
        gradients,
        [log.total().counts.tolist() for log in logs],
        [log.sent for log in logs],
    )


@pytest.mark.parametrize("plan", ["2mb bf16", "1mb bf16 expert.chunks=3", "2mb fp64"])
def test_a_step_is_that_of_one_expert_after_the_other(plan, folder, request):
    """Some have no rows."""
    want = a_step(folder, plan, experts=32)
    calls = request.getfixturevalue("as_a_gpu")
    found = a_step(folder, plan, experts=32)
    assert bool(calls) == ("bf16" in plan)
    assert found[2:] == want[2:] and any(0 in rows for rows in found[2])
    near = 2.0**-7 if calls else 0.0
    assert float(found[0]) == pytest.approx(float(want[0]), rel=near)
    for name, gradient in want[1].items():
        off = (found[1][name] - gradient).abs().max()
        assert off <= 2 * near * gradient.abs().max(), name


@pytest.mark.turns(2)
@pytest.mark.parametrize(("plan", "model"), PLANS, ids=[plan for plan, _ in PLANS])
def test_a_plan_equals_one_device(plan, model, folder, as_a_gpu):
    found = verify(verify_jobs.job(folder, f"{plan} bf16", **{**SIZES, **model}), brief=True)
    assert found.equal and found.traffic_equal, str(found)
    assert as_a_gpu


def test_adapters_beside_it(folder, as_a_gpu):
    """Whose rows the host is told."""
    found = verify(verify_jobs.job(folder, "2mb bf16", **SIZES, **LORA), brief=True)
    assert found.equal and found.traffic_equal, str(found)
    assert as_a_gpu


def test_what_the_kernel_takes(monkeypatch):
    x, w = torch.ones(5, 16, dtype=BF16), torch.ones(3, 24, 16, dtype=BF16)
    assert not experts.has_grouped(x, w)  # a CPU
    monkeypatch.setattr(experts, "groups", lambda device: True)
    assert experts.has_grouped(x, w)
    for other in (
        w.float(),
        w[:, :20].clone(),
        w[..., :12].clone(),
        w.mT,
        w.flatten()[4:-380].view(-1, 24, 16),
    ):
        assert not experts.has_grouped(x, other)
    assert not experts.has_grouped(x[:0], w)
    assert not experts.has_grouped(x, w.new_ones(1024, 8, 8))


def test_loads_are_the_same_wherever_they_are_asked_for():
    chosen = torch.tensor([0, 2, 2, 2, 5])
    late = loads.Loads.of_sorted(chosen, 7)
    assert late.host == [1, 0, 3, 0, 0, 1, 0] == loads.count(chosen, 7).tolist()
    told = loads.ends_of(late.host, chosen.device)
    assert told.tolist() == loads.ends_of(late, chosen.device).tolist() == [1, 1, 4, 4, 4, 5, 5]
    assert told.dtype == torch.int32

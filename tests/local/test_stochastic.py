"""Stochastic rounding: the mean is kept, no plan changes a bit, states and checkpoints have no masters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_frozen_weights
import torch
import verify_jobs

from partita.comm.random.seeds import rounded_box
from partita.comm.threads.local import local
from partita.parallel.laid import problems
from partita.parallel.offload import cpu
from partita.simulate.predict import request_of
from partita.train.optimizer import stochastic
from partita.verify.parity import verify

SLOW = pytest.mark.slow
RANDOM = "precision.rounding=stochastic"


def test_each_value_goes_to_a_neighbour_and_the_mean_is_kept():
    torch.manual_seed(0)
    for value in (1.0 + 2.0**-9, -3.0 - 2.0**-10, 1e-30, 0.0, 1.5):
        x = torch.full((40_000,), value)
        got = rounded_box(x, 3, 7, "w", (40_000,), ((0, 40_000),))
        assert torch.equal(got, got.bfloat16().float())
        step = torch.finfo(torch.bfloat16).eps * abs(value)
        assert float((got - x).abs().max()) <= step
        assert abs(float(got.double().mean()) - value) <= 0.02 * step
    assert torch.equal(got, x)  # what bf16 holds stays


def test_to_fp16_the_mean_is_kept_as_well():
    """Below 2^-14 its numbers are 2^-24 apart; beyond the largest there is none."""
    for value, step in (
        (1.0 + 2.0**-12, 2.0**-10),
        (-3e-5, 2.0**-24),
        (1e-9, 2.0**-24),
        (0.0, 1.0),
    ):
        x = torch.full((40_000,), value)
        got = rounded_box(x, 3, 7, "w", (40_000,), ((0, 40_000),), half=True)
        assert torch.equal(got, got.half().float())
        assert float((got - x).abs().max()) <= step
        assert abs(float(got.double().mean()) - value) <= 0.02 * step
    assert torch.equal(got, x)  # what fp16 holds stays
    top = torch.tensor([65519.0, -7e4])
    assert rounded_box(top, 3, 7, "w", (2,), ((0, 2),), half=True).tolist() == [65504, -65504]


def test_a_box_has_the_bits_of_the_whole():
    x = torch.randn(12, 10, generator=torch.Generator().manual_seed(1))
    whole = rounded_box(x, 3, 5, "w", (12, 10), ((0, 12), (0, 10)))
    part = rounded_box(x[3:9, 4:].contiguous(), 3, 5, "w", (12, 10), ((3, 9), (4, 10)))
    assert torch.equal(whole[3:9, 4:], part)
    for other in ((4, 5, "w"), (3, 6, "w"), (3, 5, "v")):
        assert not torch.equal(whole, rounded_box(x, *other, (12, 10), ((0, 12), (0, 10))))


@pytest.mark.turns(2)
@pytest.mark.parametrize(
    ("plan", "model"),
    [
        (f"tp2+sp dp_shard2.zero3 fp16 {RANDOM}", {}),
        pytest.param(f"tp2+sp dp_shard2.zero3 bf16 {RANDOM}", {}, marks=SLOW),
        pytest.param(
            f"pp2:zb_h1/4mb dp_shard2.zero1 fp16 {RANDOM} pipeline.post_validation=true",
            {"tied": True},
            marks=SLOW,
        ),
        (f"pp2/4mb dp_shard2.zero1 tp2 fp8 {RANDOM}", {"tied": True}),
        pytest.param(
            f"dp_shard2.zero2 tp2+sp ep2 2mb bf16 {RANDOM}", verify_jobs.EXPERTS, marks=SLOW
        ),
        pytest.param(f"pp2:pipedream/4mb bf16 {RANDOM}", {"tied": True}, marks=SLOW),
        pytest.param(
            f"pp4:pipedream_2bw/4mb dp_shard2.zero1 bf16 {RANDOM}", {"tied": True}, marks=SLOW
        ),
        pytest.param(
            f"pp2:pipedream/4mb dp_shard2.zero1 bf16 offload:cpu offload.targets=optimizer {RANDOM}",
            {},
            marks=SLOW,
        ),
        (
            f"dp_shard2.zero3 bf16 offload:nvme offload.targets=parameters,gradients,optimizer {RANDOM}",
            {},
        ),
        pytest.param(
            f"dp_shard2.zero3 bf16 offload:nvme offload.targets=parameters {RANDOM}",
            {"tied": True},
            marks=SLOW,
        ),
        pytest.param(
            f"dp_shard2.zero3 bf16 offload:cpu offload.targets=parameters {RANDOM}", {}, marks=SLOW
        ),
    ],
)
def test_a_plan_equals_one_device(plan, model, tmp_path, monkeypatch):
    """In float64, where each weight must go to the same neighbour; and with bf16's own roundings."""
    monkeypatch.setattr(cpu, "CHUNK", 1024)
    monkeypatch.setattr(stochastic, "CHUNK", 1000)
    job = verify_jobs.job(tmp_path, plan, **model)
    clips = 0.0 if "pipedream" in plan else job.train.clip_grad_norm
    found = verify(replace(job, train=replace(job.train, clip_grad_norm=clips)), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_other_bits_are_seen(tmp_path, monkeypatch):
    """A plan that rounds by its rank, as torch's generators would."""
    real = rounded_box

    def wrong(values, seed, step, name, shape, box, half):
        return real(values, seed + box[0][0], step, name, shape, box, half)

    monkeypatch.setattr("partita.train.optimizer.stochastic.rounded_box", wrong)
    found = verify(verify_jobs.job(tmp_path, f"tp2 bf16 {RANDOM}"))
    assert not found.equal and found.divergence.phase == "optimizer"


def test_stored_bytes_are_the_declared(tmp_path):
    with local(2, 20) as ranks:
        job = verify_jobs.job(tmp_path, f"dp_shard2.zero1 bf16 {RANDOM}", tied=True)
        for held, declared in ranks.run(test_frozen_weights.stored, job):
            assert held["parameters"] == declared["parameters"]
            assert held["gradients"] == declared["gradients"]
            assert 0 <= declared["optimizer"] - held["optimizer"] <= 8 * 2 * 2


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit_under_another_plan(tmp_path):
    one = verify_jobs.job(tmp_path, "dp_shard2.zero3 fp64 1mb", tied=True)
    one = one.with_plan(f"dp_shard2.zero1 4mb bf16 {RANDOM}")
    with local(2, 20) as ranks:
        whole, _ = ranks.run(test_frozen_weights.trained, one, tmp_path / "whole", 3)[0]
        _, saved = ranks.run(test_frozen_weights.trained, one, tmp_path / "part", 2)[0]
        again, _ = ranks.run(test_frozen_weights.trained, one, tmp_path / "again", 3, saved)[0]
        assert again[0] == whole[2]
        other = one.with_plan(f"dp_shard2.zero3 4mb bf16 {RANDOM}")
        again, _ = ranks.run(test_frozen_weights.trained, other, tmp_path / "other", 3, saved)[0]
        assert again[0] == pytest.approx(whole[2], rel=1e-6)
        wide, _ = ranks.run(
            test_frozen_weights.trained, one.with_plan("tp2 4mb fp32"), tmp_path / "wide", 3, saved
        )[0]
        assert wide[0][0] == pytest.approx(whole[2][0], rel=1e-2)


def test_what_cannot_be_is_refused(tmp_path):
    """fp32's weights are as wide as their update."""
    job = verify_jobs.job(tmp_path, f"tp2 fp32 {RANDOM}")
    (found,) = [p for p in problems(request_of(job)) if p.rule == "rounding"]
    assert "rounding=stochastic" in found.asked and RANDOM not in found.nearest

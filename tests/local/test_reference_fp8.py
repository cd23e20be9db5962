"""The judge rounds to 8 bits by lines of its own, which agree with the plan's bit for bit."""

from dataclasses import replace

import pytest
import torch
import verify_jobs
from multiplied import Multiplied

from partita.model import reference_fp8 as own
from partita.parallel.precision import fp8
from partita.spec.plan import PrecisionPlan
from partita.verify.parity import verify

PLAN = PrecisionPlan("fp8")


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_number_of_16_bits_is_rounded_alike(name):
    form = own.E4M3 if name == "e4m3" else own.E5M2
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite() & (every.abs() < 2.0**100) & (every.abs() > 2.0**-100)]
    for largest in (448.0, 1.0, 3e-5):
        top = torch.tensor(largest)
        assert torch.equal(own.in_eight_bits(x, form, top), fp8.rounded(x, name, top))
    assert torch.equal(  # at scale 1 the format's own cast
        own.in_eight_bits(x.float(), form, torch.tensor(form[2] / 2)).clamp(-448, 448),
        x.float().clamp(-form[2], form[2]).to(fp8.FORMATS[name][0]).float().clamp(-448, 448),
    )


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
def test_products_are_the_plans(granularity):
    plan = replace(PLAN, fp8_granularity=granularity)
    noise = torch.Generator().manual_seed(3)
    x, w = (torch.randn(2, 150, 300, generator=noise), torch.randn(140, 300, generator=noise))
    dy = torch.randn(2, 150, 140, generator=noise) / 9
    found = []
    for times in (
        own.RoundedProduct(plan),
        lambda x, w: Multiplied.apply(x, w, fp8.Eight(plan)),
    ):
        leaves = [t.clone().requires_grad_() for t in (x * x, w)]
        y = times(*leaves)
        y.backward(dy)
        found.append([y.detach(), *(t.grad for t in leaves)])
    for judge, got in zip(*found, strict=True):
        assert torch.equal(judge, got)


def half(x, name, largest, real=fp8.scaled):
    found = real(x, name, largest)
    return replace(found, scale=found.scale * 2)


@pytest.mark.parametrize("scaling", ["current", "static"])
def test_a_coarse_fault_in_the_plans_is_seen(tmp_path, monkeypatch, scaling):
    """A finer one only by the products above: two plans' roundings differ by a tenth of a gradient."""
    job = verify_jobs.job(tmp_path, f"tp2 fp8 precision.fp8_scaling={scaling}", layers=2)
    monkeypatch.setattr(fp8, "scaled", half)
    assert not verify(job).equal

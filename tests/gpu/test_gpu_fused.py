"""Triton's kernels against what they stand in for: random numbers of a box the CPU's, fp8's 8 bits those of
torch's operators."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import gpu_jobs
import pytest
import torch
from gpu_jobs import DEVICE, TABLE

from partita.comm.random import seeds
from partita.comm.random.triton_kernels import Kernels
from partita.parallel.precision import fp8
from partita.spec.plan import PrecisionPlan

PLAN, BF16 = PrecisionPlan("fp8"), torch.bfloat16
BOXES = [
    ((7, 33, 65), [(1, 6), (3, 30), (0, 65)]),
    ((9, 1031), [(2, 9), (5, 1030)]),
    ((8, 640), [(0, 8), (0, 640)]),
    ((5, 4, 3, 3), [(1, 3), (1, 2), (0, 3), (1, 3)]),
    ((1 << 20, 1 << 16), [((1 << 20) - 3, 1 << 20), ((1 << 16) - 70, 1 << 16)]),
]


@pytest.fixture(autouse=True)
def no_kernel_fails():
    yield
    if DEVICE.type == "cuda" and find_spec("triton"):
        assert not seeds.KERNELS.failed and not fp8.KERNELS.failed


@pytest.mark.parametrize(("shape", "box"), BOXES)
def test_numbers_of_a_box_are_the_cpus(shape, box):
    def drawn(device):
        samples = torch.tensor([5, 2**33 + 7, 3], device=device)
        values = seeds.normal_box(3, "v", shape, box).to(device)  # the CPU's
        yield seeds.normal_box(3, "w", shape, box, std=0.5, device=device)
        yield seeds.dropout_box(3, 2**32 + 5, "s", samples, shape=shape, box=box, p=0.3)
        yield seeds.rounded_box(values, 3, 4, "w", shape, box)
        yield seeds.dropout_rows(3, 1, "r", samples, samples * 3 + 1, 50, 0.4)

    (normals, *same), (found, *bits) = drawn("cpu"), drawn(DEVICE)
    torch.testing.assert_close(found.cpu(), normals, rtol=1e-6, atol=1e-7)
    for one, other in zip(same, bits, strict=True):
        assert torch.equal(one, other.cpu()) and one.dtype == other.dtype


def inputs():
    g = torch.Generator().manual_seed(1)
    for shape in ((3, 5, 70), (64, 256), (130, 17), (257, 1), (1, 48)):
        wide = torch.randn(*shape, generator=g) * torch.randn(*shape, generator=g).mul(4).exp()
        yield wide.to(DEVICE, BF16)
    yield wide.sign().mul(2.0**-122).to(DEVICE, BF16)  # as far as scales go
    yield wide.expand(64, 48).to(DEVICE, BF16).t()
    yield wide.new_zeros(4, 36, dtype=BF16, device=DEVICE)[:, 3:]


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
@pytest.mark.parametrize("scaling", ["current", "delayed"])
def test_eight_bits_are_torchs(granularity, scaling, monkeypatch):
    plan = replace(PLAN, fp8_granularity=granularity, fp8_scaling=scaling)

    def bits(x):
        """Of everything that a matmul rounds; delayed, of what comes third."""
        for role, dim in (("x", -1), ("dy.W", 0)):
            eight = fp8.Eight(plan)
            found = [eight._round(x * k, role, dim) for k in (1, 3, 9) if dim or x.dim() == 2]
            yield from found[-1:]
        if granularity == "block" and x.dim() == 2:
            yield fp8.Eight(plan)._weight(x, -1)

    found = [one for x in inputs() for one in bits(x)]
    with monkeypatch.context() as m:
        m.setattr(Kernels, "takes", lambda self, device: False)
        want = [one for x in inputs() for one in bits(x)]
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one.wide(), other.wide())
        if granularity != "block":
            assert torch.equal(one.bits.view(torch.uint8), other.bits.view(torch.uint8))


@pytest.mark.parametrize("changed", [False, True])
def test_a_gradient_is_rounded_once_for_both_products(changed):
    """Its transpose is kept for the weight's, unless it was written to."""
    eight, (x, *_) = fp8.Eight(PLAN), inputs()
    dy = x.clone()
    weight, like = (torch.ones(n, 48, dtype=BF16, device=DEVICE) for n in (70, 15))
    eight.input_gradient(dy, weight)
    kept = eight.turned.made
    assert (kept is not None) == (DEVICE.type == "cuda" and not fp8.KERNELS.failed)
    if changed:
        dy.mul_(3)
    found = eight.weight_gradient(dy.view(-1, 70), like)
    want = fp8.Eight(PLAN)
    assert torch.equal(found, want.weight_gradient(dy.clone().view(-1, 70), like))
    if kept is not None:
        assert (eight.turned.made is None) != changed
        rounded = want._round(x.view(-1, 70), "dy.W", 0)
        assert torch.equal(kept.bits.view(torch.uint8), rounded.bits.view(torch.uint8))


def test_how_long_they_take_fused():
    """A line each, of the kernels; no bound."""
    if DEVICE.type == "cpu":
        pytest.skip("nothing to tell of a CPU")
    n, samples = 4096, torch.arange(4, device=DEVICE)
    whole = {"shape": (n, n), "box": [(0, n)] * 2}
    g = torch.randn(8192, 8192, device=DEVICE).to(BF16)
    eight = {k: fp8.Eight(replace(PLAN, fp8_granularity=k)) for k in ("tensor", "row", "block")}
    calls = {
        "16.8M normals": (lambda: seeds.normal_box(1, "w", **whole, device=DEVICE), 4 * n * n),
        "67M elements' dropout": (lambda: seeds.dropout_box(1, 0, "s", samples, **whole, p=0.1), 4 * n * n),
        "16.8M rounded at random": (
            lambda: seeds.rounded_box(g[:n, :n].float(), 1, 0, "w", (n, n), whole["box"]), 12 * n * n,
        ),
    }  # fmt: skip
    for name, e in eight.items():
        moved = (4 if name == "block" else 5) * g.numel()  # bytes at least: read (twice), written
        calls[f"fp8 by {name}"] = (lambda e=e: e._round(g, "x", -1), moved)
        calls[f"fp8 by {name}, turned"] = (lambda e=e: e._round(g, "x.W", 0), moved)
    e = eight["tensor"]
    calls["fp8 both ways"] = (lambda: e._both(g), 6 * g.numel())
    for name, (call, moved) in calls.items():
        took = gpu_jobs.seconds(call, 3)
        TABLE.append(f"{name:<24} {1e3 * took:8.3f} ms, {moved / took / 1e9:6.0f} GB/s")
    assert not seeds.KERNELS.failed and not fp8.KERNELS.failed, "these are the operators' times"

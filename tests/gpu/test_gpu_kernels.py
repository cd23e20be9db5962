"""The device's own kernels against what they stand for: attention's tiles, fp8 products, random numbers."""

from __future__ import annotations

import gpu_jobs
import pytest
import torch
from gpu_jobs import DEVICE, TABLE

from partita.comm.random.seeds import dropout_box, normal_box
from partita.parallel.cp import fused
from partita.parallel.cp.alibi import biased, slopes
from partita.parallel.cp.tile import attend, attend_back, plain, plain_back
from partita.parallel.cp.visible import Tokens, visible
from partita.parallel.precision import fp8
from partita.spec.plan import Plan

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SIZES = (2, 4, 2, 80, 24, 24)  # batch, heads, key heads, tokens, head_dim, values' dim
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-18, FP64: 2.0**-48}
CASES = [
    (BF16, SIZES, "causal"), (FP16, SIZES, "causal"), (FP32, SIZES, "causal"), (FP64, SIZES, "causal"),
    (BF16, SIZES, "whole"), (FP32, SIZES, "whole"), (BF16, SIZES, "documents"), (FP32, SIZES, "documents"),
    (FP16, SIZES, "window"), (BF16, SIZES, "alibi"), (FP32, SIZES, "alibi"), (BF16, SIZES, "hidden"),
    (FP32, SIZES, "hidden"), (BF16, (1, 4, 4, 65, 192, 128), "causal"), (BF16, (2, 4, 4, 33, 6, 4), "causal"),
    (BF16, (1, 2, 1, 50, 320, 320), "causal"), (FP16, (1, 4, 2, 128, 64, 64), "whole"),
    (BF16, (2, 4, 4, 512, 128, 128), "causal"), (BF16, (2, 4, 2, 512, 64, 64), "causal"),
    (FP16, (1, 4, 1, 1024, 128, 128), "whole"), (BF16, (2, 4, 4, 65, 192, 128), "documents"),
    (FP32, (1, 2, 1, 50, 320, 320), "causal"), (FP16, (2, 4, 2, 300, 128, 128), "window"),
]  # fmt: skip


def drawn(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    whole = [(0, n) for n in shape]
    return normal_box(1, f"{shape}", shape, whole, device=DEVICE).to(dtype)


def seen_of(kind: str, tokens: int, heads: int) -> torch.Tensor | None:
    at = torch.arange(tokens, device=DEVICE)
    own = Tokens.first(tokens, None, DEVICE)
    packed = Tokens.first(tokens, (at // 13).unsqueeze(0).expand(2, -1), DEVICE)
    if kind == "documents":
        return visible(packed, packed).unsqueeze(1)
    if kind == "window":
        return visible(own, own, 5).unsqueeze(1)
    if kind == "alibi":
        return biased(slopes(heads).to(DEVICE, FP32), own, own)
    if (
        kind == "hidden"
    ):  # a tile of a ring: keys of a document that no query of the first half is of
        return (visible(own, own) & (at >= tokens // 2).unsqueeze(-1)).unsqueeze(1)
    return None


@pytest.mark.parametrize(("dtype", "sizes", "kind"), CASES)
def test_a_tile_is_as_it_is_written_down(dtype, sizes, kind):
    """Against scores made whole in float64: out, lse, and gradients given the rows' final out and lse."""
    b, heads, own, n, dim, values = sizes
    laid = (
        drawn(b, n, heads, dim, dtype=dtype),
        drawn(b, n, own, dim, dtype=dtype),
        drawn(b, n, own, values, dtype=dtype),
    )
    q, k, v = (t.transpose(1, 2) for t in laid)
    seen, causal = seen_of(kind, n, heads), kind == "causal"
    wide = [t.to(FP64) for t in (q, k, v)]
    out, lse = attend(q, k, v, seen, causal)
    want, log = plain(*wide, seen, causal)
    assert out.dtype == dtype and out.shape == want.shape and lse.shape == log.shape
    u = 8 * ROUNDING[dtype]
    some = log > -torch.inf
    assert (lse[~some] == -torch.inf).all() and (out.isfinite()).all()
    torch.testing.assert_close(lse[some].double(), log[some].double(), rtol=u, atol=u)
    torch.testing.assert_close(out.double()[some], want.double()[some], rtol=u, atol=u)
    g = drawn(b, n, heads, values, dtype=dtype).transpose(1, 2)
    # The rows' own statistics, as a ring has merged them: where a tile hides a row, another has seen it
    merged = log.where(some, 3.0).to(lse.dtype)
    kept = want.where(some.unsqueeze(-1), 0.5).to(dtype)
    found = attend_back(g, (q, k, v), kept, merged, seen, causal)
    wanted = plain_back(g.to(FP64), wide, kept.to(FP64), merged.to(FP64), seen, causal)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(
            one.double(), other.double(), rtol=u, atol=4 * u * float(other.abs().max())
        )


@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
@pytest.mark.parametrize("sizes", [(64, 48, 32), (2, 40, 256, 128), (17, 16, 16)])
def test_fp8_kernels_make_the_emulations_products(granularity, form, sizes):
    """Both multiply the same 8 bits; the tensor cores add up in fewer than fp32's, so does bf16's output."""
    precision = Plan.parse(
        f"fp8 precision.fp8_granularity={granularity} precision.fp8_format={form}"
    ).precision
    *tokens, columns, rows = sizes
    x, dy = drawn(*tokens, columns, dtype=BF16), drawn(*tokens, rows, dtype=BF16)
    weight = drawn(rows, columns, dtype=BF16)
    flat = dy.reshape(-1, rows), x.reshape(-1, columns)
    calls = [("forward", (x, weight)), ("input_gradient", (dy, weight)), ("weight_gradient", flat)]
    for name, given in calls:
        own = getattr(fp8.Eight(precision), name)(*given)
        eight, before = fp8.Eight(precision), fp8.has_kernel
        fp8.has_kernel = lambda a, b: False
        try:
            want = getattr(eight, name)(*given)
        finally:
            fp8.has_kernel = before
        assert own.shape == want.shape and own.dtype == want.dtype
        off = (own.float() - want.float()).abs().max() / want.float().abs().max()
        assert float(off) <= 2.0**-6, (name, float(off))


def test_fp8_has_a_kernel_here():
    a = fp8.scaled(drawn(32, 64, dtype=BF16), "e4m3", torch.tensor(4.0, device=DEVICE))
    assert fp8.has_kernel(a, a.t()) == (DEVICE.type == "cuda")


def test_random_numbers_are_the_cpus():
    shape, box = (7, 33, 65), [(1, 6), (3, 30), (0, 65)]
    here, there = (normal_box(3, "w", shape, box, device=d) for d in ("cpu", DEVICE))
    torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-7)
    samples = torch.tensor([0, 5])
    masks = [
        dropout_box(3, 1, "s", samples.to(d), shape=shape, box=box, p=0.3) for d in ("cpu", DEVICE)
    ]
    assert torch.equal(masks[0], masks[1].cpu())


def test_how_long_they_take():
    """A line each; no bound."""
    if DEVICE.type == "cpu":
        pytest.skip("nothing to tell of a CPU")
    b, h, n, d = 4, 16, 4096, 128
    q, k, v, g = (drawn(b, n, h, d, dtype=BF16).transpose(1, 2) for _ in range(4))
    flops = 2 * b * h * n * n * d  # causal, forward
    out, lse = fused.attend(q, k, v, None, True, None)
    took = gpu_jobs.seconds(lambda: fused.attend(q, k, v, None, True, None))
    TABLE.append(
        f"flash forward b{b} h{h} s{n} d{d} bf16 causal   {flops / took / 1e12:6.0f} TFLOP/s"
    )
    took = gpu_jobs.seconds(lambda: fused.attend_back(g, (q, k, v), out, lse, None, True, None))
    TABLE.append(
        f"flash backward                                {2.5 * flops / took / 1e12:6.0f} TFLOP/s"
    )
    seen = visible(Tokens.first(n, None, DEVICE), Tokens.first(n, None, DEVICE)).unsqueeze(1)
    took = gpu_jobs.seconds(lambda: fused.attend(q, k, v, seen, False, None))
    TABLE.append(
        f"efficient forward, a mask (counted as causal)  {flops / took / 1e12:6.0f} TFLOP/s"
    )
    took = gpu_jobs.seconds(lambda: fused.attend_back(g, (q, k, v), out, lse, seen, False, None))
    TABLE.append(
        f"efficient backward                            {2.5 * flops / took / 1e12:6.0f} TFLOP/s"
    )
    holds = fused._cudnn_holds(DEVICE, BF16, d, 1, True)
    TABLE.append(
        f"these two by cuDNN: {holds}; with two heads a key {fused._cudnn_holds(DEVICE, BF16, d, 2, True)}"
    )
    took = gpu_jobs.seconds(lambda: fused._flash(q, k, v, True, d**-0.5))
    TABLE.append(f"flash itself forward {flops / took / 1e12:6.0f} TFLOP/s")
    took = gpu_jobs.seconds(lambda: fused._flash_back(g, (q, k, v), out, lse, True, d**-0.5))
    TABLE.append(f"flash itself backward {2.5 * flops / took / 1e12:6.0f} TFLOP/s")
    _time_products()
    x = torch.zeros(1, device=DEVICE)
    took = gpu_jobs.seconds(
        lambda: normal_box(1, "w", (4096, 4096), [(0, 4096)] * 2, device=DEVICE)
    )
    TABLE.append(f"16.8M normals by Philox   {1e3 * took:7.2f} ms")
    samples = torch.arange(4, device=DEVICE)
    took = gpu_jobs.seconds(
        lambda: dropout_box(1, 0, "s", samples, shape=(4096, 4096), box=[(0, 4096)] * 2, p=0.1)
    )
    TABLE.append(f"67M elements' dropout mask {1e3 * took:6.2f} ms")
    assert x.is_cuda


def _time_products() -> None:
    """bf16, fp8 with and without its rounding, fp32, experts one by one and grouped."""
    m, n, k = 8192, 8192, 8192
    a, b = drawn(m, k, dtype=BF16), drawn(n, k, dtype=BF16)
    took = gpu_jobs.seconds(lambda: a @ b.t())
    TABLE.append(f"bf16 8192^3     {2 * m * n * k / took / 1e12:6.0f} TFLOP/s")
    for granularity in ("tensor", "row"):
        eight = fp8.Eight(Plan.parse(f"fp8 precision.fp8_granularity={granularity}").precision)
        took = gpu_jobs.seconds(lambda eight=eight: eight.forward(a, b))
        x, w = eight._round(a, "x", -1), eight._weight(b, -1).t()
        bare = gpu_jobs.seconds(lambda x=x, w=w: fp8.by_kernel(x, w))
        rates = [2 * m * n * k / t / 1e12 for t in (took, bare)]
        TABLE.append(
            f"fp8 by {granularity:<7}  {rates[0]:6.0f} TFLOP/s with its rounding, {rates[1]:6.0f} without"
        )
    wide = a.float(), b.float()
    took = gpu_jobs.seconds(lambda: wide[0] @ wide[1].t(), 2)
    TABLE.append(f"fp32 8192^3     {2 * m * n * k / took / 1e12:6.0f} TFLOP/s")
    experts, rows = 64, 256
    x, ws = drawn(experts * rows, 2048, dtype=BF16), drawn(experts, 1408, 2048, dtype=BF16)
    ends = torch.arange(rows, experts * rows + 1, rows, device=DEVICE, dtype=torch.int32)
    flops, y = 2 * x.shape[0] * 2048 * 1408, x.new_empty(x.shape[0], 1408)

    def one_by_one() -> None:
        for rows_, w, out in zip(x.split(rows), ws.mT.unbind(0), y.split(rows), strict=True):
            torch.mm(rows_, w, out=out)

    took = gpu_jobs.seconds(one_by_one)
    TABLE.append(
        f"64 experts of 256 rows, 2048 to 1408, one by one  {flops / took / 1e12:6.0f} TFLOP/s"
    )
    took = gpu_jobs.seconds(lambda: torch._grouped_mm(x, ws.mT, offs=ends))
    off = float((torch._grouped_mm(x, ws.mT, offs=ends) - y).abs().max() / y.abs().max())
    TABLE.append(
        f"the same grouped                                {flops / took / 1e12:6.0f} TFLOP/s, off {off:.1e}"
    )
    dy = y.clone()
    took = gpu_jobs.seconds(lambda: torch._grouped_mm(dy.t(), x, offs=ends))
    TABLE.append(
        f"their gradients grouped                         {flops / took / 1e12:6.0f} TFLOP/s"
    )

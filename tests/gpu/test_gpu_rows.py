"""Gates and norms by one kernel each are what torch's operators make, to the rounding of a sum's order."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from gpu_jobs import DEVICE
from torch import Tensor

from partita.comm.random.triton_kernels import Kernels
from partita.model import mlp
from partita.model.mlp import SwiGLU
from partita.parallel.sp import norm
from partita.parallel.sp.norm import Norm

NONE = Kernels("nothing", failed="operators alone")


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    dice = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=dice).to(DEVICE, dtype)


def both_ways(piece, x: Tensor, dy: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = piece(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy)]


def close(found: Tensor, want: Tensor) -> None:
    """Within two steps of the dtype, of the largest element."""
    apart = (found.double() - want.double()).abs().max() / want.double().abs().max()
    assert apart <= 2 * torch.finfo(want.dtype).eps, f"{float(apart):.1e} apart"


def test_gates_are_the_operators(monkeypatch) -> None:
    dtype, width = torch.bfloat16, 1500
    x, dy = drawn(3, 5, 2 * width, dtype=dtype), drawn(3, 5, width, dtype=dtype)
    found = both_ways(SwiGLU.apply, x, dy)
    assert not mlp.KERNELS.failed
    monkeypatch.setattr(mlp, "KERNELS", NONE)
    for a, b in zip(found, both_ways(SwiGLU.apply, x, dy), strict=True):
        close(a, b)


@pytest.mark.parametrize(("rows", "width"), [(15, 100), (2050, 2048)])
def test_norms_are_the_operators(rows, width, monkeypatch) -> None:
    dtype = torch.bfloat16
    x, dy = drawn(rows, width, dtype=dtype), drawn(rows, width, dtype=dtype)
    sums: list[Tensor] = []
    weight = SimpleNamespace(value=drawn(width, dtype=dtype), trains=True, accumulate=sums.append)
    piece = Norm.of(weight, None, 1e-5)  # type: ignore[arg-type]
    found = both_ways(piece, x, dy)
    assert not norm.KERNELS.failed
    monkeypatch.setattr(norm, "KERNELS", NONE)
    for a, b in zip(found, both_ways(piece, x, dy), strict=True):
        close(a, b)
    torch.testing.assert_close(*sums, rtol=1e-3, atol=1e-3 * float(sums[1].abs().max()))


@pytest.mark.skipif(
    DEVICE.type == "cpu" and "TRITON_INTERPRET" not in os.environ, reason="Triton's are a GPU's"
)
@pytest.mark.parametrize("name", ["gate", "gate_back", "norm", "norm_back"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_proves_itself_and_a_wrong_one_does_not(name, dtype, monkeypatch) -> None:
    rows_gpu = pytest.importorskip("partita.parallel.kernels.rows_gpu", exc_type=ImportError)
    like = drawn(2, 96, dtype=dtype)
    rows_gpu.prove(name, like)
    own = getattr(rows_gpu, name)

    def wrong(*given, **named):
        made = own(*given, **named)
        first = made[0] if isinstance(made, tuple) else made
        first[-1, -1] += 0.5
        return made

    monkeypatch.setattr(rows_gpu, name, wrong)
    rows_gpu._apart.cache_clear()
    with pytest.raises(ArithmeticError, match="of the largest element"):
        rows_gpu.prove(name, like)
    rows_gpu._apart.cache_clear()

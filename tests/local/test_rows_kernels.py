"""Where a GPU's kernels answer, gates and norms take what they made; elsewhere torch's operators do it."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from partita.comm.random import triton_kernels
from partita.comm.random.triton_kernels import Kernels
from partita.model import mlp
from partita.model.mlp import SwiGLU
from partita.parallel.sp import norm
from partita.parallel.sp.norm import Norm


def stand_in(calls: list[str]):
    def kernels(like: torch.Tensor, name: str, *given):
        calls.append(name)
        shape = (2, 4) if name == "gate" else (2, 8)
        made = torch.full(shape, float(len(calls)))
        return (made, torch.full((8,), 9.0)) if name == "norm_back" else made

    return kernels


def test_what_kernels_make_is_taken_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(mlp, "KERNELS", stand_in(calls))
    monkeypatch.setattr(norm, "KERNELS", stand_in(calls))
    sums: list[torch.Tensor] = []
    weight = SimpleNamespace(value=torch.ones(8), trains=True, accumulate=sums.append)
    x = torch.zeros(2, 8, requires_grad=True)
    y = SwiGLU.apply(Norm.of(weight, None, 1e-5)(x))  # type: ignore[arg-type]
    y.backward(torch.ones_like(y))
    assert calls == ["norm", "gate", "gate_back", "norm_back"]
    assert float(y.detach()[0, 0]) == 2.0
    assert x.grad is not None
    assert float(x.grad[0, 0]) == 4.0
    assert [float(s[0]) for s in sums] == [9.0]
    weight.trains = False
    Norm.of(weight, None, 1e-5)(x).sum().backward()  # type: ignore[arg-type]
    assert len(sums) == 1


@pytest.mark.parametrize("width", [5, 255, 256, 300])
def test_a_gate_s_gradient_is_its_slope_whatever_its_width(width: int) -> None:
    """Narrow halves are packed first, wide ones are taken where they lie."""
    x, dy = torch.randn(2, 3, 2 * width, dtype=torch.float64), torch.randn(2, 3, width).double()
    own, plain = (x.clone().requires_grad_() for _ in range(2))
    made = SwiGLU.apply(own)
    gate, up = plain.chunk(2, -1)
    want = gate * gate.sigmoid() * up
    made.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(made, want)
    torch.testing.assert_close(own.grad, plain.grad)


def test_a_cpu_has_none() -> None:
    x = torch.ones(2, 8)
    assert mlp.KERNELS(x, "gate", x) is None
    assert norm.KERNELS(x, "norm", x, x[0], 1e-5) is None
    assert not mlp.KERNELS.failed


@pytest.mark.parametrize("right", [True, False])
def test_kernels_that_do_not_prove_right_are_never_run(right, monkeypatch) -> None:
    calls: list[str] = []

    def prove(name: str, like: torch.Tensor) -> None:
        calls.append(f"prove {name}")
        if not right:
            raise ArithmeticError("at 5:4\n    far\napart")

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append("double")
        return x * 2

    monkeypatch.setitem(sys.modules, "stands_in", SimpleNamespace(prove=prove, double=double))
    monkeypatch.setattr(triton_kernels, "find_spec", lambda name: name)
    monkeypatch.setattr(Kernels, "takes", lambda self, device: not self.failed)
    kernels, x = Kernels("stands_in"), torch.ones(2)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made = [kernels(x, "double", x) for _ in range(2)]
    if right:
        assert [float(y.sum()) for y in made] == [4.0, 4.0]
        assert calls == ["prove double", "double"] * 2 and not told
    else:
        assert made == [None, None] and calls == ["prove double"]
        assert [str(w.message).count("ArithmeticError: at 5:4 apart") for w in told] == [1]

"""Where a GPU's kernels answer, gates and norms take what they made; elsewhere torch's operators do it."""

from types import SimpleNamespace

import pytest
import torch

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


def test_a_cpu_has_none() -> None:
    x = torch.ones(2, 8)
    assert mlp.KERNELS(x, "gate", x) is None
    assert norm.KERNELS(x, "norm", x, x[0], 1e-5) is None
    assert not mlp.KERNELS.failed

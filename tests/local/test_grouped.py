"""All experts' products by one grouped kernel are those by one each: the kernel has a form on the CPU."""

import pytest
import torch

from partita.parallel.deferred import WeightQueue
from partita.parallel.ep import experts
from partita.parallel.ep.experts import Grouped
from partita.parallel.product import PLAIN

EXPERTS, OUT, INSIDE = 4, 24, 16


class Stacked:
    """A weight of experts, as Grouped reads it."""

    shape = (EXPERTS, OUT, INSIDE)
    trains = True

    def __init__(self) -> None:
        dice = torch.Generator().manual_seed(0)
        self.value = torch.randn(self.shape, generator=dice).to(torch.bfloat16)
        self.gradient = torch.ones(self.shape)
        self.queue = WeightQueue()


def made(counts: list[int]) -> list[torch.Tensor]:
    weight = Stacked()
    layer = Grouped(weight, (PLAIN,) * EXPERTS)  # type: ignore[arg-type]
    dice = torch.Generator().manual_seed(1)
    rows = sum(counts)
    x = torch.randn(rows, INSIDE, generator=dice).to(torch.bfloat16).requires_grad_()
    y = layer(x, counts)
    y.backward(torch.randn(rows, OUT, generator=dice).to(torch.bfloat16))
    assert x.grad is not None
    return [y.detach(), x.grad, weight.gradient]


@pytest.mark.parametrize("counts", [[3, 5, 1, 8], [0, 7, 0, 2], [0, 0, 0, 0]])
def test_one_kernel_makes_what_one_each_does(
    counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    want, calls, real = made(counts), [], torch._grouped_mm
    monkeypatch.setattr(experts, "GROUPED_DEVICES", ("cpu",))
    monkeypatch.setattr(
        torch, "_grouped_mm", lambda *a, **k: calls.append(a) or real(*a, **k), raising=True
    )
    found = made(counts)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0.01, atol=0.02)
    gradient_too = bool(min(counts))
    assert len(calls) == (0 if not sum(counts) else 2 + gradient_too)


def test_rows_that_do_not_begin_at_16_bytes_are_multiplied_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(experts, "GROUPED_DEVICES", ("cpu",))
    layer = Grouped(Stacked(), (PLAIN,) * EXPERTS)  # type: ignore[arg-type]
    x = torch.zeros(2, INSIDE, dtype=torch.bfloat16)
    assert layer._is_one(x, layer.weight.value)
    assert not layer._is_one(x.float(), layer.weight.value.float())
    shifted = torch.zeros(EXPERTS * OUT * INSIDE + 1, dtype=torch.bfloat16)[1:]
    assert not layer._is_one(x, shifted.view(EXPERTS, OUT, INSIDE))
    assert not layer._is_one(x[:, :9], layer.weight.value[..., :9])

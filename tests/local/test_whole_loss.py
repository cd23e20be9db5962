"""The loss of whole logits beside torch's: values, gradients, and what is not counted."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from partita.parallel.regions import IDENTITY
from partita.parallel.tp.loss import CrossEntropy

UNCOUNTED = -100
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rows", (101, 90))  # of 101 columns: the others are padding
def test_loss_and_gradient_are_torchs(dtype: torch.dtype, rows: int) -> None:
    draw = torch.Generator().manual_seed(3)
    logits = (30 * torch.randn(3, 7, 101, generator=draw, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, rows, (3, 7), generator=draw)
    valid = torch.rand(3, 7, generator=draw) > 0.3
    targets[~valid] = UNCOUNTED
    given, hits = logits.clone().requires_grad_(), []
    loss = CrossEntropy(0, rows, IDENTITY, IDENTITY, IDENTITY)
    found = loss(given, targets, valid, 11, 3.0, hits)
    found.backward()

    exact = logits.double().requires_grad_()
    real = exact[..., :rows].flatten(0, 1)
    expected = cross_entropy(real, targets.flatten(), reduction="sum", ignore_index=UNCOUNTED) / 11
    (3 * expected).backward()
    assert torch.equal(given.detach(), logits), "the logits are not ours to change"
    assert abs(found.item() / expected.item() - 1) <= BOUNDS[dtype]
    assert given.grad is not None and exact.grad is not None
    assert (given.grad.double() - exact.grad).abs().max() <= BOUNDS[dtype]
    best = exact[..., :rows].argmax(-1)
    assert torch.equal(hits[0], (best == targets) & valid)

"""Full recomputation: a layer keeps its input, and backward runs it again first.

The replay runs under phase B and leaves out what backward does not need: the last matmul and its
reduction (parallel/read.replayed), so that traffic and work are what the program declares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Recomputed(torch.autograd.Function):
    """block.run(x, batch) that keeps x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, block: Any, batch: Any) -> Tensor:
        """Runs without a graph."""
        ctx.save_for_backward(x)
        ctx.block, ctx.batch = block, batch
        return block.run(x, batch)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """Runs again with a graph, then through it."""
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            y = ctx.block.run(again, ctx.batch, replay=True)
            torch.autograd.backward(y, dy)
        return again.grad, None, None

"""A call at one place of backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Passed(torch.autograd.Function):
    """Identity whose backward makes a call, then passes the gradient on: at a block's input it is made when
    the block's backward is over, at its output before that begins. Nothing is communicated."""

    @staticmethod
    def forward(ctx, x: Tensor, call: Callable[[], object]) -> Tensor:
        """x itself, as a view."""
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """Calls, and passes the gradient on."""
        ctx.call()
        return gradient, None

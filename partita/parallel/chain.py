"""Functions in a row as one node of autograd: what they keep and compute is the same, bit for bit.

    Chain.apply(x, (first, given...), (second, given...))    second(first(x, given...), given...)
    Residual.apply(x, ...)                                   the same added to x

Each link is an autograd.Function and what it is given behind the tensors it reads: those that the link
before it made. A node costs Python twice a microbatch, which counts where layers are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Link = tuple[Any, ...]  # a Function, and what it is given behind tensors


class Kept:
    """What one link keeps between forward and backward, in the place of autograd's ctx."""

    layer: Any  # a Function notes its part here,
    bias: Any  # or here,
    region: Any  # or here

    def __init__(self) -> None:
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """As torch's."""
        self.saved_tensors = tensors


class Chain(torch.autograd.Function):
    """Saves what its links save; backward lets go of it link by link."""

    @staticmethod
    def forward(ctx, x: Tensor, *links: Link) -> Any:
        """One link after the other."""
        values: Any = x
        ctx.links, saved = [], []
        for function, *given in links:
            kept = Kept()
            read = values if isinstance(values, tuple) else (values,)
            values = function.forward(kept, *read, *given)
            ctx.links.append((function, kept, len(read), len(kept.saved_tensors)))
            saved += kept.saved_tensors
            kept.saved_tensors = ()
        ctx.save_for_backward(*saved)
        return values

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The links' backwards, from the last to the first."""
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # from here on `saved` alone holds them
        found: Any = gradients
        for function, kept, reads, saves in reversed(ctx.links):
            first = len(saved) - saves
            kept.saved_tensors = tuple(saved[first:])
            del saved[first:]
            found = function.backward(kept, *found)
            kept.saved_tensors = ()
            found = found[:reads] if isinstance(found, tuple) else (found,)
        return *found, *(None for _ in ctx.links)


class Residual(torch.autograd.Function):
    """x + Chain(x, *links)."""

    @staticmethod
    def forward(ctx, x: Tensor, *links: Link) -> Tensor:
        """Adds behind the last link."""
        return x + Chain.forward(ctx, x, *links)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Both ways."""
        dx, *rest = Chain.backward(ctx, dy)
        return dy + dx, *rest

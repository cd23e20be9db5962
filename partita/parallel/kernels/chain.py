"""Functions in a row as one node of autograd: what they keep and compute is the same, bit for bit.

    segment = (first, given...), (second, given...)    x + second(first(x, given...), given...)
    Residual.apply(x, segment, ...)                    one segment after the other

Each link is an autograd.Function and what it is given behind the tensors it reads: those that the link
before it made. A node costs Python twice a microbatch, which counts where layers are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

Below: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)

Link = tuple[Any, ...]  # a Function, and what it is given behind tensors
Segment = Sequence[Link]


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

    def maybe_clear_saved_tensors(self) -> None:
        """As torch's."""
        self.saved_tensors = ()

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """As torch's: whoever calls backward knows."""


Done = tuple[Any, Kept, int, int]  # a Function, its ctx, how many tensors it reads and saves


def call(function: Any, *given: Any) -> Any:
    """function.apply; its forward alone where no graph is made: a node takes as long as a small kernel."""
    if torch.is_grad_enabled():
        return function.apply(*given)
    return function.forward(Kept(), *given)


def _below() -> Any:
    """Where operators do not ask autograd, which records nothing inside a Function. Who watches them sees
    them in parts, as autograd hands them on."""
    return nullcontext() if _len_torch_dispatch_stack() else Below()


def _forward(x: Tensor, links: Segment, done: list[Done], saved: list[Tensor | None]) -> Any:
    """One link after the other; what they save is added to `saved`."""
    values: Any = x
    for function, *given in links:
        kept = Kept()
        read = values if isinstance(values, tuple) else (values,)
        values = function.forward(kept, *read, *given)
        done.append((function, kept, len(read), len(kept.saved_tensors)))
        saved += kept.saved_tensors
        kept.saved_tensors = ()
    return values


def _backward(gradients: Any, done: Sequence[Done], saved: list[Tensor]) -> tuple[Tensor, ...]:
    """The links' backwards, from the last to the first; lets go of what is saved link by link."""
    found: Any = gradients
    for function, kept, reads, saves in reversed(done):
        first = len(saved) - saves
        kept.saved_tensors = tuple(saved[first:])
        del saved[first:]
        found = function.backward(kept, *found)
        kept.saved_tensors = ()
        found = found[:reads] if isinstance(found, tuple) else (found,)
    return found


class Steps:
    """Functions of which one may read what several made, as part of one node: each is run, and in the
    reverse order brought back by whoever knows what read what."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, Kept, int]] = []
        self.saved: list[Tensor | None] = []

    def run(self, function: Any, *given: Any) -> Any:
        """Its forward."""
        kept = Kept()
        made = function.forward(kept, *given)
        self._done.append((function, kept, len(kept.saved_tensors)))
        self.saved += kept.saved_tensors
        kept.saved_tensors = ()
        return made

    def keep(self, ctx: Any) -> None:
        """What they save is the node's."""
        ctx.steps, saved, self.saved = self, self.saved, []
        ctx.save_for_backward(*saved)

    @staticmethod
    def of(ctx: Any) -> Steps:
        """What a node kept, of which it lets go step by step."""
        steps = Steps()
        steps._done = list(ctx.steps._done)  # a graph that is retained comes back again
        steps.saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        return steps

    def back(self, *gradients: Tensor | None) -> Any:
        """The backward of the last that has not come back: the gradient of what it read first, or of all
        where several have one."""
        function, kept, saves = self._done.pop()
        first = len(self.saved) - saves
        kept.saved_tensors = tuple(self.saved[first:])
        del self.saved[first:]
        found = function.backward(kept, *gradients)
        kept.saved_tensors = ()
        return found


class Residual(torch.autograd.Function):
    """Segments one after the other, each added to what it reads. Without a graph it is given one at a time:
    what a node saves lives as long as its forward."""

    @staticmethod
    def forward(ctx, x: Tensor, *segments: Segment) -> Tensor:
        """Adds behind the last link of each."""
        ctx.segments, saved = [], []
        with _below():
            for links in segments:
                ctx.segments.append([])
                x = x + _forward(x, links, ctx.segments[-1], saved)
        ctx.save_for_backward(*saved)
        return x

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Both ways."""
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # from here on `saved` alone holds them
        with _below():
            for done in reversed(ctx.segments):
                (dx,) = _backward((dy,), done, saved)
                dy = dy + dx
        return dy, *(None for _ in ctx.segments)

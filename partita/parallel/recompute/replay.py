"""Backward makes again what forward did not keep: a layer, a function of tensors, one linear's input.

The replay runs under phase B and leaves out what backward does not need: the last matmul and its
reduction (parallel/read.replayed), so that traffic and work are what the program declares.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from partita.parallel.regions import Tape


class Recomputed(torch.autograd.Function):
    """block.run(x, batch) that keeps x, and what the block's tape keeps, alone."""

    @staticmethod
    def forward(ctx, x: Tensor, block: Any, batch: Any) -> Tensor:
        """Runs without a graph."""
        tape: Tape = block.tape
        tape.brought, tape.writing = [], True
        y = block.run(x, batch)
        tape.writing = False
        ctx.save_for_backward(x, *tape.brought)
        tape.brought = []
        ctx.block, ctx.batch = block, batch
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """Runs again with a graph, then through it."""
        x, *brought = ctx.saved_tensors
        tape: Tape = ctx.block.tape
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            tape.brought, tape.reading = brought, True
            y = ctx.block.run(again, ctx.batch, replay=True)
            tape.reading = False
            torch.autograd.backward(y, dy)
        return again.grad, None, None


class Again(torch.autograd.Function):
    """function(*tensors, replay) without weights, of which its inputs alone are kept. `replay`: backward
    wants what it saves, its value may be any."""

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Runs without a graph."""
        ctx.save_for_backward(*tensors)
        ctx.function = function
        return function(*tensors, replay=False)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Runs again with a graph, then through it."""
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            y = ctx.function(*leaves, replay=True)
        return None, *torch.autograd.grad(y, leaves, dy)


def made_again(
    x: Tensor, recipe: Callable[[], Tensor], applies: bool
) -> AbstractContextManager[None]:
    """Within it, what would save x saves `recipe` in its place, which backward calls without a graph."""
    if not applies:
        return nullcontext()

    def pack(t: Tensor) -> Tensor | Callable[[], Tensor]:
        return recipe if t.data_ptr() == x.data_ptr() else t

    def unpack(held: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(held, Tensor):
            return held
        with torch.no_grad():
            return held()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

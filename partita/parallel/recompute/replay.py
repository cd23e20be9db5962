"""Backward makes again what forward did not keep: a layer, a function of tensors, one linear's input.

The replay runs under phase B and leaves out what backward does not need: the last matmul and its
reduction (parallel/read.replayed), so that traffic and work are what the program declares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from partita.parallel.regions import Tape


class Recomputed(torch.autograd.Function):
    """block.run(x, batch) that keeps x, and what the block's tape keeps, alone."""

    @staticmethod
    def forward(ctx, x: Tensor, block: Any, batch: Any) -> Tensor:
        """Runs without a graph."""
        brought: list[Tensor] = []
        ctx.told = []
        with written(block.tape, brought, ctx.told):
            y = block.run(x, batch)
        ctx.save_for_backward(x, *brought)
        ctx.block, ctx.batch = block, batch
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """Runs again with a graph, then through it."""
        x, *brought = ctx.saved_tensors
        again = x.detach().requires_grad_()
        with read_again(ctx.block.tape, brought, list(ctx.told)):
            y = ctx.block.run(again, ctx.batch, replay=True)
        with torch.enable_grad():
            torch.autograd.backward(y, dy)
        return again.grad, None, None


class Began(torch.autograd.Function):
    """y, made of x without a graph, by a part that is run again when its backward is told to begin; keeps x,
    and what the part's tape keeps, alone. Hands x no gradient."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        y: Tensor,
        begin: Callable[[tuple[Tensor, ...], Tensor], None],
        *brought: Tensor,
    ) -> Tensor:
        """y itself, as a view."""
        ctx.save_for_backward(x, *brought)
        ctx.begin = begin
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[None, ...]:
        """Says with what it begins."""
        ctx.begin(ctx.saved_tensors, dy)
        return (None,) * len(ctx.needs_input_grad)


@contextmanager
def written(tape: Tape, brought: list[Tensor], told: list[Any]) -> Iterator[None]:
    """Regions add to both what the replay is not to move, or ask, again; no graph is made."""
    tape.brought, tape.told, tape.writing = brought, told, True
    try:
        with torch.no_grad():
            yield
    finally:
        tape.brought, tape.told, tape.writing = [], [], False


@contextmanager
def read_again(tape: Tape, brought: list[Tensor], told: list[Any]) -> Iterator[None]:
    """Regions take from both what they brought before; a graph is made."""
    tape.brought, tape.told, tape.reading = brought, told, True
    try:
        with torch.enable_grad():
            yield
    finally:
        tape.brought, tape.told, tape.reading = [], [], False


class Again(torch.autograd.Function):
    """function(*tensors) without weights, of which its inputs are kept, and what the tape keeps. A replay is
    there for what backward wants of what it saves: its value may be any."""

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], tape: Tape, *tensors: Tensor) -> Tensor:
        """Runs without a graph."""
        brought: list[Tensor] = []
        with written(tape, brought, []):
            y = function(*tensors)
        ctx.save_for_backward(*tensors, *brought)
        ctx.function, ctx.tape, ctx.inputs = function, tape, len(tensors)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Runs again with a graph, then through it."""
        saved = list(ctx.saved_tensors)
        leaves = [t.detach().requires_grad_() for t in saved[: ctx.inputs]]
        with read_again(ctx.tape, saved[ctx.inputs :], []):
            y = ctx.function(*leaves)
        return None, None, *torch.autograd.grad(y, leaves, dy)


def made_again(
    x: Tensor, recipe: Callable[[], Tensor], applies: bool
) -> AbstractContextManager[None]:
    """Within it, what would save x saves `recipe` in its place, which backward calls without a graph. The
    graph keeps both hooks as long as what they pack: they know x by its address and shape (a part of x, or
    another tensor without elements, has its address too), and do not hold it."""
    if not applies:
        return nullcontext()
    known = x.data_ptr(), x.shape

    def pack(t: Tensor) -> Tensor | Callable[[], Tensor]:
        return recipe if (t.data_ptr(), t.shape) == known else t

    def unpack(held: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(held, Tensor):
            return held
        with torch.no_grad():
            return held()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

"""A forward and a backward in pieces, so that two microbatches take turns on a rank (DualPipe, DeepSeek-V3,
2412.19437, sec. 3.2.1): while rows of one travel, the other is computed on.

    backward b   combine           experts           dispatch, attention, combine           experts
    forward a            dispatch           experts                               combine, ...
    lane ep              b ─────►  a ─────► b ─────► a ─────────────────────────►

A stage's forward is a generator (`Flow`): where rows travel it yields the tensors that live on, and is sent
them back to go on from. In pieces it is sent leaves in their place, so that each piece has a graph of its
own; backward runs through them in reverse and hands each piece the gradients of the next one's leaves.

What backward makes again (`Remade`) runs without a graph, in pieces too; its backward is a flow with a graph,
and the way back through that.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

Live = tuple[Tensor, ...]


@dataclass(eq=False)
class Remade:
    """Part of a forward that keeps what it began from, x, and little else. A flow yields it, and is sent a
    leaf in place of x where it runs in pieces, nothing where it runs as a whole. `replay(saved)` is x and the
    same part once more, with a graph; `found` is what was saved and the gradient that came back."""

    x: Tensor
    replay: Callable[[Live], tuple[Tensor, Flow]]
    found: tuple[Live, Tensor] | None = None

    def begin(self, saved: Live, gradient: Tensor) -> None:
        """The part's own backward has come to it."""
        self.found = saved, gradient

    def backward(self) -> Generator[None, None, Tensor]:
        """The gradient of x; stops after each piece but the last."""
        assert self.found is not None, "its backward has begun"
        (saved, gradient), self.found, cuts = self.found, None, Cuts()
        x, flow = self.replay(saved)
        y = yield from forward_in_pieces(flow, cuts)
        yield from backward_in_pieces(y, gradient, cuts)
        assert x.grad is not None, "what is made again depends on its input"
        return x.grad


Flow = Generator[Live | Remade, Live, Tensor]
Cuts = list[
    tuple[Live | Remade, Live]
]  # what a piece left, and the leaves that the next began from


def run(flow: Flow) -> Tensor:
    """All of it in one graph."""
    try:
        live = next(flow)
        while True:
            live = flow.send(() if isinstance(live, Remade) else live)
    except StopIteration as end:
        return end.value


def within(flow: Flow, around: Callable[[], AbstractContextManager[Any]]) -> Flow:
    """Each piece within a context of its own: between pieces others run."""
    live: Any = None
    while True:
        try:
            with around():
                live = flow.send(live)
        except StopIteration as end:
            return end.value
        live = yield live


def forward_in_pieces(flow: Flow, cuts: Cuts) -> Generator[None, None, Tensor]:
    """Stops after each piece but the last; notes where it was cut: a piece without a graph is not."""
    try:
        live = next(flow)
        while True:
            if not isinstance(live, Remade):
                yield
            left = (live.x,) if isinstance(live, Remade) else live
            if any(t.requires_grad for t in left):
                leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in left)
                cuts.append((live, leaves))
                left = leaves
            live = flow.send(left)
    except StopIteration as end:
        return end.value


def backward_in_pieces(
    y: Tensor | GradientEdge, gradient: Tensor | None, cuts: Cuts
) -> Generator[None]:
    """Stops after each piece but the last; lets go of each as it is done."""
    torch.autograd.backward(y, gradient)
    while cuts:
        live, leaves = cuts.pop()
        if isinstance(live, Remade):
            dx = yield from live.backward()
            torch.autograd.backward(live.x, dx)
            continue
        yield
        found = [(t, of.grad) for t, of in zip(live, leaves, strict=True) if of.grad is not None]
        torch.autograd.backward([t for t, _ in found], [g for _, g in found])

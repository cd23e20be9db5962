"""A forward and a backward in pieces, so that two microbatches take turns on a rank (DualPipe, DeepSeek-V3,
2412.19437, sec. 3.2.1): while rows of one travel, the other is computed on.

    backward b   combine           experts           dispatch, attention, combine           experts
    forward a            dispatch           experts                               combine, ...
    lane ep              b ─────►  a ─────► b ─────► a ─────────────────────────►

A stage's forward is a generator (`Flow`): where rows travel it yields the tensors that live on, and is sent
them back to go on from. In pieces it is sent leaves in their place, so that each piece has a graph of its
own; backward runs through them in reverse and hands each piece the gradients of the next one's leaves.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

Live = tuple[Tensor, ...]
Flow = Generator[Live, Live, Tensor]
Cuts = list[tuple[Live, Live]]  # what a piece left, and the leaves that the next began from


def run(flow: Flow) -> Tensor:
    """All of it in one graph."""
    try:
        live = next(flow)
        while True:
            live = flow.send(live)
    except StopIteration as end:
        return end.value


def forward_in_pieces(flow: Flow, cuts: Cuts) -> Generator[None, None, Tensor]:
    """Stops after each piece but the last; notes where it was cut."""
    try:
        live = next(flow)
        while True:
            yield
            leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in live)
            cuts.append((live, leaves))
            live = flow.send(leaves)
    except StopIteration as end:
        return end.value


def backward_in_pieces(y: Tensor, gradient: Tensor | None, cuts: Cuts) -> Iterator[None]:
    """Stops after each piece but the last; lets go of each as it is done."""
    torch.autograd.backward(y, gradient)
    while cuts:
        yield
        live, leaves = cuts.pop()
        found = [(t, of.grad) for t, of in zip(live, leaves, strict=True) if of.grad is not None]
        torch.autograd.backward([t for t, _ in found], [g for _, g in found])

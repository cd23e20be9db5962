"""What a piece of a layer takes forward and backward, as it runs in a model: calls of it take turns.

Several run forward, then backward in the reverse order. What each is given was made just now; what its
forward kept, the memory that it takes and what the next one reads have been away since others ran.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

TOGETHER = (2, 8)  # of a piece in a row, at least and at most
BYTES = 24_000_000  # that they read: more than a core's caches, as a model's layers do
# bytes that LAYERS touch: at most, and times what a piece is given
AWAY, AWAY_TIMES = 40_000_000, 160
ROUNDS = 3
LAYERS = 8  # whose linears take turns, at most; fewer where fewer fill the caches
Piece = Callable[..., Any]


def both_ways(
    pieces: Sequence[Piece], inputs: Sequence[Tensor], at_least_s: float
) -> tuple[float, float]:
    """Median seconds of a piece's forward and of its backward, the engine's start left out."""
    made = _run(pieces, inputs, at_least_s)
    empty = _run([lambda *x: x[0].view_as(x[0])], inputs[:1], at_least_s / 4)
    return made[0], max(made[1] - empty[1], 0.0)


def _run(
    pieces: Sequence[Piece], inputs: Sequence[Tensor], at_least_s: float
) -> tuple[float, float]:
    """Each call on its own: between two of them memory is touched as by the rest of a layer, then what the
    next is given."""
    count = _count(pieces[0], inputs, at_least_s)
    sets = [[x.clone().requires_grad_() for x in inputs] for _ in range(count)]
    size = min(AWAY, AWAY_TIMES * sum(x.nbytes for x in inputs))
    layers = cycle(torch.zeros(size, dtype=torch.uint8).split(max(size // LAYERS, 1)))
    there, back = [], []
    end = time.perf_counter() + at_least_s
    seed: Tensor | None = None
    while len(there) < ROUNDS or time.perf_counter() < end:
        made, forward, backward = [], 0.0, 0.0
        for piece, one in zip(cycle(pieces), sets, strict=False):
            touch(next(layers), *one)
            start = time.perf_counter()
            made.append(piece(*one))
            forward += time.perf_counter() - start
        is_first = seed is None
        seed = torch.ones_like(made[0]) if seed is None else seed
        for y, one in zip(reversed(made), reversed(sets), strict=True):
            touch(next(layers), seed)
            start = time.perf_counter()
            torch.autograd.grad(y, one, seed)
            backward += time.perf_counter() - start
        if not is_first:  # which warms up
            there.append(forward / count)
            back.append(backward / count)
    return statistics.median(there), statistics.median(back)


@torch.no_grad()
def touch(*tensors: Tensor) -> None:
    """Brings them to the caches."""
    for x in tensors:
        x.mul_(1)


def _count(piece: Piece, inputs: Sequence[Tensor], at_least_s: float) -> int:
    """How many run in a row: fewer where one takes long."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    piece(*leaves)
    start = time.perf_counter()
    piece(*leaves)
    quick = int(2 * at_least_s / (time.perf_counter() - start))
    few, many = TOGETHER
    return max(few, min(many, quick, BYTES // max(sum(x.nbytes for x in inputs), 1)))

"""A linear of every expert on its own rows: one matmul an expert over neighbouring rows, none padded or
dropped (MegaBlocks, Gale et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from partita.parallel.lora import LowRank
from partita.parallel.product import PLAIN, Product
from partita.parallel.units import Matrix, Weight


@dataclass(frozen=True)
class Grouped:
    """x [rows, columns], by expert -> [rows, the expert's rows]; `matrices` are the local experts', `low`
    what LoRA has beside each."""

    matrices: tuple[Matrix, ...]
    low: tuple[LowRank, ...] = ()

    @staticmethod
    def of(weight: Weight, columns: int = 1, low: LowRank | None = None) -> Grouped:
        """Stacked experts; `columns` counts the trailing dims that are contracted, `low` is all experts'."""
        size, width = prod(weight.shape[1:]), prod(weight.shape[-columns:])
        firsts = range(weight.first, weight.first + prod(weight.shape), size)
        shape = (size // width, width)
        matrices = tuple(weight.unit.matrix(weight.name, first, shape) for first in firsts)
        return Grouped(matrices, () if low is None else low.split(len(matrices)))

    @property
    def trains(self) -> bool:
        """Whether something has a gradient: only then x is kept."""
        return self.matrices[0].trains or any(low.trains for low in self.low)

    def __call__(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """`counts` are the rows of each expert."""
        return _Grouped.apply(x, self, counts)  # type: ignore[return-value]


class _Grouped(torch.autograd.Function):
    """Keeps x, unless the experts are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Grouped, counts: Sequence[int]) -> Tensor:
        """An expert after the other."""
        ctx.save_for_backward(x if layer.trains else None)
        ctx.layer, ctx.counts = layer, counts
        y = x.new_empty((x.shape[0], layer.matrices[0].shape[0]))
        for m, rows, out in zip(layer.matrices, x.split(counts), y.split(counts), strict=True):
            if rows.shape[0]:
                _multiply(m.product, rows, m.value.t(), out, m.multiply)
        for low, rows, out in zip(layer.low, x.split(counts), y.split(counts), strict=False):
            if rows.shape[0]:
                low.add(out, rows)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the rows, then of the weights."""
        (x,) = ctx.saved_tensors
        layer: Grouped = ctx.layer
        dx = dy.new_empty((dy.shape[0], layer.matrices[0].shape[1]))
        slopes, outs = dy.split(ctx.counts), dx.split(ctx.counts)
        for m, d, out in zip(layer.matrices, slopes, outs, strict=True):
            if d.shape[0]:
                _multiply(m.product, d, m.value, out, m.back)
        each = zip(layer.low, slopes, outs, strict=False)
        dhs = [low.back(d, out) if d.shape[0] else () for low, d, out in each]
        if x is not None:
            every = x.split(ctx.counts)
            for m, d, rows in zip(layer.matrices, slopes, every, strict=True):
                if rows.shape[0]:
                    m.accumulate(d, rows)
            for low, d, rows, dh in zip(layer.low, slopes, every, dhs, strict=False):
                if rows.shape[0]:
                    layer.matrices[0].queue.add(low.accumulate, d, rows, dh)
        return dx, None, None


def _multiply(
    product: Product, x: Tensor, right: Tensor, out: Tensor, other: Callable[[Tensor], Tensor]
) -> None:
    """A plain matmul goes straight to its place."""
    if product is PLAIN:
        torch.mm(x, right, out=out)
    else:
        out.copy_(other(x))

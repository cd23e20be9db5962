"""A linear of every expert on its own rows: one matmul an expert over neighbouring rows, none padded or
dropped (MegaBlocks, Gale et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.parallel.lora import LowRank
from partita.parallel.product import LEAST, PLAIN, Product, is_wide, times_into
from partita.parallel.units import Weight, add_product


@dataclass(frozen=True)
class Grouped:
    """x [rows, columns], by expert -> [rows, the expert's rows]. `weight` [experts, ..., columns] are the
    local experts', `products` how each multiplies, `low` what LoRA has beside each."""

    weight: Weight
    products: tuple[Product, ...]
    low: tuple[LowRank, ...] = ()

    @staticmethod
    def of(weight: Weight, low: LowRank | None = None) -> Grouped:
        """Stacked experts; `low` is all experts'."""
        experts = weight.shape[0]
        products = tuple(weight.unit.product_of(weight.name) for _ in range(experts))
        return Grouped(weight, products, () if low is None else low.split(experts))

    @property
    def trains(self) -> bool:
        """Whether something has a gradient: only then x is kept."""
        return self.weight.trains or any(low.trains for low in self.low)

    def __call__(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """`counts` are the rows of each expert."""
        return _Grouped.apply(x, self, counts)  # type: ignore[return-value]

    def multiply(self, x: Tensor, counts: Sequence[int], back: bool) -> Tensor:
        """x W.T of each expert, or x W on the way `back`. Views are made for all experts at once: with many
        narrow ones a view takes as long as a product."""
        weights = self.weight.value.flatten(1, -2)
        y = x.new_empty((x.shape[0], weights.shape[2 if back else 1]))
        rights = (weights if back else weights.mT).unbind(0)
        sizes = max(counts), weights.shape[1], weights.shape[2]
        multiply = times_into if is_wide(x.dtype, x.device, sizes, LEAST) else mm_into
        each = zip(x.split(counts), rights, y.split(counts), self.products, strict=True)
        for rows, right, out, product in each:
            if not rows.shape[0]:
                continue
            if product is PLAIN:
                multiply(out, rows, right)
            elif back:
                out.copy_(product.input_gradient(rows, right))
            else:
                out.copy_(product.forward(rows, right.t()))
        return y

    def accumulate(self, dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
        """Adds every expert's gradient: now, or at the W of a split backward, which keeps both until then."""
        if self.weight.trains:
            self.weight.queue.add(self._add, dy, x, counts)

    def _add(self, dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
        gradients = self.weight.gradient.flatten(1, -2).unbind(0)
        each = zip(gradients, dy.split(counts), x.split(counts), self.products, strict=True)
        for gradient, d, rows, product in each:
            if rows.shape[0]:
                add_product(gradient, d, rows, product)


def mm_into(out: Tensor, x: Tensor, right: Tensor) -> None:
    """out = x by right, by torch's own kernel."""
    torch.mm(x, right, out=out)


class _Grouped(torch.autograd.Function):
    """Keeps x, unless the experts are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Grouped, counts: Sequence[int]) -> Tensor:
        """An expert after the other."""
        ctx.save_for_backward(x if layer.trains else None)
        ctx.layer, ctx.counts = layer, counts
        y = layer.multiply(x, counts, back=False)
        for low, rows, out in zip(layer.low, x.split(counts), y.split(counts), strict=False):
            if rows.shape[0]:
                low.add(out, rows)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the rows, then of the weights."""
        (x,) = ctx.saved_tensors
        layer: Grouped = ctx.layer
        counts: Sequence[int] = ctx.counts
        dx = layer.multiply(dy, counts, back=True)
        each = list(zip(layer.low, dy.split(counts), dx.split(counts), strict=False))
        dhs = [low.back(d, out) if d.shape[0] else () for low, d, out in each]
        if x is not None:
            layer.accumulate(dy, x, counts)
            for (low, d, _), rows, dh in zip(each, x.split(counts), dhs, strict=False):
                if rows.shape[0]:
                    layer.weight.queue.add(low.accumulate, d, rows, dh)
        return dx, None, None

"""A linear of every expert on its own rows: one matmul an expert over neighbouring rows, none padded or
dropped (MegaBlocks, Gale et al. 2023). Where a GPU has a kernel for all experts at once, by that: it reads on
the device whose rows are whose, and the host is not told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from partita.parallel.ep.dispatch import Marks
from partita.parallel.ep.loads import Counts, ends_of, host_of
from partita.parallel.kernels.product import LEAST, PLAIN, Product, is_wide, little_of, times_into
from partita.parallel.lora import LowRank, RowMasks, masked
from partita.parallel.regions import Unplayed
from partita.parallel.units import Weight, add_product

ALIGNED = 16  # bytes that rows lie on for the kernel that takes all experts
MOST = 1023  # experts that it takes


@dataclass(frozen=True)
class Grouped:
    """x [rows, columns], by expert -> [rows, the expert's rows]. `weight` [experts, ..., columns] are the
    local experts', `products` how each multiplies, `low` what LoRA has beside each, `masks` what drops
    elements of what that reads; `unplayed`, where a replay leaves it out."""

    weight: Weight
    products: tuple[Product, ...]
    low: tuple[LowRank, ...] = ()
    masks: RowMasks | None = None
    unplayed: Unplayed | None = None

    @staticmethod
    def of(weight: Weight, low: LowRank | None = None, masks: RowMasks | None = None) -> Grouped:
        """Stacked experts; `low` is all experts'."""
        experts = weight.shape[0]
        products = tuple(weight.unit.product_of(weight.name) for _ in range(experts))
        return Grouped(weight, products, () if low is None else low.split(experts), masks)

    @property
    def trains(self) -> bool:
        """Whether something has a gradient: only then x is kept."""
        return self.weight.trains or any(low.trains for low in self.low)

    def __call__(self, x: Tensor, counts: Counts, marks: Marks | None = None) -> Tensor:
        """`counts` are the rows of each expert, `marks` whose they are, where adapters drop and it trains."""
        step, tokens = (
            (0, None) if marks is None or self.masks is None else (marks.step, marks.tokens)
        )
        return Multiply.apply(x, self, counts, step, tokens)  # type: ignore[return-value]

    def begin(self, counts: Sequence[int], step: int, tokens: Tensor | None) -> tuple[LowRank, ...]:
        """What is beside each expert, for the rows of one pass."""
        if tokens is None or self.masks is None:
            return self.low
        p, stays = self.masks.probability, self.masks.mask(step, counts, tokens).split(counts)
        return tuple(
            replace(low, dropped=masked(of, p)) for low, of in zip(self.low, stays, strict=True)
        )

    def multiply(self, x: Tensor, counts: Counts, back: bool) -> Tensor:
        """x W.T of each expert, or x W on the way `back`. Views are made for all experts at once: with many
        narrow ones a view takes as long as a product."""
        weights = self.weight.value.flatten(1, -2)
        if self._is_plain and has_grouped(x, weights):
            return grouped(x, weights if back else weights.mT, counts)
        counts = host_of(counts)
        y = x.new_empty((x.shape[0], weights.shape[2 if back else 1]))
        little = self._little(x, counts)
        if little is not None:
            little.grouped(y, x, weights, counts, back)
            return y
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

    @cached_property
    def _is_plain(self) -> bool:
        return all(product is PLAIN for product in self.products)

    def _little(self, x: Tensor, counts: Sequence[int]) -> ModuleType | None:
        if not self._is_plain:
            return None
        return little_of(x, (max(counts), prod(self.weight.shape[1:-1]), self.weight.shape[-1]))

    def accumulate(self, dy: Tensor, x: Tensor, counts: Counts) -> None:
        """Adds every expert's gradient: now, or at the W of a split backward, which keeps both until then."""
        if self.weight.trains:
            self.weight.queue.add(self._add, dy, x, counts)

    def accumulate_low(
        self, dy: Tensor, x: Tensor, counts: Counts, dhs: Sequence[Any], *marks: Any
    ) -> None:
        """The same of what is beside them, whose dh are known; draws its masks again."""
        counts = host_of(counts)
        each = zip(self.begin(counts, *marks), dy.split(counts), x.split(counts), dhs, strict=True)
        for low, d, rows, dh in each:
            if rows.shape[0]:
                low.accumulate(d, rows, dh)

    def _add(self, dy: Tensor, x: Tensor, counts: Counts) -> None:
        gradients = self.weight.gradient.flatten(1, -2)
        if self._is_plain and gradients.dtype != dy.dtype and has_grouped(dy, x):
            gradients.add_(grouped(dy.t(), x, counts))  # of no rows: zero
            return
        counts = host_of(counts)
        little = self._little(dy, counts)
        if little is not None:
            little.add_grouped(gradients, dy, x, counts)
            return
        each = zip(
            gradients.unbind(0), dy.split(counts), x.split(counts), self.products, strict=True
        )
        for gradient, d, rows, product in each:
            if rows.shape[0]:
                add_product(gradient, d, rows, product)


def grouped(x: Tensor, right: Tensor, counts: Counts) -> Tensor:
    """Rows x [rows, columns] by each expert's right [experts, columns, ...]; or x [..., rows] by right [rows,
    columns], an expert's columns of one by its rows of the other: [experts, ..., columns]."""
    return torch._grouped_mm(x, right, offs=ends_of(counts, x.device))  # type: ignore[attr-defined]


def has_grouped(*operands: Tensor) -> bool:
    """Whether torch's kernel for all experts takes rows [rows, columns], or stacked weights [experts, rows,
    columns]: of bf16, each row on 16 bytes (aten GroupMM.cu)."""
    first = operands[0]
    if not (groups(first.device) and first.shape[0]):
        return False
    return all(
        x.dtype == torch.bfloat16
        and x.is_contiguous()
        and not any(n * x.element_size() % ALIGNED for n in x.shape[1:])
        and not x.data_ptr() % ALIGNED
        and (x.ndim == 2 or x.shape[0] <= MOST)
        for x in operands
    )


@cache
def groups(device: torch.device) -> bool:
    """Whether a device has that kernel: Hopper. Others go by a loop that waits, and Blackwell's leaves the
    gradient of an expert without rows unwritten (pytorch issue 172439)."""
    if device.type != "cuda" or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def mm_into(out: Tensor, x: Tensor, right: Tensor) -> None:
    """out = x by right, by torch's own kernel."""
    torch.mm(x, right, out=out)


class Multiply(torch.autograd.Function):
    """Keeps x, unless the experts are frozen, and whose rows they are."""

    @staticmethod
    def forward(
        ctx, x: Tensor, layer: Grouped, counts: Counts, step: int, tokens: Tensor | None
    ) -> Tensor:
        """An expert after the other, or all at once."""
        ctx.save_for_backward(x if layer.trains else None, tokens)
        ctx.layer, ctx.counts, ctx.step = layer, counts, step
        if layer.unplayed is not None and layer.unplayed.tape.reading:
            return x.new_empty((x.shape[0], prod(layer.weight.shape[1:-1])))
        y = layer.multiply(x, counts, back=False)
        if not layer.low:  # views of so many rows cost as much as a product
            return y
        counts = host_of(counts)
        begun = layer.begin(counts, step, tokens)
        for low, rows, out in zip(begun, x.split(counts), y.split(counts), strict=True):
            if rows.shape[0]:
                low.add(out, rows)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the rows, then of the weights."""
        x, tokens = ctx.saved_tensors
        layer: Grouped = ctx.layer
        counts: Counts = ctx.counts
        dx = layer.multiply(dy, counts, back=True)
        if x is not None:
            layer.accumulate(dy, x, counts)
        if layer.low:
            counts = host_of(counts)
            begun = layer.begin(counts, ctx.step, tokens)
            each = zip(begun, dy.split(counts), dx.split(counts), strict=True)
            dhs = [low.back(d, out) if d.shape[0] else () for low, d, out in each]
            if x is not None:
                given = dy, x, counts, dhs, ctx.step, tokens
                layer.weight.queue.add(layer.accumulate_low, *given)
        return dx, None, None, None, None

"""The judge's fp8 products, by the definition of the formats; no line of precision/fp8.py.

A number v of a format with m bits of mantissa whose normal numbers begin at 2^low is one of the multiples of
2^(max(floor(log2 |v|), low) - m), the even one of two as near. A tensor is first multiplied by the power of
two that brings its largest element (of all, of a row, of a block of 128; along what the product adds up) to
within a factor of two below the largest power of two of the format (2^126 at the most), and divided by it
afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2

import torch
from torch import Tensor

from partita.spec.plan import PrecisionPlan

E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # mantissa, low, largest
SIDE = 128


@dataclass(frozen=True)
class RoundedProduct:
    """x W.T of inputs in 8 bits, and both gradients; scales are of each tensor as it is."""

    precision: PrecisionPlan

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., columns] -> [..., rows]."""
        return _Product.apply(x, weight, self)  # type: ignore[return-value]

    def of(self, x: Tensor, along: int, gradient: bool = False, square: bool = False) -> Tensor:
        """x as 8 bits hold it. `along`: the dim that is added up; `square`: blocks of both dims."""
        form = E5M2 if gradient and self.precision.fp8_format == "hybrid" else E4M3
        if not x.numel():  # rows of an expert that nobody chose
            return x
        size = x.abs().double()
        if self.precision.fp8_granularity == "tensor":
            largest = size.max()
        elif self.precision.fp8_granularity == "row":
            largest = size.amax(along, keepdim=True)
        else:
            largest = _by_blocks(size, along)
            largest = _by_blocks(largest, 1 - along % 2) if square else largest
        return in_eight_bits(x, form, largest)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, product: RoundedProduct) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product.of(x, -1) @ product.of(weight, 1, square=True).t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of = ctx.product.of
        flat, rows = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = of(dy, -1, gradient=True) @ of(weight, 0, square=True)
        return dx, of(flat, 0, gradient=True).t() @ of(rows, 0), None


def in_eight_bits(x: Tensor, form: tuple[int, int, float], largest: Tensor) -> Tensor:
    """The format's number next to each of x's, scaled for `largest`; in x's dtype."""
    mantissa, low, limit = form
    top = floor(log2(limit)) - 1
    scale = torch.where(largest > 0, _power((top - _whole_log(largest)).clamp(max=126)), 1.0)
    v = x.double() * scale
    step = _power(_whole_log(v.abs()).clamp(min=low) - mantissa)
    return ((v / step).round() * step).clamp(-limit, limit).div(scale).to(x.dtype)


def _whole_log(x: Tensor) -> Tensor:
    """floor(log2 x), exactly; what it says of 0 is nobody's."""
    return torch.frexp(x.double()).exponent - 1


def _power(of: Tensor) -> Tensor:
    """2^of, exactly, fp64."""
    return torch.ldexp(torch.ones_like(of, dtype=torch.float64), of)


def _by_blocks(x: Tensor, dim: int) -> Tensor:
    """Each element's block's largest, along `dim`."""
    found = torch.empty_like(x)
    for first in range(0, x.shape[dim], SIDE):
        length = min(SIDE, x.shape[dim] - first)
        part = x.narrow(dim, first, length).amax(dim, keepdim=True)
        found.narrow(dim, first, length).copy_(part.expand_as(found.narrow(dim, first, length)))
    return found

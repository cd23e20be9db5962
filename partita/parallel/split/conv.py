"""A convolution of the groups that a rank holds; its weight gradient straight into the unit's buffer.

    own groups    x [b, G, channels, h, w]      W [G, filters, channels, kh, kw]             each group alone
    whole input   x [b, S, channels, h, w]      W [G, filters, S, channels, kh, kw]          all S groups
    colors        x [b, colors, h, w]           W [G, filters, colors, kh, kw]

to [b, G, filters, rows, columns]. LoRA (lora.py): y += s B A x, where A is a convolution like W's own to
`rank` maps and B one of 1 x 1 (as peft's Conv2d); a group that sees itself alone has an A of its own:

    own groups    A [G, rank, channels, kh, kw]        B [G, filters, rank]
    else          A [rank, (S,) channels, kh, kw]      B [G, filters, rank]

Nothing here communicates: what joins groups, channels or rows is a region before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from partita.parallel.lora import Drop
from partita.parallel.units import Weight


def _whole(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Shape:
    """Stride, padding (of rows, of columns) and groups that run side by side."""

    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def of(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [b, inputs, h, w], kernel [outputs, inputs of a group, kh, kw]."""
        return conv2d(x, kernel, bias, self.stride, self.padding, groups=self.groups)

    def input_gradient(self, dy: Tensor, kernel: Tensor, shape: tuple[int, ...]) -> Tensor:
        """For dy [b, outputs, rows, columns] and an input of a shape."""
        like = dy.new_empty(1).expand(shape)
        return self._backward(dy, like, kernel, [True, False, False])[0]

    def weight_gradient(self, dy: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """For a kernel of a shape."""
        like = dy.new_empty(1).expand(shape)
        return self._backward(dy, x, like, [False, True, False])[1]

    def _backward(self, dy: Tensor, x: Tensor, kernel: Tensor, wanted: list[bool]) -> list[Tensor]:
        return torch.ops.aten.convolution_backward(
            dy, x, kernel, None, [self.stride] * 2, list(self.padding), [1, 1], False, [0, 0],
            self.groups, wanted,
        )  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """A and B beside a convolution; `groups` have one each, side by side (1: all share A)."""

    a: Weight
    b: Weight
    scale: float
    groups: int
    drop: Drop | None = None
    dropped: Callable[[Tensor], Tensor] = _whole

    @property
    def trains(self) -> bool:
        """Whether some part has a gradient."""
        return self.a.trains or self.b.trains

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A and B as kernels: [outputs, inputs of a group, kh, kw]."""
        *filters, rank = self.b.shape
        maps = rank * self.groups
        a = maps, prod(self.a.shape[:-2]) // maps, *self.a.shape[-2:]
        return a, (prod(filters), rank, 1, 1)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Both."""
        a, b = self.shapes
        return self.a.value.view(a), self.b.value.view(b)

    @property
    def _last(self) -> Shape:
        return Shape(groups=self.groups)

    def add(self, y: Tensor, x: Tensor, shape: Shape) -> None:
        """Adds to y [b, outputs, rows, columns], in place; x as the convolution reads it."""
        a, b = self.kernels()
        h = shape.of(self.dropped(x).flatten(1, -3), a)
        y.add_(self._last.of(h, b), alpha=self.scale)

    def back(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of h, A for `accumulate`): a copy where a W comes later, and A may be gone by then."""
        a, b = self.kernels()
        like = dy.shape[0], len(a), *dy.shape[2:]
        dh = self._last.input_gradient(dy, b, like) * self.scale
        return dh, a.clone() if self.a.queue.defers else a

    def input_gradient(self, dh: Tensor, shape: Shape, like: torch.Size) -> Tensor:
        """A's part of the gradient of x, shaped as x."""
        b, *channels, h, w = like
        dx = shape.input_gradient(dh, self.kernels()[0], (b, prod(channels), h, w))
        return self.dropped(dx.view(like))

    def accumulate(self, dy: Tensor, x: Tensor, kept: tuple[Tensor, Tensor], shape: Shape) -> None:
        """Adds A's and B's gradients, in the wide dtype."""
        (dh, a), (a_shape, b_shape) = kept, self.shapes
        x = self.dropped(x).flatten(1, -3)
        if self.b.trains:
            db = self._last.weight_gradient(dy * self.scale, shape.of(x, a), b_shape)
            self.b.gradient.add_(db.view(self.b.shape))
        if self.a.trains:
            self.a.gradient.add_(shape.weight_gradient(dh, x, a_shape).view(self.a.shape))


@dataclass(frozen=True)
class Convolution:
    """kernel and bias of this rank's groups; `own`: a group sees its own channels alone. `padding`: of rows
    and of columns."""

    kernel: Weight
    bias: Weight
    stride: int
    padding: tuple[int, int]
    own: bool
    low: LowRank | None = None

    def __call__(self, x: Tensor, entry: Tensor | None = None) -> Tensor:
        """Convolves and adds the bias. `entry`: for data, an empty tensor where backward ends."""
        layer = self
        if self.low is not None and self.low.drop is not None:  # masks of this microbatch
            layer = replace(self, low=replace(self.low, dropped=self.low.drop.of_now()))
        return _Convolve.apply(x, entry, layer)  # type: ignore[return-value]

    @property
    def geometry(self) -> Shape:
        """How its kernels lie."""
        return Shape(self.stride, self.padding, self.kernel.shape[0] if self.own else 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernels as torch has them: [outputs, inputs, kh, kw]."""
        groups, filters, *inputs = self.kernel.shape
        return groups * filters, prod(inputs[:-2]), *inputs[-2:]

    @property
    def keeps(self) -> bool:
        """Whether backward wants its input."""
        return self.kernel.trains or (self.low is not None and self.low.trains)

    def multiply(self, x: Tensor) -> Tensor:
        """x [b, ..., h, w] to [b, outputs, rows, columns]."""
        kernel, bias = self.kernel.value.view(self.shape), self.bias.value.view(-1)
        y = self.geometry.of(x.flatten(1, -3), kernel, bias)
        if self.low is not None:
            self.low.add(y, x, self.geometry)
        return y

    def accumulate(self, dy: Tensor, x: Tensor | None) -> None:
        """Adds the gradients of kernels (x None: frozen) and bias, in the wide dtype. The kernels' values
        may be gone."""
        if x is not None and self.kernel.trains:
            dw = self.geometry.weight_gradient(dy, x.flatten(1, -3), self.shape)
            self.kernel.gradient.add_(dw.view(self.kernel.shape))
        if self.bias.trains:
            wide = self.bias.gradient.dtype
            self.bias.gradient.add_(dy.sum((0, 2, 3), dtype=wide).view(self.bias.shape))


class _Convolve(torch.autograd.Function):
    """Keeps its input, unless the kernels are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, entry: Tensor | None, layer: Convolution) -> Tensor:
        """All groups of this rank in one call."""
        ctx.save_for_backward(x if layer.keeps else None)
        ctx.layer, ctx.is_data, ctx.shape = layer, entry is not None, x.shape
        return layer.multiply(x).unflatten(1, layer.kernel.shape[:2])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The input's gradient at once, the kernels' as the schedule says."""
        (x,) = ctx.saved_tensors
        layer: Convolution = ctx.layer
        shape, low = layer.geometry, layer.low
        b, *channels, h, w = ctx.shape
        dy, dx = dy.flatten(1, 2), None
        kept = None if low is None else low.back(dy)
        if not ctx.is_data:
            kernel = layer.kernel.value.view(layer.shape)
            dx = shape.input_gradient(dy, kernel, (b, prod(channels), h, w)).view(ctx.shape)
            if low is not None and kept is not None:
                dx = dx + low.input_gradient(kept[0], shape, ctx.shape)
        if layer.kernel.trains or layer.bias.trains:
            layer.kernel.queue.add(layer.accumulate, dy, x)
        if low is not None and low.trains:
            low.a.queue.add(low.accumulate, dy, x, kept, shape)
        return dx, torch.empty(0) if ctx.is_data else None, None  # where the entry is: no device's

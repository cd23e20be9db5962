"""A convolution of the groups that a rank holds; its weight gradient straight into the unit's buffer.

    own groups    x [b, G, channels, h, w]      W [G, filters, channels, kh, kw]             each group alone
    whole input   x [b, S, channels, h, w]      W [G, filters, S, channels, kh, kw]          all S groups
    colors        x [b, colors, h, w]           W [G, filters, colors, kh, kw]

to [b, G, filters, rows, columns]. Nothing here communicates: what joins groups is a region before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from partita.parallel.units import Weight


@dataclass(frozen=True)
class Convolution:
    """kernel and bias of this rank's groups; `own`: a group sees its own channels alone."""

    kernel: Weight
    bias: Weight
    stride: int
    padding: int
    own: bool

    def __call__(self, x: Tensor, entry: Tensor | None = None) -> Tensor:
        """Convolves and adds the bias. `entry`: for data, an empty tensor where backward ends."""
        return _Convolve.apply(x, entry, self)  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        """How many run side by side."""
        return self.kernel.shape[0] if self.own else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernels as torch has them: [outputs, inputs, kh, kw]."""
        groups, filters, *inputs = self.kernel.shape
        return groups * filters, prod(inputs[:-2]), *inputs[-2:]

    def multiply(self, x: Tensor) -> Tensor:
        """x [b, inputs, h, w]."""
        kernel, bias = self.kernel.value.view(self.shape), self.bias.value.view(-1)
        return conv2d(x, kernel, bias, self.stride, self.padding, groups=self.groups)

    def input_gradient(self, dy: Tensor, shape: torch.Size) -> Tensor:
        """For dy [b, outputs, rows, columns] and an input of a shape."""
        like = dy.new_empty(1).expand(shape)
        return self._backward(dy, like, self.kernel.value.view(self.shape), [True, False, False])[0]

    def accumulate(self, dy: Tensor, x: Tensor | None) -> None:
        """Adds the gradients of kernels (x None: frozen) and bias, in the wide dtype. The kernels' values
        may be gone."""
        if x is not None:
            like = dy.new_empty(1).expand(self.shape)
            dw = self._backward(dy, x, like, [False, True, False])[1]
            self.kernel.gradient.add_(dw.view(self.kernel.shape))
        if self.bias.trains:
            wide = self.bias.gradient.dtype
            self.bias.gradient.add_(dy.sum((0, 2, 3), dtype=wide).view(self.bias.shape))

    def _backward(self, dy: Tensor, x: Tensor, kernel: Tensor, wanted: list[bool]) -> list[Tensor]:
        return torch.ops.aten.convolution_backward(
            dy, x, kernel, None, [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0],
            self.groups, wanted,
        )  # fmt: skip


class _Convolve(torch.autograd.Function):
    """Keeps its input, unless the kernels are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, entry: Tensor | None, layer: Convolution) -> Tensor:
        """All groups of this rank in one call."""
        ctx.save_for_backward(x if layer.kernel.trains else None)
        ctx.layer, ctx.is_data, ctx.shape = layer, entry is not None, x.shape
        y = layer.multiply(x.flatten(1, -3))
        return y.unflatten(1, layer.kernel.shape[:2])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The input's gradient at once, the kernels' as the schedule says."""
        (x,) = ctx.saved_tensors
        layer: Convolution = ctx.layer
        b, *channels, h, w = ctx.shape
        dy, dx = dy.flatten(1, 2), None
        if not ctx.is_data:
            dx = layer.input_gradient(dy, torch.Size([b, prod(channels), h, w])).view(ctx.shape)
        if x is not None or layer.bias.trains:
            layer.kernel.queue.add(layer.accumulate, dy, None if x is None else x.flatten(1, -3))
        return dx, dy.new_empty(0) if ctx.is_data else None, None

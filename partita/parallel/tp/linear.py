"""Column- and row-parallel linears (Shoeybi et al. 2019, sec. 3), the region fused with the matmul.

    column   x -[region]-> X,  y = X W.T    W [rows / tp, columns]    backward: dX = dy W, dW += dy.T X
    row      y = x W.T -[region]->          W [rows, columns / tp]    backward: dx = dY W, dW += dY.T x

Collectives run under the matmul that does not need them: the sum of dX under dW; the second gather of the
shard that was kept (sp) under dX. Weight gradients go straight into the unit's buffer, at once or in the W
of a split backward (deferred.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from partita.comm.protocol import Handle
from partita.parallel.kernels.chain import Link, call
from partita.parallel.lora import LowRank
from partita.parallel.regions import IDENTITY, Region, Tape
from partita.parallel.units import Matrix, Weight, matrices


@dataclass(frozen=True)
class Partly:
    """A replay that wants of linears side by side the first `rows` alone, while its tape is read."""

    tape: Tape
    rows: int


@dataclass(frozen=True)
class Column:
    """Column-parallel linears that read one tensor: q, k, v are one call, gate and up are one.

    [batch, seq or its share, columns] -> [batch, seq, sum of local rows]."""

    matrices: tuple[Matrix, ...]
    biases: tuple[Weight, ...]
    region: Region
    low: tuple[LowRank, ...] = ()
    replay: Partly | None = None

    @staticmethod
    def of(
        weights: Sequence[Weight],
        region: Region,
        biases: Sequence[Weight] = (),
        low: Sequence[LowRank] = (),
    ) -> Column:
        """Weights whose last dim is the input's; neighbours become one matmul."""
        return Column(tuple(matrices(weights)), tuple(biases), region, tuple(low))

    @property
    def trains(self) -> bool:
        """Whether some matrix has a gradient: only then x is kept."""
        return self.matrices[0].trains or any(m.trains for m in (*self.matrices, *self.low))

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is one matrix and nothing else."""
        alone = len(self.matrices) == 1 and not (self.low or self.biases or self.replay)
        return alone and self.region.kind == "identity"

    @property
    def link(self) -> Link:
        """It as a link of a chain."""
        return _Column, self

    def __call__(self, x: Tensor) -> Tensor:
        """Moves x by the region and multiplies."""
        return call(_Column, x, self)

    def begin(self) -> Column:
        """The same for one pass."""
        return replace(self, low=tuple(low.begin() for low in self.low)) if self.low else self

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., columns] by all matrices, biases added."""
        parts = [m.multiply(x) for m in self.matrices]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        for low in self.low:
            low.add(y, x)
        if self.biases:
            y += torch.cat([b.value.reshape(-1) for b in self.biases])
        return y

    def first(self, x: Tensor, rows: int) -> Tensor:
        """As `multiply`, of the first rows alone; the others are any."""
        y = x.new_empty(*x.shape[:-1], sum(m.shape[0] for m in self.matrices))
        at = 0
        for m in self.matrices:
            here = min(m.shape[0], rows - at)
            if here > 0:
                y[..., at : at + here] = m.product.forward(x, m.value[:here])
            at += m.shape[0]
        for low in self.low:
            if low.first < rows:
                low.add(y, x)
        if self.biases and rows:
            y += torch.cat([b.value.reshape(-1) for b in self.biases])
        return y

    def parts(self, dy: Tensor) -> Sequence[Tensor]:
        """dy [..., rows], matrix by matrix."""
        if len(self.matrices) == 1:
            return (dy,)
        return dy.split([m.shape[0] for m in self.matrices], -1)

    def accumulate(
        self,
        dy: Tensor,
        x: Tensor | None,
        whole: Handle | None,
        dhs: Sequence[tuple[tuple[Tensor, Tensor], ...]],
    ) -> None:
        """Adds the weight gradients of dy [..., rows] and x [..., columns], None where no matrix wants it;
        where x was moved by a gather, `whole` is that under way once more, or None: a W starts it itself."""
        dy = dy.reshape(-1, dy.shape[-1])
        if x is not None:
            if self.region.kind == "gather_from":
                x = (whole or self.region.start_forward(x)).wait()
            x = x.reshape(-1, x.shape[-1])
            for m, part in zip(self.matrices, self.parts(dy), strict=True):
                m.accumulate(part, x)
            for low, dh in zip(self.low, dhs, strict=True):
                low.accumulate(dy, x, dh)
        if self.biases:
            total = dy.sum(0, dtype=self.biases[0].gradient.dtype)
            sizes = [prod(b.shape) for b in self.biases]
            for b, part in zip(self.biases, total.split(sizes), strict=True):
                b.accumulate(part)


class _Column(torch.autograd.Function):
    """Keeps x as it came: the shard under sp; nothing where all matrices are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Column) -> Tensor:
        """Region, then matmul."""
        ctx.save_for_backward(x if layer.trains else None)
        if layer.is_plain:
            ctx.layer = layer
            return layer.matrices[0].multiply(x)
        ctx.layer = layer = layer.begin()
        part = layer.replay
        if part is None or not part.tape.reading:
            return layer.multiply(layer.region.forward(x))
        if part.rows:
            return layer.first(layer.region.forward(x), part.rows)
        shape = layer.region.shape_after(x.shape)[:-1]
        return x.new_empty(*shape, sum(m.shape[0] for m in layer.matrices))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        """The conjugate; sp gathers x again, for dW: under dX, or in a W of its own."""
        (x,) = ctx.saved_tensors
        layer: Column = ctx.layer
        if layer.is_plain:
            return _plain_back(layer.matrices[0], dy, x), None
        queue = layer.matrices[0].queue
        early = x is not None and layer.region.kind == "gather_from" and not queue.defers
        whole = layer.region.start_forward(x) if early else None
        parts = layer.parts(dy)
        dx = layer.matrices[0].back(parts[0])
        for part, m in zip(parts[1:], layer.matrices[1:], strict=True):
            dx += m.back(part)
        dhs = [low.back(dy, dx) for low in layer.low]
        under_way = layer.region.start_backward(dx)
        if x is not None or any(b.trains for b in layer.biases):
            queue.add(layer.accumulate, dy, x, whole, dhs)
        return under_way.wait(), None


@dataclass(frozen=True)
class Row:
    """A row-parallel linear: [batch, seq, local columns] -> [batch, seq or its share, rows]."""

    matrix: Matrix
    region: Region
    bias: Weight | None = None
    low: LowRank | None = None

    @staticmethod
    def of(
        weight: Weight, region: Region, bias: Weight | None = None, low: LowRank | None = None
    ) -> Row:
        """A weight whose first dim is the output's, the others folded into columns."""
        return Row(weight.matrix(columns=len(weight.shape) - 1), region, bias, low)

    @property
    def trains(self) -> bool:
        """Whether the matrix, or what is beside it, has a gradient: only then x is kept."""
        return self.matrix.trains or (self.low is not None and self.low.trains)

    def begin(self) -> Row:
        """The same for one pass."""
        return self if self.low is None else replace(self, low=self.low.begin())

    def multiply(self, x: Tensor) -> Tensor:
        """x [..., columns] by the matrix, before the region."""
        y = self.matrix.multiply(x)
        if self.low is not None:
            self.low.add(y, x)
        return y

    def links(self, replay: bool = False) -> list[Link]:
        """It, and the bias behind it, as links of a chain; `replay` as in a call."""
        bias: list[Link] = [] if self.bias is None else [(AddBias, self.bias)]
        return [(_Row, self, replay), *bias]

    def __call__(self, x: Tensor, replay: bool = False) -> Tensor:
        """Multiplies and moves; a bias comes after the sum. `replay`: backward only needs x kept, so
        neither the matmul nor its region runs, and the values are arbitrary."""
        y = call(_Row, x, self, replay)
        return y if self.bias is None else call(AddBias, y, self.bias)  # type: ignore[return-value]


class _Row(torch.autograd.Function):
    """Keeps x, unless all is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Row, replay: bool) -> Tensor:
        """Matmul, then region."""
        ctx.save_for_backward(x if layer.trains else None)
        ctx.layer = layer = layer.begin()
        if layer.region.is_known:
            return layer.region.forward(x)
        if replay:
            rows = layer.matrix.shape[0]
            return x.new_empty(layer.region.shape_after(torch.Size([*x.shape[:-1], rows])))
        return layer.region.forward(layer.multiply(x))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """The conjugate."""
        (x,) = ctx.saved_tensors
        layer: Row = ctx.layer
        dy = layer.region.backward(dy)
        if layer.low is None:
            return _plain_back(layer.matrix, dy, x), None, None
        dx = layer.matrix.back(dy)
        dh = layer.low.back(dy, dx)
        if x is not None:
            dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            layer.matrix.accumulate(dy, x)
            layer.matrix.queue.add(layer.low.accumulate, dy, x, dh)
        return dx, None, None


def _plain_back(matrix: Matrix, dy: Tensor, x: Tensor | None) -> Tensor:
    """dx of dy [..., rows]; a matrix that multiplied x [..., columns] gets its gradient, where x was kept."""
    dx = matrix.back(dy)
    if x is not None:
        matrix.accumulate(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]))
    return dx


class AddBias(torch.autograd.Function):
    """y + bias; the bias's gradient sums the tokens this rank holds."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Weight) -> Tensor:
        """Adds along the last dim."""
        ctx.bias = bias
        return y + bias.value

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        """Passes on."""
        if ctx.bias.trains:
            ctx.bias.accumulate(dy.reshape(-1, dy.shape[-1]).sum(0, dtype=ctx.bias.gradient.dtype))
        return dy, None


__all__ = ["IDENTITY", "AddBias", "Column", "Row"]

"""A layer for torch.compile (Ansel et al. 2024): what communicates or adds to a weight's gradient is one
opaque operator, so that the layer of any plan is one graph.

    layer = compiled(block, backend="aot_eager")
    y = layer(x, batch)

`compiled` copies the layer with operators in the place of its norms and linears, regions included, and
compiles what is between; the eager layer is untouched and pays nothing. An operator runs the eager
autograd.Function, so numbers and traffic are the eager layer's. It takes the layer's part as an opaque
object, an input of the graph: no table of handles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase

from partita.model.attention import Attention
from partita.model.mlp import MLP, SwiGLU
from partita.model.transformer import LayerBlock
from partita.parallel.sp.norm import Norm, _LayerNorm, _RMSNorm
from partita.parallel.tp.linear import AddBias, Column, Row, _Column, _Row

Shape = Callable[[Sequence[int]], list[int]]


class _Ctx:
    """What a Function keeps between forward and backward; `layer` (AddBias: `bias`) is its part."""

    def __init__(self, part: Any = None) -> None:
        self.layer = self.bias = part
        self.saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        """As torch's."""
        self.saved_tensors = tensors


class Bound(OpaqueBase):
    """An autograd.Function that keeps its input alone, bound to what it is given behind it."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.function, self.given = function, given

    def forward(self, x: Tensor) -> Tensor:
        """The Function's forward."""
        return self.function.forward(_Ctx(), x, *self.given)

    def backward(self, dy: Tensor, x: Tensor) -> Tensor:
        """The Function's backward from the input it kept."""
        ctx = _Ctx(*self.given[:1])
        ctx.save_for_backward(x)
        found = self.function.backward(ctx, dy)
        dx = found[0] if isinstance(found, tuple) else found
        return dx.clone() if dx is dy else dx  # an operator's result is its own


register_opaque_type(Bound, typ="reference")


@torch.library.custom_op("partita::layer", mutates_args=())
def _forward(x: Tensor, part: Bound, shape: Sequence[int]) -> Tensor:
    return part.forward(x)


@torch.library.custom_op("partita::layer_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, part: Bound) -> Tensor:
    return part.backward(dy, x)


@_forward.register_fake
def _(x: Tensor, part: Bound, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, part: Bound) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.part, _ = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    return _backward(dy, x, ctx.part), None, None


_forward.register_autograd(_gradient, setup_context=_keep)


@dataclass(frozen=True)
class Opaque:
    """One operator, and the one behind it: what a segment calls in the place of a norm or linear."""

    part: Bound
    shape: Shape
    behind: Opaque | None = None

    def __call__(self, x: Tensor, replay: bool = False) -> Tensor:
        """The layer's result; nothing of a compiled layer is replayed."""
        assert not replay
        y = _forward(x, self.part, self.shape(x.shape))
        return y if self.behind is None else self.behind(y)


@dataclass(frozen=True)
class _GatedMLP(MLP):
    """SwiGLU's backward writes into parts of a buffer, which dynamo does not trace."""

    def activate(self, h: Tensor) -> Tensor:
        """As one operator."""
        return Opaque(SWIGLU, lambda s: [*s[:-1], s[-1] // 2])(h)


SWIGLU = Bound(SwiGLU)


def compiled(block: LayerBlock, **options: Any) -> Callable[[Tensor, Any], Tensor]:
    """block.run as one graph of fixed sizes; `options` go to torch.compile. Sends what the block declares."""
    if block.recomputes or block.attention.remakes:
        raise ValueError("a layer that recomputes is not compiled: plan it with recompute:none")
    if block.now is not None:
        raise ValueError("a layer whose adapters drop is not compiled: set lora_dropout to 0")
    found, attention, mlp = copy(block), block.attention, block.mlp
    if not isinstance(attention, Attention) or not isinstance(mlp, MLP):
        raise ValueError("a layer with latent attention or experts is not compiled")
    norms = attention.qk_norms
    found.attention = replace(
        attention, norm=_norm(attention.norm), qkv=_column(attention.qkv), wo=_row(attention.wo),
        qk_norms=None if norms is None else (_norm(norms[0]), _norm(norms[1])),
    )  # fmt: skip
    parts: dict[str, Any] = {"norm": _norm(mlp.norm), "up": _column(mlp.up), "down": _row(mlp.down)}
    kind = _GatedMLP if mlp.gated else MLP
    found.mlp = kind(**parts, gated=mlp.gated, drop_residual=mlp.drop_residual, gelu=mlp.gelu)
    return torch.compile(found.run, fullgraph=True, dynamic=False, **options)


def _norm(norm: Norm) -> Any:
    return Opaque(Bound(_RMSNorm if norm.bias is None else _LayerNorm, norm), list)


def _column(column: Column) -> Any:
    rows = sum(m.value.shape[0] for m in column.matrices)
    return Opaque(Bound(_Column, column), _moved(column.region.shape_after, rows))


def _row(row: Row) -> Any:
    bias = None if row.bias is None else Opaque(Bound(AddBias, row.bias), list)
    moved = _moved(row.region.shape_after, row.matrix.value.shape[0])
    return Opaque(Bound(_Row, row, False), moved, bias)


def _moved(region: Callable[[torch.Size], torch.Size], rows: int) -> Shape:
    def shape(x: Sequence[int]) -> list[int]:
        return list(region(torch.Size([*x[:-1], rows])))

    return shape

"""A layer for torch.compile (Ansel et al. 2024): what communicates or adds to a weight's gradient is one
opaque operator, so that the layer of any plan is one graph.

    layer = compiled(block, backend="aot_eager")
    y = layer(x, batch)

`compiled` copies the layer with operators in the place of its norms and linears, regions included, and
compiles what is between; the eager layer is untouched and pays nothing. An operator runs the eager
autograd.Function, so numbers and traffic are the eager layer's. It takes the layer's part as an opaque
object, an input of the graph: no table of handles. So is the pass (which microbatch of which step) that
adapters draw masks for: another each call, of which backward has its forward's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase

from partita.model.attention import Attention
from partita.model.mlp import GATES, MLP
from partita.model.parallel_residual import Beside, Joined
from partita.model.post_norm import Behind
from partita.model.transformer import LayerBlock
from partita.parallel.kernels.chain import Kept
from partita.parallel.lora import Now
from partita.parallel.regions import Move
from partita.parallel.sp.norm import Norm, _LayerNorm, _RMSNorm
from partita.parallel.tp.linear import AddBias, Column, Row, _Column, _Row

Shape = Callable[[Sequence[int]], list[int]]


class Bound(OpaqueBase):
    """An autograd.Function that keeps its input alone, bound to what it is given behind it."""

    def __init__(self, function: Any, *given: Any) -> None:
        self.function, self.given = function, given

    def forward(self, x: Tensor, of: Pass) -> Tensor:
        """The Function's forward."""
        of.begin()
        y = self.function.forward(Kept(), x, *self.given)
        return y.clone() if y is x else y  # an operator's result is its own

    def backward(self, dy: Tensor, x: Tensor, of: Pass) -> Tensor:
        """The Function's backward from the input it kept."""
        of.begin()
        ctx, part, wanted = Kept(), self.given[0] if self.given else None, True
        if isinstance(part, Column | Row):
            part, wanted = part.begin(), part.trains
        ctx.layer = ctx.bias = ctx.region = part
        ctx.save_for_backward(x if wanted else None)
        found = self.function.backward(ctx, dy)
        dx = found[0] if isinstance(found, tuple) else found
        return dx.clone() if dx is dy else dx  # an operator's result is its own


class Pass(OpaqueBase):
    """What a layer computes on in one call, where its adapters drop; nothing else asks."""

    def __init__(self, now: Now | None = None, batch: Any = None, training: bool = False) -> None:
        self.now, self.batch, self.training = now, batch, training

    def begin(self) -> None:
        """From here on masks are this pass's."""
        if self.now is not None:
            self.now.batch, self.now.training = self.batch, self.training


register_opaque_type(Bound, typ="reference")
register_opaque_type(Pass, typ="reference")


@torch.library.custom_op("partita::layer", mutates_args=())
def _forward(x: Tensor, part: Bound, of: Pass, shape: Sequence[int]) -> Tensor:
    return part.forward(x, of)


@torch.library.custom_op("partita::layer_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, part: Bound, of: Pass) -> Tensor:
    return part.backward(dy, x, of)


@_forward.register_fake
def _(x: Tensor, part: Bound, of: Pass, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, part: Bound, of: Pass) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.part, ctx.of, _ = inputs
    ctx.save_for_backward(x)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    (x,) = ctx.saved_tensors
    return _backward(dy, x, ctx.part, ctx.of), None, None, None


_forward.register_autograd(_gradient, setup_context=_keep)


@dataclass
class Called:
    """The pass of a compiled layer."""

    now: Pass


@dataclass(frozen=True)
class Opaque:
    """One operator, and the one behind it: what a segment calls in the place of a norm or linear."""

    part: Bound
    called: Called
    shape: Shape
    behind: Opaque | None = None

    def __call__(self, x: Tensor, replay: bool = False) -> Tensor:
        """The layer's result; nothing of a compiled layer is replayed."""
        assert not replay
        y = _forward(x, self.part, self.called.now, self.shape(x.shape))
        return y if self.behind is None else self.behind(y)


@dataclass(frozen=True)
class _GatedMLP(MLP):
    """A gate's backward writes into parts of a buffer, which dynamo does not trace."""

    def activate(self, h: Tensor) -> Tensor:
        """As one operator."""
        return Opaque(BOUND[self.gate], ANY, lambda s: [*s[:-1], s[-1] // 2])(h)


BOUND = {name: Bound(function) for name, function in GATES.items()}
ANY = Called(Pass())


def compiled(block: LayerBlock, **options: Any) -> Callable[[Tensor, Any], Tensor]:
    """block.run as one graph of fixed sizes; `options` go to torch.compile. Sends what the block declares."""
    if block.recomputes or block.attention.remakes:
        raise ValueError("a layer that recomputes is not compiled: plan it with recompute:none")
    found, attention, mlp = copy(block), block.attention, block.mlp
    if not isinstance(attention, Attention) or not isinstance(mlp, MLP):
        raise ValueError("a layer with latent attention or experts is not compiled")
    if isinstance(block.beside, Behind):
        raise ValueError("a layer whose norms stand behind its sums is not compiled")
    assert attention.norm is not None and mlp.norm is not None
    make, norms = _Maker(Called(Pass())), attention.qk_norms
    found.attention = replace(
        attention, norm=make.norm(attention.norm), post_norm=make.norm(attention.post_norm),
        qkv=make.column(attention.qkv), wo=make.row(attention.wo),
        qk_norms=None if norms is None else (make.norm(norms[0]), make.norm(norms[1])), chained=False,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "norm": make.norm(mlp.norm), "post_norm": make.norm(mlp.post_norm),
        "up": make.column(mlp.up), "down": make.row(mlp.down),
    }  # fmt: skip
    kind = _GatedMLP if mlp.gated else MLP
    found.mlp = kind(
        **parts,
        gated=mlp.gated,
        drop_residual=mlp.drop_residual,
        gelu=mlp.gelu,
        gate=mlp.gate,
        chained=False,
    )
    if block.beside is not None:
        join = make.join(cast(Joined, block.beside.join))
        found.beside = Beside(found.attention, found.mlp, join)
    found.now = None
    graph = torch.compile(found.run, fullgraph=True, dynamic=False, **options)
    now, called = block.now, make.called

    def layer(x: Tensor, batch: Any) -> Tensor:
        found.training = block.training
        called.now = Pass(now, batch, block.training)
        return graph(x, batch)

    return layer


@dataclass(frozen=True)
class _Maker:
    """Operators of one layer."""

    called: Called

    def norm(self, norm: Norm | None) -> Any:
        if norm is None:
            return None
        part = Bound(_RMSNorm if norm.bias is None else _LayerNorm, norm)
        return Opaque(part, self.called, list)

    def column(self, column: Column) -> Any:
        rows = sum(m.value.shape[0] for m in column.matrices)
        shape = _moved(column.region.shape_after, rows)
        return Opaque(Bound(_Column, column), self.called, shape)

    def row(self, row: Row) -> Any:
        bias = None
        if row.bias is not None:
            bias = Opaque(Bound(AddBias, row.bias), self.called, list)
        moved = _moved(row.region.shape_after, row.matrix.value.shape[0])
        return Opaque(Bound(_Row, row, False), self.called, moved, bias)

    def join(self, joined: Joined) -> Callable[[Tensor, Tensor, bool], Tensor]:
        behind = None
        for bias in reversed(joined.biases):
            behind = Opaque(Bound(AddBias, bias), self.called, list, behind)
        moved = _moved(joined.region.shape_after, joined.biases[0].shape[-1])
        move = Opaque(Bound(Move, joined.region), self.called, moved, behind)
        return lambda a, b, replay: move(a + b, replay)


def _moved(region: Callable[[torch.Size], torch.Size], rows: int) -> Shape:
    def shape(x: Sequence[int]) -> list[int]:
        return list(region(torch.Size([*x[:-1], rows])))

    return shape

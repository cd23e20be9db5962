"""The parallel model: a `for` over blocks, a block a list of segments, built from the laid program.

Regions come by site from the laid block, weights from the units by name: nothing here knows a mesh.
Blocks are called as block(x, batch); `loss_scale`, `training` and, on the head, `total_valid` are set by
the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import gelu

from partita.comm.context import Context
from partita.model.attention import Attention
from partita.model.embedding import EmbeddingBlock
from partita.model.images import image_block
from partita.model.maker import Maker
from partita.model.mlp import MLP
from partita.model.moe import MoE
from partita.model.parallel_residual import Beside
from partita.model.post_norm import Behind
from partita.model.rope import tables
from partita.parallel.ep.log import RouterLog
from partita.parallel.kernels.chain import Segment, call
from partita.parallel.laid import Laid
from partita.parallel.pp.pieces import Flow, Live, Remade, run, within
from partita.parallel.recompute.replay import Began, Recomputed, read_again, written
from partita.parallel.tp.linear import IDENTITY, AddBias, Column
from partita.parallel.tp.loss import CrossEntropy
from partita.parallel.units import Unit, Weight
from partita.spec.model import ModelSpec


class LayerBlock:
    """x -> attention segment -> mlp segment, or experts in its place."""

    def __init__(
        self, make: Maker, rope: tuple[Tensor, Tensor] | None, future: Tensor | None
    ) -> None:
        self.training, self.loss_scale = True, 1.0
        spec = make.spec
        self.now = make.now if spec.lora_dropout else None
        gated = spec.family == "llama"
        self.beside: Beside | Behind | None = None  # both segments, where they are no two
        self.tables = tuple(t for t in (*(rope or ()), future) if t is not None)
        self.recomputes, self.tape = make.recomputes, make.regions.tape
        remakes = frozenset() if self.recomputes else make.again
        self.attention = make.attention(rope, future, remakes)
        self.log: RouterLog | None = None  # of its router
        if "chosen" in make.block.tensors:
            moe = make.moe(remakes)
            self.mlp, self.log = moe, moe.log
            return
        before = "attention.norm" if spec.post_norm else "mlp.norm"
        before = "attention.residual" if spec.norm_placement == "post" else before
        up, down = ("mlp.gate_up", "mlp.down") if gated else ("mlp.fc1", "mlp.fc2")
        self.mlp: MLP | MoE = MLP(
            None if spec.post_norm else make.norm_of("mlp.norm"),
            make.column(before, up),
            make.row(down),
            gated,
            make.dropout("mlp.residual", "mo_mask") if spec.dropout > 0 else None,
            remakes,
            spec.gelu,
            gate=spec.gate,
            post_norm=make.norm_of("mlp.post_norm"),
        )
        if spec.parallel_residual:
            self.beside = Beside(cast(Attention, self.attention), self.mlp, make.joined())
        elif spec.post_norm:
            norms = make.norm("attention.norm"), make.norm("mlp.norm")
            self.beside = Behind(cast(Attention, self.attention), self.mlp, norms, remakes)

    def __call__(self, x: Tensor, batch: Any) -> Tensor:
        """One layer, all at once."""
        recomputes = self.recomputes and torch.is_grad_enabled()
        return run(self.flow(x, batch)) if recomputes else self.run(x, batch)

    def flow(self, x: Tensor, batch: Any) -> Flow:
        """One layer, stopping where rows travel. Recomputed, it keeps x and what its tape keeps."""
        if self.recomputes and torch.is_grad_enabled():
            return (yield from self._recomputed(x, batch))
        return (yield from self._segments(x, batch))

    def _recomputed(self, x: Tensor, batch: Any) -> Flow:
        """In pieces where others run between them, or as a whole."""
        begins: Live = ()
        if isinstance(self.mlp, MoE):
            told: list[Any] = []
            remade = Remade(x, partial(self._again, batch, told))
            begins = yield remade
        if not begins:
            return Recomputed.apply(x, self, batch)  # type: ignore[return-value]
        brought: list[Tensor] = []
        around = partial(written, self.tape, brought, told)
        y = yield from within(self._segments(begins[0], batch), around)
        return Began.apply(begins[0], y, remade.begin, *brought)  # type: ignore[return-value]

    def _again(self, batch: Any, told: list[Any], saved: Live) -> tuple[Tensor, Flow]:
        """The replay of a microbatch from what its forward saved."""
        x, brought = saved[0].detach().requires_grad_(), list(saved[1:])
        around = partial(read_again, self.tape, brought, list(told))
        return x, within(self._segments(x, batch, True), around)

    def _segments(self, x: Tensor, batch: Any, replay: bool = False) -> Flow:
        """The segments in order, stopping where rows travel."""
        if not isinstance(self.mlp, MoE):
            return self.run(x, batch, replay)
        self._begin(batch)
        x = self.attention(x, batch, batch.step, self.training)
        return (yield from self.mlp.flow(x, batch, self.training, replay))

    def run(self, x: Tensor, batch: Any, replay: bool = False) -> Tensor:
        """The segments in order; `replay` leaves out what backward does not need."""
        self._begin(batch)
        if self.beside is not None:
            return self.beside(x, batch, batch.step, self.training, replay)
        x = self.attention(x, batch, batch.step, self.training)
        return self.mlp(x, batch, batch.step, self.training, replay)

    def segments(self, x: Tensor, batch: Any) -> Sequence[Segment]:
        """Both segments on x, or what has its shape, as links of one node that stops nowhere; none where they
        are not such."""
        attention, mlp = self.attention, self.mlp
        if self.recomputes or self.beside or type(attention) is not Attention:
            return ()
        self._begin(batch)
        if isinstance(mlp, MoE):
            found = attention.links(x, batch), mlp.links(batch, self.training)
        else:
            found = attention.links(x, batch), mlp.links()
        return found if all(found) else ()

    def _begin(self, batch: Any) -> None:
        if self.now is not None:
            self.now.batch, self.now.training = batch, self.training


class HeadBlock:
    """x -> this rank's share of the step's loss; `logits` alone for generation."""

    def __init__(self, make: Maker) -> None:
        self.training, self.total_valid, self.loss_scale = True, 1, 1.0
        table = "embedding.table" if make.spec.tied else "head.table"
        self.norm, self.cap = make.norm("head.norm"), make.spec.logit_softcap
        self.transform: Column | None = None
        biases: list[Weight] = []
        if make.spec.post_norm:
            self.transform = make.side_by_side(IDENTITY, "head.transform")
            biases = [make.weight("head.project_bias")]
        self.gelu = "tanh" if make.spec.gelu == "tanh" else "none"
        self.project = Column.of([make.weight(table)], make.regions.at("head.norm"), biases)
        first, rows = make.vocab_range(table)
        at = make.regions.at
        self.loss = CrossEntropy(first, rows, at("loss.max"), at("loss.sum"), at("loss.pick"))

    def logits(self, x: Tensor) -> Tensor:
        """[batch, seq, local vocab], padding included."""
        if self.transform is not None:
            x = gelu(self.transform(x), approximate=self.gelu)
        return self.capped(self.project(self.norm(x)))

    def capped(self, logits: Tensor) -> Tensor:
        """cap tanh(logits / cap), where the model has a cap."""
        return call(SoftCap, logits, self.cap) if self.cap else logits

    def __call__(self, x: Tensor, batch: Any) -> Tensor:
        """Sum of the valid tokens' losses over the step's valid tokens."""
        logits = self.logits(x)
        return self.loss(logits, batch.targets, batch.valid, self.total_valid, self.loss_scale)


class SoftCap(torch.autograd.Function):
    """cap tanh(x / cap) (Gemma 2, 2408.00118); keeps what it makes."""

    @staticmethod
    def forward(ctx, x: Tensor, cap: float) -> Tensor:
        """Elementwise."""
        y = (x / cap).tanh() * cap
        ctx.save_for_backward(y)
        ctx.cap = cap
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        """dy (1 - (y / cap)^2)."""
        (y,) = ctx.saved_tensors
        return dy * (1 - (y / ctx.cap).square()), None


def build_blocks(
    spec: ModelSpec, laid: Laid, place: int, context: Context, units: Sequence[Unit]
) -> dict[int, list[Any]]:
    """The blocks of each stage on a place of pp, in order, on views of its units."""
    weights = {n: w for unit in units for n, w in unit.weights().items()}
    ropes: dict[bool, tuple[Tensor, Tensor]] = {}  # by whether they are those of local_rope_theta
    if spec.rotates:
        for local in dict.fromkeys(map(spec.local_rope, range(spec.layers))):
            made = tables(spec, laid.request.laid_len, _dtype(units), local)
            ropes[local] = made[0].to(context.device), made[1].to(context.device)
    future = None
    if spec.dropout > 0 and spec.image is None:
        size = laid.request.laid_len
        future = torch.full((size, size), spec.causal, device=context.device).triu_(1)
    found: dict[int, list[Any]] = {}
    for s in laid.stages_of(place):
        row = found[s.index] = []
        for name, block in zip(s.names, s.blocks, strict=True):
            make = Maker(laid, name, block, context, weights)
            if spec.image is not None:
                row.append(image_block(make))
            elif name == "embedding":
                row.append(EmbeddingBlock(make))
            elif name == "head":
                row.append(HeadBlock(make))
            else:
                i = make.layer
                rope = ropes[spec.local_rope(i)] if spec.rotates_at(i) else None
                row.append(LayerBlock(make, rope, future))
    return found


def _dtype(units: Sequence[Unit]) -> torch.dtype:
    return units[0].working.dtype


__all__ = ["AddBias", "EmbeddingBlock", "HeadBlock", "LayerBlock", "build_blocks"]

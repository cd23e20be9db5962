"""What a block is made of: its weights by name, its regions by site, its segments, from the laid program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor

from partita.comm.context import Context
from partita.model.attention import Attention
from partita.model.core import Core, Explicit, Flash, SharedExplicit
from partita.model.dropout import Dropout, RowDropout
from partita.model.latent import LatentAttention
from partita.model.moe import MoE, Shared
from partita.model.parallel_residual import Joined
from partita.parallel.cp.alibi import slopes
from partita.parallel.cp.ring import SharedKeys
from partita.parallel.cp.tile import Capped, Scale, wide
from partita.parallel.cp.travel import Gather, Ring
from partita.parallel.cp.ulysses import Turned
from partita.parallel.ep.dispatch import Exchange
from partita.parallel.ep.experts import Grouped
from partita.parallel.ep.log import RouterLog
from partita.parallel.ep.router import Router
from partita.parallel.laid import Laid
from partita.parallel.lora import Drop, LowRank, Now
from partita.parallel.read import is_run_again, replayed
from partita.parallel.regions import Region, Regions, Unplayed
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import IDENTITY, Column, Partly, Row
from partita.parallel.units import Weight
from partita.spec.families.moe import capacity
from partita.spec.lora import GROUPS, A, B
from partita.spec.model import Latent, ModelSpec
from partita.spec.program import Block
from partita.spec.program import Tensor as Named


class Maker:
    """Hands one block its weights, regions and dropout sites."""

    def __init__(
        self, laid: Laid, name: str, block: Block, context: Context, weights: dict[str, Weight]
    ) -> None:
        self.laid, self.name, self.block, self.context = laid, name, block, context
        self.spec: ModelSpec = laid.request.model
        self.regions = Regions(block, name, context)
        self.now = Now()  # of adapters that drop
        self.again = frozenset(op.name for op in replayed(block))
        self.recomputes = is_run_again(block)
        self._weights = weights

    @property
    def layer(self) -> int:
        """The number of its layer, of a block that is one."""
        return int(self.name.rpartition(".")[2])

    def weight(self, name: str) -> Weight:
        """A weight by its name within the block."""
        return self._weights[self.laid.full_name(self.name, name)]

    def bias(self, name: str) -> Weight | None:
        """The bias beside a weight, where the block has one."""
        return self.weight(f"{name}_bias") if f"{name}_bias" in self.block.tensors else None

    def norm(self, name: str, eps: float | None = None) -> Norm:
        """A norm and its weights."""
        epsilon = self.spec.norm_eps if eps is None else eps
        return Norm.of(self.weight(name), self.bias(name), epsilon)

    def norm_of(self, name: str) -> Norm | None:
        """A norm, where the block has it."""
        return self.norm(name) if name in self.block.tensors else None

    def column(self, after: str, *names: str) -> Column:
        """Linears that read what `after` wrote."""
        return self.side_by_side(self.regions.at(after), *names)

    def side_by_side(self, region: Region, *names: str) -> Column:
        """Linears that read one tensor, behind a region."""
        biases = [b for n in names if (b := self.bias(n)) is not None]
        weights, low, rows = [self.weight(n) for n in names], [], 0
        for name, w in zip(names, weights, strict=True):
            low += [self.low_rank(name, rows)] if self.adapts(name) else []
            rows += prod(w.shape[:-1])
        return replace(Column.of(weights, region, biases, low), replay=self._partly(names, weights))

    def _partly(self, names: Sequence[str], weights: Sequence[Weight]) -> Partly | None:
        """How much of linears side by side a replay makes, where it is not all."""
        if not self.recomputes or all(n in self.again for n in names):
            return None
        each = [(n, prod(w.shape[:-1])) for n, w in zip(names, weights, strict=True)]
        while each and each[-1][0] not in self.again:
            each.pop()
        return Partly(self.regions.tape, sum(rows for _, rows in each))

    def unplayed(self, name: str) -> Unplayed | None:
        """An op that a replay leaves out; None where it runs it again, or nothing is replayed."""
        if not self.again or name in self.again:
            return None
        op = next(op for op in self.block.ops() if op.name == name)
        return Unplayed(self.regions.tape, self.recomputes and op.writes in self.block.kept)

    def row(self, name: str) -> Row:
        """A linear and the region behind it."""
        low = self.low_rank(name) if self.adapts(name) else None
        bias = None if self.spec.parallel_residual else self.bias(name)  # else behind the sum
        return Row.of(self.weight(name), self.regions.at(name), bias, low)

    def joined(self) -> Joined:
        """What adds up attention and mlp where they stand side by side."""
        biases = [self.bias(name) for name in ("attention.wo", "mlp.fc2")]
        return Joined(self.regions.at("mlp.join"), tuple(b for b in biases if b is not None))

    def adapts(self, name: str) -> bool:
        """Whether a linear has LoRA's A and B beside it."""
        return f"{name}{A}" in self.block.tensors

    def low_rank(self, name: str, first: int = 0) -> LowRank:
        """A linear's A and B; its rows begin at `first`."""
        found = self._low_rank(name, first)
        if not self.spec.lora_dropout:
            return found
        read = next(op.reads[0] for op in self.block.ops() if op.weights[:1] == (name,))
        masks = self.masks(f"{name}.lora", read, self.spec.lora_dropout)
        return replace(found, drop=Drop(masks, self.now))

    def _low_rank(self, name: str, first: int = 0) -> LowRank:
        dims = self.block.tensors[f"{name}{A}"].dims
        groups = prod(d.local(self.laid.sizes) for d in dims if d.name in GROUPS)
        a, b = self.weight(f"{name}{A}"), self.weight(f"{name}{B}")
        return LowRank.of(a, b, groups, self.spec.lora_scale, first)

    def dropout(self, site: str, mask: str) -> Dropout | None:
        """The site whose mask is the tensor `mask` of the block; its box is this rank's part."""
        return self.masks(site, mask, self.spec.dropout) if self.spec.dropout else None

    def masks(self, site: str, like: str, probability: float) -> Dropout:
        """Masks of the shape of a tensor of the block."""
        tensor = self.block.tensors[like]
        box = tuple(self._span(d) for d in tensor.dims[1:])
        laid = tuple(d.name in ("seq", "keys") for d in tensor.dims[1:])
        tokens, dims = self.laid.request.seq_len, zip(tensor.dims[1:], laid, strict=True)
        shape = tuple(tokens if of_tokens else d.size for d, of_tokens in dims)
        name = f"{self.name}.{site}"
        return Dropout(self.context.seed, name, probability, shape, box, laid)

    def core(self, future: Tensor | None, again: bool) -> Core:
        """Attention proper, by the regions the laid block has around it; `future` is the mask of
        explicit probabilities, which backward makes `again` or not."""
        window = self.spec.window_of(self.layer)
        tape = self.regions.tape if again else None
        drop = self.dropout("attention.core", "p_mask")
        own = self.spec.latent is not None or self.spec.query_scalar
        scale: Scale = self.spec.softmax_scale if own else None
        if self.spec.attention_softcap:
            scale = Capped(self.spec.softmax_scale, self.spec.attention_softcap)
        falls = self.slopes() if self.spec.alibi else None
        moves = self.regions.of("ring") or self.regions.of("all_gather")
        found: Core
        if moves:
            travel = (Ring if moves[0].kind == "ring" else Gather)(moves[0].comm)
            out = self.unplayed("attention.core")
            shared = SharedKeys(travel, (moves[0], moves[1]), scale, falls, out, window)
            found = shared if drop is None else SharedExplicit(shared, drop, tape)
        elif drop is None:
            found = Flash(window, scale, falls, self.spec.causal)
        else:
            assert future is not None
            found = Explicit(drop, future, window, tape, self.spec.causal)
        turns = self.regions.of("exchange")
        if not turns:
            return found
        back = self.unplayed("attention.core:exchange")
        return Turned(found, turns, back)  # type: ignore[arg-type]

    def slopes(self) -> Tensor:
        """ALiBi's, of the heads that the core sees here: behind exchanges, where there are any."""
        core = next(op for op in self.block.ops() if op.name == "attention.core")
        first, end = self._span(
            next(d for d in self.block.tensors[core.writes].dims if d.name == "heads")
        )
        dtype = wide(self.weight("attention.wq").unit.working.dtype)
        return slopes(self.spec.heads)[first:end].to(self.context.device, dtype)

    def attention(
        self, rope: tuple[Tensor, Tensor] | None, future: Tensor | None, remakes: frozenset[str]
    ) -> Attention | LatentAttention:
        """The attention segment of a layer."""
        spec = self.spec
        if spec.latent is not None:
            assert rope is not None
            return self._latent(spec.latent, rope, remakes)
        norms = None
        if spec.qk_norm:
            norms = self.norm("attention.q_norm"), self.norm("attention.k_norm")
        bare = spec.post_norm or spec.norm_placement == "post"
        before = "input" if bare else "attention.norm"
        return Attention(
            None if spec.post_norm else self.norm_of("attention.norm"),
            self.column(before, "attention.wq", "attention.wk", "attention.wv"),
            self.row("attention.wo"),
            self.local("q", "heads"),
            self.local("k", "kv_heads"),
            spec.head_dim,
            rope,
            self.places("q" if rope is None else "qr"),
            self.core(future, "attention.softmax" in remakes),
            self.dropout("attention.residual", "ao_mask"),
            remakes,
            norms,
            self.norm_of("attention.post_norm"),
        )

    def _latent(
        self, made: Latent, rope: tuple[Tensor, Tensor], remakes: frozenset[str]
    ) -> LatentAttention:
        names = ["attention.q_a"] * bool(made.q) + ["attention.kv_a", "attention.k_pe"]
        q_norm = self.norm("attention.q_norm", made.norm_eps) if made.q else None
        return LatentAttention(
            made, self.local("q", "heads"), self.norm("attention.norm"),
            self.side_by_side(IDENTITY, *names), q_norm,
            self.column("attention.q_norm" if made.q else "attention.norm", "attention.wq"),
            self.norm("attention.kv_norm", made.norm_eps),
            self.column("attention.kv_norm", "attention.wk", "attention.wv"),
            self.regions.at("attention.k_pe"), self.row("attention.wo"), rope, self.places("qr"),
            self.core(None, False), remakes,
        )  # fmt: skip

    def places(self, tensor: str) -> tuple[int, int]:
        """(first, end) of this rank's share of the laid sequence in a tensor."""
        return self.span(tensor, "seq")

    def span(self, tensor: str, dim: str) -> tuple[int, int]:
        """(first, end) of this rank's share of a dim of a tensor."""
        return self._span(next(d for d in self.block.tensors[tensor].dims if d.name == dim))

    def moe(self, remakes: frozenset[str]) -> MoE:
        """The experts of a layer, as the laid block has them."""
        spec, at = self.spec, self.regions.at
        bias = self.weight("router.balance_bias") if spec.router_bias else None
        microbatches = self.laid.request.plan.num_microbatches
        together = 1 if spec.balance_over == "sequence" else self.laid.samples // microbatches
        router = Router(
            spec, self.weight("router.gate").matrix(), bias, at("router.count"), self.laid.request.seq_len,
            self.laid.samples, RouterLog(spec.experts, self.context.where), together,
            self.places("chosen") if self.laid.request.laid_len > self.laid.request.seq_len else None,
        )  # fmt: skip
        exchange = Exchange(
            spec.experts, spec.top_k, at("dispatch.count"), at("dispatch.send"), at("dispatch.receive"),
            at("experts.down"), at("experts.back"), at("router.choose"),
            None if spec.capacity_factor is None else capacity(spec, self.laid.request.seq_len),
            self.laid.request.plan.expert.chunks, at("dispatch.mark"), at("dispatch.marked"),
            self.unplayed("dispatch.limit") if spec.capacity_factor is not None else None,
        )  # fmt: skip
        shared = None
        if spec.shared_experts:
            gate = [self.weight("shared.gate")] if spec.shared_gate else []
            shared = Shared(
                self.column("mlp.norm", "shared.gate_up"), self.row("shared.down"),
                Column.of(gate, IDENTITY) if gate else None,
            )  # fmt: skip
        up, down = self.grouped("experts.gate_up"), self.grouped("experts.down")
        norm, places = self.norm("mlp.norm"), self.places("chosen")
        return MoE(norm, router, exchange, up, down, shared, remakes, places)

    def grouped(self, name: str) -> Grouped:
        """A linear of every expert here."""
        found = self._grouped(name)
        return replace(found, unplayed=self.unplayed(name)) if self.recomputes else found

    def _grouped(self, name: str) -> Grouped:
        if not self.adapts(name):
            return Grouped.of(self.weight(name))
        if not self.spec.lora_dropout:
            return Grouped.of(self.weight(name), self._low_rank(name))
        w = self.block.tensors[name]
        expert, columns = w.dims[0], w.dims[-1]
        masks = RowDropout(
            self.context.seed, f"{self.name}.{name}.lora", self.spec.lora_dropout, self.laid.request.seq_len,
            columns.size, self._span(expert)[0], self._span(columns)[0], columns.local(self.laid.sizes),
        )  # fmt: skip
        return Grouped.of(self.weight(name), self._low_rank(name), masks)

    def _span(self, dim: Any) -> tuple[int, int]:
        size = dim.local(self.laid.sizes)
        place = 0
        for axis in dim.cut:
            place = place * self.laid.sizes[axis] + self.context.coords[axis]
        return place * size, (place + 1) * size

    def local(self, tensor: str, dim: str) -> int:
        """This rank's size of a dim."""
        found: Named = self.block.tensors[tensor]
        return next(d for d in found.dims if d.name == dim).local(self.laid.sizes)

    def vocab_range(self, table: str) -> tuple[int, int]:
        """(first id, real rows) of this rank's part of a table."""
        full = self.laid.full_name(self.name, table)
        pieces = self.laid.layouts[full].alone.pieces(self.laid.mesh, self.context.rank)
        rows = self.weight(table).shape[0]
        first = rows * self.context.coords["tp"]
        return first, sum(b - a for (a, b), *_ in (p.box for p in pieces))

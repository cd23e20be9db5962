"""One rank's part of a model that serves: its stage's blocks, as training builds them, over pages.

Weights are frozen units: no gradients, no masters, no optimizer states. Attention's cores and, where dp_shard
holds experts, the mlps are replaced; everything else, regions included, is what the laid program says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from partita.comm.context import Context, Named
from partita.comm.protocol import Comm, Key, Where, World
from partita.model.attention import Attention
from partita.model.core import Flash
from partita.model.latent import LatentAttention
from partita.model.moe import MoE
from partita.model.transformer import HeadBlock, LayerBlock, build_blocks
from partita.parallel.cp.tile import wide
from partita.parallel.laid import Laid, lay
from partita.parallel.room import Request
from partita.parallel.units import Unit, make_units
from partita.serve.latent import OverLatents
from partita.serve.paged import Paged, Step
from partita.serve.piece import Piece, Room
from partita.simulate.serving.kept import keeps_latents, kept_shapes

LANE = "serve"
STEP_S = 60.0  # a step takes no longer: 512 tokens of 7B on a core of 120 GFLOP/s
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip


class Weights(Protocol):
    """Where a model's weights come from; another process can be handed it."""

    def fill(self, laid: Laid, rank: int, units: Sequence[Unit]) -> None:
        """Puts into the units what the rank holds."""
        ...


@dataclass(frozen=True)
class Opening:
    """What every rank is given."""

    request: Request
    weights: Weights
    pages: int
    page_size: int
    device: str = "cpu"
    step_s: float = STEP_S  # that a rank waits for another

    @property
    def room(self) -> Room:
        """What pieces are held against."""
        spec = self.request.model
        longest = min(spec.max_seq_len, self.pages * self.page_size)
        return Room(spec.vocab, longest, self.pages, self.page_size)

    @property
    def ranks(self) -> int:
        """Of the plan."""
        return self.request.plan.world_size

    @property
    def answers(self) -> int:
        """The rank that has the logits: the first of the last stage."""
        mesh = lay(self.request).mesh
        last = self.request.plan.mesh.pp - 1
        return next(r for r in range(self.ranks) if mesh.coords(r)["pp"] == last)


class Part:
    """What one rank runs. Communicates what the laid program says of forward; on lane 'serve' the stage's
    input over pp, the logits over tp, and the tokens of experts over dp_shard."""

    def __init__(self, opening: Opening, world: World, where: Where | None = None) -> None:
        self.opening, self.laid = opening, lay(opening.request)
        self.context = _context(self.laid, world, where or Where(), torch.device(opening.device))
        self.dtype = DTYPES[opening.request.plan.precision.dtype]
        context, at = self.context, self.context.coords
        self.units = units = make_units(self.laid, context.rank, self.dtype, context.device)
        opening.weights.fill(self.laid, context.rank, units)
        blocks = build_blocks(opening.request.model, self.laid, at["pp"], context, units)
        self.blocks = [b for stage in blocks.values() for b in stage]
        for block in self.blocks:
            block.training = False
            if isinstance(block, LayerBlock):
                self._prepare(block)
        self.first, self.last = at["pp"] == 0, at["pp"] == self.laid.sizes["pp"] - 1
        self.ways = self.laid.sizes["tp"] if opening.request.plan.mesh.sp else 1
        self.pp = context.comm("pp", lane=LANE)
        self.number = 0

    def _prepare(self, block: LayerBlock) -> None:
        """Its attention over pages; experts of several ranks by shares of the tokens."""
        attention: Any = block.attention
        assert isinstance(attention, Attention | LatentAttention)
        assert isinstance(attention.core, Flash)
        opening = self.opening
        spec, many = opening.request.model, (opening.pages + 1, opening.page_size)
        keys, values = (
            torch.zeros(*many, *shape, dtype=self.dtype, device=self.context.device)
            for shape in kept_shapes(spec, self.laid)
        )
        if keeps_latents(spec):
            values = keys[..., : spec.latent.kv]  # type: ignore[union-attr]
        core = Paged.like(attention.core, keys, values)
        if keeps_latents(spec):
            block.attention = OverLatents(attention, core)  # type: ignore[assignment]
        else:
            block.attention = replace(attention, core=core)
        if block.beside is not None:
            block.beside = replace(block.beside, attention=block.attention)
        if isinstance(block.mlp, MoE) and self.laid.sizes["dp_shard"] > 1:
            block.mlp = Spread(block.mlp, self.context.comm("dp_shard", lane=LANE))  # type: ignore

    @torch.inference_mode()
    def run(self, pieces: Sequence[Piece]) -> Tensor | None:
        """One step; on the ranks of the last stage the logits [sum of want, vocab], fp32 or fp64."""
        number, self.number = self.number, self.number + 1
        opening = self.opening
        step = Step.of(
            pieces, opening.pages, opening.page_size, self.laid.request.laid_len, self.ways,
            self.context.device,
        )  # fmt: skip
        x = None if self.first else self._receive(step, number)
        body = self.blocks[:-1] if self.last else self.blocks
        for block in body:
            x = block(x, step)
        assert x is not None
        if self.last:
            return self._logits(x, step.wanted)
        to = self.context.coords["pp"] + 1
        self.pp.send(x, to, key=Key("F", to, number), site=f"stage {to - 1}:send").wait()
        return None

    def _receive(self, step: Step, number: int) -> Tensor:
        place, hidden = self.context.coords["pp"], self.opening.request.model.hidden
        like = torch.empty((), dtype=self.dtype, device=self.context.device)
        like = like.expand(1, step.ids.shape[1] // self.ways, hidden)
        key = Key("F", place, number)
        return self.pp.receive(like, place - 1, key=key, site=f"stage {place - 1}:send").wait()

    def _logits(self, x: Tensor, wanted: Tensor) -> Tensor:
        head: HeadBlock = self.blocks[-1]
        region = head.project.region
        if region.kind == "gather_from":  # wanted tokens may be another rank's
            x = region.forward(head.norm(x))[:, wanted]
        else:
            x = head.norm(x[:, wanted])
        logits = head.capped(head.project.multiply(x)[0])
        tp = self.context.comm("tp", lane=LANE)
        if tp.size > 1:
            logits = tp.all_gather(logits, site="head.logits", dim=-1)
        return logits[:, : self.opening.request.model.vocab].to(wide(logits.dtype))


@dataclass(frozen=True)
class Spread:
    """A layer's experts, on whose ranks of dp_shard all have the same tokens: each sends its share of them,
    and all are gathered."""

    moe: MoE
    comm: Comm

    def __call__(self, x: Tensor, batch: Any, *rest: Any) -> Tensor:
        """As MoE."""
        tokens, ways = x.shape[1], self.comm.size
        each = ceil(tokens / ways)
        filled = pad(x, (0, 0, 0, each * ways - tokens))
        mine = filled[:, self.comm.rank * each : (self.comm.rank + 1) * each]
        made = self.moe(mine.contiguous(), batch, *rest)
        return self.comm.all_gather(made, site="combine:gather", dim=1)[:, :tokens]


def _context(laid: Laid, world: World, where: Where, device: torch.device) -> Context:
    """With the groups that the laid program speaks on, and those of lane 'serve'."""
    own = [((axis,), LANE) for axis in ("pp", "tp", "dp_shard") if laid.sizes[axis] > 1]
    made = Context.create(
        laid.request.plan, laid.mesh, world, groups=[*laid.groups, *own], where=where,
        named=Named(laid.request.model.kv_heads, laid.pairs),
    )  # fmt: skip
    return replace(made, device=device)

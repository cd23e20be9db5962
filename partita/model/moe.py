"""The mlp of a layer with experts: norm, shared experts, router, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita.model.mlp import SwiGLU
from partita.parallel.ep.dispatch import Arrive, Combine, Dispatch, Exchange, Leave, Rows
from partita.parallel.ep.experts import Grouped
from partita.parallel.ep.log import RouterLog
from partita.parallel.ep.router import Router
from partita.parallel.pp.pieces import Flow, Live, run
from partita.parallel.recompute.replay import made_again
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import Column, Row


class Weigh(torch.autograd.Function):
    """x * sigmoid(gate), gate [..., 1] a number a token; keeps both."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor) -> Tensor:
        """Weighs."""
        ctx.save_for_backward(x, gate)
        return x * gate.sigmoid()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients."""
        x, gate = ctx.saved_tensors
        s = gate.sigmoid()
        return dy * s, (dy * x).sum(-1, keepdim=True) * s * (1 - s)


@dataclass(frozen=True)
class Shared:
    """Shared experts: one dense SwiGLU; `gate` weighs what it makes (Qwen2-MoE)."""

    up: Column
    down: Row
    gate: Column | None = None

    def start(self, n: Tensor) -> tuple[Tensor, Tensor | None]:
        """What reads the normalised n: up's output and the gate's."""
        return self.up(n), None if self.gate is None else self.gate(n)

    def finish(
        self, started: tuple[Tensor, Tensor | None], remakes: frozenset[str], replay: bool
    ) -> Tensor:
        """What every token is given besides its experts."""
        h, gate = started
        a = SwiGLU.apply(h)
        # a gate's gradient wants what down makes: then nothing is left out of a replay
        with made_again(a, lambda: SwiGLU.apply(h), "shared.act" in remakes):  # type: ignore[arg-type]
            y = self.down(a, replay and gate is None)  # type: ignore[arg-type]
        return y if gate is None else Weigh.apply(y, gate)  # type: ignore[return-value]


@dataclass(frozen=True)
class MoE:
    """x + combine(experts(dispatch(norm(x)))) + shared(norm(x))."""

    norm: Norm
    router: Router
    exchange: Exchange
    gate_up: Grouped
    down: Grouped
    shared: Shared | None
    remakes: frozenset[str] = frozenset()  # ops that backward runs again
    places: tuple[int, int] = (0, 0)  # of the laid sequence, that this rank has

    @property
    def log(self) -> RouterLog:
        """What the router did this step."""
        return self.router.log

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """x and what the experts add; `replay`: only what backward needs is made."""
        return run(self.flow(x, batch, training, replay))

    def flow(self, x: Tensor, batch: Any, training: bool, replay: bool = False) -> Flow:
        """The same, stopping when rows have left for their experts, and when they have left these."""
        records = training and not replay
        n = self.norm(x)
        with made_again(n, lambda: self.norm(x), "mlp.norm" in self.remakes):
            started = None if self.shared is None else self.shared.start(n)
            logits = self.router.logits(n)
        y = None
        if self.shared is not None and started is not None:
            y = self.shared.finish(started, self.remakes, replay)
        gates, chosen = self.router(logits, records)
        positions = None if batch.split is None else batch.split.tokens.positions
        chunks = self.exchange.plan(chosen, positions)
        if records:
            self.log.rows(chosen, [n for rows in chunks for n in rows.sent])
        if training and (self.gate_up.masks or self.down.masks):
            chunks = self.marked(chunks, batch)
        stays = (x,) if y is None else (x, y)
        routed, *stay = yield from self.experts(n.flatten(0, 1), gates.flatten(0, 1), chunks, stays)
        x, *shared = stay
        return x + sum(shared, routed.view(x.shape))

    def marked(self, chunks: Sequence[Rows], batch: Any) -> list[Rows]:
        """The chunks, of whose rows this rank's experts know the tokens."""
        first, end = self.places
        if batch.split is None:
            at = torch.arange(first, end, device=batch.samples.device).unsqueeze(0)
        else:
            at = batch.split.tokens.positions[:, first:end]
        tokens = (batch.samples.unsqueeze(1) * self.router.seq_len + at).flatten()
        each = zip(chunks, tokens.split([rows.tokens for rows in chunks]), strict=True)
        return [rows.marked(batch.step, mine) for rows, mine in each]

    def experts(
        self, x: Tensor, gates: Tensor, chunks: Sequence[Rows], stays: Live = ()
    ) -> Generator[Live, Live, Live]:
        """What experts add to tokens [tokens, hidden] of gates [tokens, top_k], and what `stays` meanwhile:
        all chunks leave at once, and while one is computed on, others come and go."""
        sizes = [rows.tokens for rows in chunks]
        each = zip(x.split(sizes), chunks, strict=True)
        travel = [Dispatch.apply(part, rows) for part, rows in each]
        gates, *live = yield (gates, *travel, *stays)  # type: ignore[misc]
        travel, stays = live[: len(chunks)], tuple(live[len(chunks) :])
        travel = [self.compute(x, rows) for x, rows in zip(travel, chunks, strict=True)]  # type: ignore
        gates, *live = yield (gates, *travel, *stays)
        travel, stays = live[: len(chunks)], tuple(live[len(chunks) :])
        weights = gates.split(sizes)
        parts = [Combine.apply(*of) for of in zip(travel, weights, chunks, strict=True)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts), *stays)  # type: ignore

    def compute(self, coming: Tensor, rows: Rows) -> Tensor:
        """The experts of one chunk, from its arrival until it leaves."""
        h = self.gate_up(Arrive.apply(coming, rows), rows.counts, rows.marks)  # type: ignore
        a = SwiGLU.apply(h)
        with made_again(a, lambda: SwiGLU.apply(h), "experts.act" in self.remakes):  # type: ignore[arg-type]
            made = self.down(a, rows.counts, rows.marks)  # type: ignore[arg-type]
        return Leave.apply(made, rows)  # type: ignore[return-value]

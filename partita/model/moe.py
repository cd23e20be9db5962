"""The mlp of a layer with experts: norm, shared experts, router, dispatch, experts, combine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita.model.mlp import SwiGLU
from partita.parallel.ep.dispatch import Arrive, Combine, Dispatch, Exchange, Leave, Rows
from partita.parallel.ep.experts import Grouped, Multiply
from partita.parallel.ep.log import RouterLog
from partita.parallel.ep.router import Gate, Route, Router
from partita.parallel.kernels.chain import Link, Residual, Segment, Steps
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
        links = self.links(batch, training, replay)
        if links and torch.is_grad_enabled():
            return Residual.apply(x, links)  # type: ignore[return-value]
        return run(self.flow(x, batch, training, replay))

    def links(self, batch: Any, training: bool, replay: bool = False) -> Segment:
        """All of it as one link of a chain, which stops nowhere; none where it cannot be one."""
        if type(self) is not MoE or self.remakes or self.exchange.chunks > 1:
            return ()
        if training and (self.gate_up.masks or self.down.masks):
            return ()
        positions = None if batch.split is None else batch.split.tokens.positions
        return ((_Whole, self, positions, training and not replay, replay),)

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
        positions = None if batch.split is None else batch.split.tokens.positions
        real = self.router.real(positions, x.device)
        gates, chosen = self.router(logits, records, real)
        chunks = self.exchange.plan(chosen, positions, real)
        if records:
            self.log.rows(chosen, [rows.leaving for rows in chunks], real)
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

    def through(self, steps: Steps, x: Tensor, rows: Rows) -> Tensor:
        """Tokens to their experts, which compute, until their rows leave; step by step of one node."""
        coming = steps.run(Dispatch, x, rows)
        counts, none = rows.counts, (0, None)  # no adapter drops
        h = steps.run(Multiply, steps.run(Arrive, coming, rows), self.gate_up, counts, *none)
        a = steps.run(SwiGLU, h)
        del h
        return steps.run(Leave, steps.run(Multiply, a, self.down, counts, *none), rows)

    def back_through(self, steps: Steps, travelling: Tensor) -> Tensor:
        """The gradient of `through`'s tokens."""
        drows = steps.back(travelling)[0]  # Leave
        drows = steps.back(drows)[0]
        drows = steps.back(drows)  # SwiGLU
        drows = steps.back(drows)[0]
        travelling = steps.back(drows)[0]  # Arrive
        return steps.back(travelling)[0]

    def compute(self, coming: Tensor, rows: Rows) -> Tensor:
        """The experts of one chunk, from its arrival until it leaves."""
        h = self.gate_up(Arrive.apply(coming, rows), rows.counts, rows.marks)  # type: ignore
        a = SwiGLU.apply(h)
        with made_again(a, lambda: SwiGLU.apply(h), "experts.act" in self.remakes):  # type: ignore[arg-type]
            made = self.down(a, rows.counts, rows.marks)  # type: ignore[arg-type]
        return Leave.apply(made, rows)  # type: ignore[return-value]


class _Whole(torch.autograd.Function):
    """What a layer with experts adds to x, of functions that stand in no row, as one: each keeps what it
    keeps by itself."""

    @staticmethod
    def forward(
        ctx, x: Tensor, moe: MoE, positions: Tensor | None, records: bool, replay: bool
    ) -> Tensor:
        """As MoE.flow, of one chunk."""
        steps, shared, y = Steps(), moe.shared, None
        kind, norm = moe.norm.link
        n = steps.run(kind, x, norm)
        h = gate = None
        if shared is not None:
            h = steps.run(*_on(n, shared.up.link))
            gate = None if shared.gate is None else steps.run(*_on(n, shared.gate.link))
        logits = steps.run(Gate, n, moe.router)
        if shared is not None:
            y, h = steps.run(SwiGLU, h), None
            for link in shared.down.links(replay and gate is None):
                y = steps.run(*_on(y, link))
            y = y if gate is None else steps.run(Weigh, y, gate)
        real = moe.router.real(positions, x.device)
        gates, chosen = steps.run(Route, logits, moe.router, records, real)
        (rows,) = moe.exchange.plan(chosen, positions, real)
        if records:
            moe.log.rows(chosen, [rows.leaving], real)
        routed = moe.through(steps, n.flatten(0, 1), rows)
        out = steps.run(Combine, routed, gates.flatten(0, 1), rows).view(x.shape)
        steps.keep(ctx)
        ctx.moe, ctx.shape = moe, gates.shape
        return out if y is None else out.add_(y)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """From the last function to the first; gradients of what the norm made are added up in one."""
        steps, moe = Steps.of(ctx), ctx.moe
        shared: Shared | None = moe.shared
        travelling, dgates, _ = steps.back(dy.flatten(0, 1))
        dn = moe.back_through(steps, travelling).view(dy.shape)
        dlogits, *_ = steps.back(dgates.view(ctx.shape), None)
        dh = dgate = None
        if shared is not None:
            dh = dy
            if shared.gate is not None:
                dh, dgate = steps.back(dh)
            for _ in shared.down.links():
                dh, *_ = steps.back(dh)
            dh = steps.back(dh)
        dn.add_(steps.back(dlogits)[0])
        if dgate is not None:
            dn.add_(steps.back(dgate)[0])
        if dh is not None:
            dn.add_(steps.back(dh)[0])
        return steps.back(dn)[0], None, None, None, None


def _on(x: Tensor, link: Link) -> tuple[Any, ...]:
    function, *given = link
    return function, x, *given

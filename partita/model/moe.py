"""The mlp of a layer with experts: norm, shared experts, router, dispatch, experts, combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partita.model.mlp import SwiGLU
from partita.parallel.ep.dispatch import Combine, Dispatch, Exchange
from partita.parallel.ep.experts import Grouped
from partita.parallel.ep.log import RouterLog
from partita.parallel.ep.router import Router
from partita.parallel.recompute.replay import made_again
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import Column, Row


@dataclass(frozen=True)
class Shared:
    """Shared experts: one dense SwiGLU."""

    up: Column
    down: Row

    def finish(self, h: Tensor, remakes: frozenset[str], replay: bool) -> Tensor:
        """What every token is given besides its experts; `h` is up's."""
        a = SwiGLU.apply(h)
        with made_again(a, lambda: SwiGLU.apply(h), "shared.act" in remakes):  # type: ignore[arg-type]
            return self.down(a, replay)  # type: ignore[arg-type]


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

    @property
    def log(self) -> RouterLog:
        """What the router did this step."""
        return self.router.log

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """x and what the experts add; `replay`: only what backward needs is made."""
        records = training and not replay
        n = self.norm(x)
        with made_again(n, lambda: self.norm(x), "mlp.norm" in self.remakes):
            up = None if self.shared is None else self.shared.up(n)
            logits = self.router.logits(n)
        y = None
        if self.shared is not None and up is not None:
            y = self.shared.finish(up, self.remakes, replay)
        gates, chosen = self.router(logits, records)
        rows = self.exchange.plan(chosen)
        if records:
            self.log.rows(chosen, rows.sent)
        h = self.gate_up(Dispatch.apply(n, rows), rows.counts)  # type: ignore[arg-type]
        a = SwiGLU.apply(h)
        with made_again(a, lambda: SwiGLU.apply(h), "experts.act" in self.remakes):  # type: ignore[arg-type]
            made = self.down(a, rows.counts)  # type: ignore[arg-type]
        routed = Combine.apply(made, gates, rows)
        return x + (routed if y is None else routed + y)  # type: ignore[operator, return-value]

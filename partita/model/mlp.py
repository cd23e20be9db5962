"""The mlp segment of a layer: norm, up projection, activation, down projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from partita.model.dropout import Dropout
from partita.parallel.recompute.replay import made_again
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import Column, Row


@dataclass(frozen=True)
class MLP:
    """norm -> up -> SwiGLU (gate and up in one matmul) or GELU -> down, added to x."""

    norm: Norm
    up: Column
    down: Row
    gated: bool
    drop_residual: Dropout | None = None
    remakes: frozenset[str] = frozenset()  # ops that backward runs again

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """x + mlp(norm(x)); `replay`: only what backward needs is made (see Row)."""
        n = self.norm(x)
        with made_again(n, lambda: self.norm(x), "mlp.norm" in self.remakes):
            h = self.up(n)
        a = self.activate(h)
        with made_again(a, lambda: self.activate(h), "mlp.act" in self.remakes):
            y = self.down(a, replay)
        if self.drop_residual is not None and training:
            y = self.drop_residual(y, step, batch)
        return x + y

    def activate(self, h: Tensor) -> Tensor:
        """SwiGLU of (gate, up), or GELU."""
        return SwiGLU.apply(h) if self.gated else gelu(h, approximate="tanh")  # type: ignore[return-value]


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., (gate, up)] (Shazeer 2020); keeps its input alone."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        """Half the width."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        """Both halves into one buffer."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        torch.ops.aten.silu.out(gate, out=d_up)
        d_up.mul_(dy)
        torch.mul(dy, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return out

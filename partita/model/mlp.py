"""The mlp segment of a layer: norm, up projection, activation, down projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from partita.comm.random.triton_kernels import Kernels
from partita.model.dropout import Dropout
from partita.parallel.kernels.chain import Residual, Segment, call
from partita.parallel.recompute.replay import made_again
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import Column, Row
from partita.spec.program import NARROW

KERNELS = Kernels("partita.parallel.kernels.rows_gpu")


@dataclass(frozen=True)
class MLP:
    """norm -> up -> SwiGLU, GeGLU (gate and up in one matmul) or GELU -> down, added to x. `post_norm` stands
    behind it, with a norm before it or alone."""

    norm: Norm | None  # None: x comes normalised (post_norm.py)
    up: Column
    down: Row
    gated: bool
    drop_residual: Dropout | None = None
    remakes: frozenset[str] = frozenset()  # ops that backward runs again
    gelu: Literal["tanh", "erf"] = "tanh"
    chained: bool = True  # one node of autograd, where its parts allow it
    gate: Literal["silu", "gelu"] = "silu"
    post_norm: Norm | None = None

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """x + mlp(norm(x)); `replay`: only what backward needs is made (see Row)."""
        links = self.links(replay)
        if links:
            return call(Residual, x, links)  # type: ignore[return-value]
        return x + self.made(x, batch, step, training, replay)

    def links(self, replay: bool = False) -> Segment:
        """All of it as links of one node; none where it cannot be one."""
        whole = self.gated and self.drop_residual is None and not self.remakes
        if not (self.chained and whole) or self.norm is None or self.post_norm is not None:
            return ()
        return self.norm.link, self.up.link, (GATES[self.gate],), *self.down.links(replay)

    def made(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """mlp(norm(x))."""
        norm = self.norm
        if norm is None:
            h = self.up(x)
        else:
            n = norm(x)
            with made_again(n, lambda: norm(x), "mlp.norm" in self.remakes):
                h = self.up(n)
        a = self.activate(h)
        with made_again(a, lambda: self.activate(h), "mlp.act" in self.remakes):
            y = self.down(a, replay and self.post_norm is None)  # which keeps what it reads
        if self.post_norm is not None:
            y = self.post_norm(y)
        if self.drop_residual is not None and training:
            y = self.drop_residual(y, step, batch)
        return y

    def activate(self, h: Tensor) -> Tensor:
        """SwiGLU or GeGLU of (gate, up), or GELU."""
        if self.gated:
            return call(GATES[self.gate], h)  # type: ignore[return-value]
        return gelu(h, approximate="tanh" if self.gelu == "tanh" else "none")


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [..., (gate, up)] (Shazeer 2020); keeps its input alone."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        """Half the width."""
        ctx.save_for_backward(gate_up)
        if (y := KERNELS(gate_up, "gate", gate_up)) is not None:
            return y
        gate, up = gate_up.chunk(2, -1)
        return silu(_packed(gate)).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        """Both halves into one buffer."""
        (gate_up,) = ctx.saved_tensors
        if (made := KERNELS(gate_up, "gate_back", gate_up, dy)) is not None:
            return made
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        if gate.shape[-1] < NARROW:
            packed = _packed(gate)
            d_up.copy_(silu(packed).mul_(dy))
            d_gate.copy_(torch.ops.aten.silu_backward(dy * up, packed))
            return out
        torch.ops.aten.silu.out(gate, out=d_up)
        d_up.mul_(dy)
        torch.mul(dy, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return out


class GeGLU(torch.autograd.Function):
    """gelu(gate) * up of [..., (gate, up)], tanh's GELU (Shazeer 2020); keeps its input alone."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        """Half the width."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return gelu(_packed(gate), approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        """Both halves into one buffer."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out, packed = torch.empty_like(gate_up), _packed(gate)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(gelu(packed, approximate="tanh"), dy, out=d_up)
        d_gate.copy_(torch.ops.aten.gelu_backward(dy * up, packed, approximate="tanh"))
        return out


GATES = {"silu": SwiGLU, "gelu": GeGLU}


def _packed(half: Tensor) -> Tensor:
    """Narrow rows side by side."""
    return half.contiguous() if half.shape[-1] < NARROW else half

"""RMSNorm and LayerNorm on the tokens a rank holds; their weight gradients are then partial over tp, and
are summed once a step with their unit. Statistics in fp32 (fp64 under fp64). Keeps x alone. A split
backward makes the [hidden] gradients with dx, from the same statistics, and adds them in its W. RMSNorm of
16 bits on a GPU is one kernel each way (parallel/kernels/rows_gpu.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partita.comm.random.triton_kernels import Kernels
from partita.parallel.kernels.chain import Link, call
from partita.parallel.units import Weight

KERNELS = Kernels("partita.parallel.kernels.rows_gpu")


@dataclass(frozen=True)
class Norm:
    """RMSNorm (Zhang and Sennrich 2019), or LayerNorm where there is a bias. [..., hidden] -> same."""

    weight: Weight
    bias: Weight | None
    epsilon: float
    least: Tensor  # epsilon as a number of the wide dtype where the weights lie

    @staticmethod
    def of(weight: Weight, bias: Weight | None, epsilon: float) -> Norm:
        """With what its kernels are given."""
        like = weight.value
        return Norm(weight, bias, epsilon, like.new_full((), epsilon, dtype=_wide(like).dtype))

    @property
    def link(self) -> Link:
        """It as a link of a chain."""
        return (_RMSNorm if self.bias is None else _LayerNorm), self

    def __call__(self, x: Tensor) -> Tensor:
        """Normalises over the last dim."""
        kind, layer = self.link
        return call(kind, x, layer)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _like(made: Tensor, x: Tensor) -> Tensor:
    """`made` in x's dtype; a call that changes nothing takes as long as a kernel of a small layer."""
    return made if made.dtype == x.dtype else made.to(x.dtype)


def _scale(x: Tensor, least: Tensor) -> Tensor:
    """1 / rms over the last dim, kept as a dim of 1; `least` is epsilon. A number that a kernel is given as
    such costs nothing, where one that is added or divided by is made a tensor first."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one pass, where squares are two
    return torch.addcmul(least, length, length, value=1 / x.shape[-1]).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    """y = cast(x / rms(x)) * weight."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Norm) -> Tensor:
        """Normalises in the wide dtype, scales in x's."""
        ctx.save_for_backward(x)
        ctx.layer = layer
        made = KERNELS(x, "norm", x, layer.weight.value, layer.epsilon)
        if made is not None:
            return made
        wide = _wide(x)
        unit = _like(wide * _scale(wide, layer.least), x)
        return unit.mul_(layer.weight.value)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        """Makes the statistics again from x."""
        (x,) = ctx.saved_tensors
        layer: Norm = ctx.layer
        made = KERNELS(x, "norm_back", x, layer.weight.value, dy, layer.epsilon)
        if made is not None:
            if layer.weight.trains:
                layer.weight.accumulate(made[1])
            return made[0], None
        wide, w = _wide(x), layer.weight.value
        scale = _scale(wide, layer.least)
        unit = wide * scale
        hidden = x.shape[-1]
        slope = (_wide(dy) * _like(unit, x)).reshape(-1, hidden)
        if layer.weight.trains:
            layer.weight.accumulate(slope.sum(0))
        along = slope.mv(_wide(w)).view(scale.shape)  # sum of dy w unit, a token
        dx = _wide(dy * w).addcmul_(unit, along, value=-1 / hidden).mul_(scale)
        return _like(dx, x), None


class _LayerNorm(torch.autograd.Function):
    """torch's kernels with the statistics made again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Norm) -> Tensor:
        """(x - mean) / std * weight + bias."""
        assert layer.bias is not None
        ctx.save_for_backward(x)
        ctx.layer = layer
        wide, w, b = _wide(x), _wide(layer.weight.value), _wide(layer.bias.value)
        y, _, _ = torch.native_layer_norm(wide, [x.shape[-1]], w, b, layer.epsilon)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        """One native kernel for all gradients that are wanted."""
        (x,) = ctx.saved_tensors
        layer: Norm = ctx.layer
        assert layer.bias is not None
        wide, w, b = _wide(x), _wide(layer.weight.value), _wide(layer.bias.value)
        shape = [x.shape[-1]]
        _, mean, rstd = torch.native_layer_norm(wide, shape, w, b, layer.epsilon)
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(
            _wide(dy).contiguous(),
            wide,
            shape,
            mean,
            rstd,
            w,
            b,
            [True, layer.weight.trains, layer.bias.trains],
        )
        if layer.weight.trains:
            layer.weight.accumulate(dw)
        if layer.bias.trains:
            layer.bias.accumulate(db)
        return dx.to(x.dtype), None

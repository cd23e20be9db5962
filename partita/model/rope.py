"""Rotary positions (Su et al. 2021), halves rotated as in Llama; linear, llama3's and YaRN's scaling.

    [a, b] at position p  ->  [a cos - b sin, b cos + a sin],  angle = p * theta^(-2 i / rope_dim)

Of a head that is wider than rope_dim the first rope_dim numbers are turned (GPT-NeoX).
Positions are global: tables are made for the whole sequence, whatever cuts it. Applying them keeps nothing
but the tables, since the backward is the rotation the other way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from partita.spec.model import ModelSpec, RopeScaling

VECTOR = 32  # 16-bit numbers: rows of fewer are added up one by one on a CPU, twenty times slower


def frequencies(spec: ModelSpec, local: bool = False) -> Tensor:
    """[rope_dim / 2] angles a position, fp64; `local`: those of local_rope_theta."""
    steps = torch.arange(0, spec.rope_dim, 2, dtype=torch.float64) / spec.rope_dim
    if local:
        return 1.0 / spec.local_rope_theta**steps
    found = 1.0 / spec.rope_theta**steps
    scaling = spec.rope_scaling
    if scaling is None:
        return found
    if scaling.kind == "linear":
        return found / scaling.factor
    if scaling.kind == "yarn":
        return _yarn(spec, scaling, found)
    length = 2 * math.pi / found
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_seq_len / length - scaling.low_freq_factor) / span
    between = (1 - smooth) * found / scaling.factor + smooth * found
    out = torch.where(length > low, found / scaling.factor, found)
    return torch.where((length <= low) & (length >= high), between, out)


def _yarn(spec: ModelSpec, scaling: RopeScaling, plain: Tensor) -> Tensor:
    """Frequencies that turn often stay, slow ones are divided by the factor, a ramp between (2309.00071,
    eq. 23)."""

    def dim(turns: float) -> float:
        ratio = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return spec.rope_dim * math.log(ratio) / (2 * math.log(spec.rope_theta))

    low = max(math.floor(dim(scaling.beta_fast)), 0)
    high = min(math.ceil(dim(scaling.beta_slow)), spec.rope_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(len(plain), dtype=torch.float64) - low) / width).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def tables(
    spec: ModelSpec, seq_len: int, dtype: torch.dtype, local: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin, [seq, rope_dim / 2] in `dtype`; angles are computed in fp64. `local`: of layers whose RoPE
    is that of local_rope_theta."""
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies(spec, local))
    size = 1.0 if local or spec.rope_scaling is None else spec.rope_scaling.rotation
    return (angles.cos() * size).to(dtype), (angles.sin() * size).to(dtype)


def halves(x: Tensor) -> Tensor:
    """Neighbours of the last dim, as DeepSeek's pairs lie, moved to its halves."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., head_dim] rotated by tables that broadcast to [..., rope_dim / 2], in x's dtype."""
    a, b, rest = x.split([width := cos.shape[-1], width, x.shape[-1] - 2 * width], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Rotate(torch.autograd.Function):
    """rotate as a function that keeps the tables alone."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates."""
        ctx.tables = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return _rotate(x, *ctx.tables, 1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """Rotates back."""
        return _rotate(dy, *ctx.tables, -1), None, None


class SplitRotate(torch.autograd.Function):
    """q and k rotated and v as it is, of the product [batch, seq, (q, k, v)] of all three: each [batch, its
    heads, seq, head_dim] with seq outside in memory. Keeps the tables alone, which broadcast to [..., 1,
    rope_dim / 2]; backward is one tensor."""

    @staticmethod
    def forward(
        ctx, qkv: Tensor, heads: tuple[int, int], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`heads`: of q, and of k and v each."""
        ctx.tables, (queries, others) = (cos, sin), heads
        *outer, width = qkv.shape
        turned, every = queries + others, queries + 2 * others
        both, v = qkv.view(*outer, every, width // every).split_with_sizes([turned, others], -2)
        q, k = _rotate(both, cos, sin, 1).transpose(1, 2).split_with_sizes(heads, 1)
        return q, k, apart(v).transpose(1, 2)  # a view would keep the unrotated q and k alive

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        """Rotates back."""
        out = torch.cat([x.transpose(1, 2) for x in (dq, dk, dv)], -2)
        _rotate(out.narrow(2, 0, dq.shape[1] + dk.shape[1]), *ctx.tables, -1, in_place=True)
        return out.flatten(-2), None, None, None


def apart(part: Tensor) -> Tensor:
    """A copy of a part of a product, whose view would keep all of it: also of one token, whose parts are
    contiguous as they lie."""
    return part.clone(memory_format=torch.contiguous_format)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, way: int, in_place: bool = False) -> Tensor:
    """rotate, one way or the other, bit for bit, in four kernels instead of seven, by tables that broadcast
    to [..., 1, rope_dim / 2]; `in_place`: x is not needed as it was."""
    half, width = cos.shape[-1], x.shape[-1]
    if 2 * half < width:
        part = _rotate(x[..., : 2 * half], cos, sin, way, in_place)
        return x if in_place else torch.cat([part, x[..., 2 * half :]], -1)
    halves = x.view(*x.shape[:-1], 2, half)
    across = halves * sin
    out = halves.mul_(cos) if in_place else halves * cos
    a, b, c, d = (t.select(-2, i) for t in (across, out) for i in (0, 1))  # unbind takes as four
    if x.element_size() == 2 and half < VECTOR:
        out.add_(torch.stack([b.neg(), a], -2), alpha=way)
    else:
        c.sub_(b, alpha=way)
        d.add_(a, alpha=way)
    return x if in_place else out.flatten(-2)

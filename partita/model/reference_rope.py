"""The judge's positions, as the papers state them: rotary angles, one frequency after the other, and ALiBi's
slopes, one head after the other. No line of rope.py or cp/alibi.py."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil, floor, log, pi

import torch
from torch import Tensor

from partita.spec.model import ModelSpec


@lru_cache(maxsize=8)  # of a model, for each of its layers and steps
def turns(
    spec: ModelSpec, seq_len: int, dtype: torch.dtype, local: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin [seq, rope_dim / 2] of the angles of each position, times what YaRN scales them by;
    `local`: where layers with a window have a base of their own, which nothing scales."""
    if local:
        spec = replace(spec, rope_theta=spec.local_rope_theta, rope_scaling=None)
    each = torch.tensor([_turn(spec, i) for i in range(spec.rope_dim // 2)], dtype=torch.float64)
    around = torch.polar(torch.ones(seq_len, len(each), dtype=torch.float64),
                         torch.arange(seq_len, dtype=torch.float64)[:, None] * each)  # fmt: skip
    around = around * (1.0 if spec.rope_scaling is None else spec.rope_scaling.rotation)
    return around.real.to(dtype), around.imag.to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first rope_dim numbers of each head turned, number i with number i + rope_dim / 2."""
    half = cos.shape[-1]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    across = torch.cat([-head[..., half:], head[..., :half]], -1)
    return torch.cat([head * cos.repeat(1, 2) + across * sin.repeat(1, 2), rest], -1)


def pairs_apart(x: Tensor) -> Tensor:
    """Where number 2 i is turned with number 2 i + 1: the even ones, then the odd ones."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def slopes(heads: int) -> Tensor:
    """[heads] fp64, by the authors' rule: with n heads, a power of two, head i has 2^(-8 (i + 1) / n); else
    the first n = 2^k < heads have those of n, the others every second one of 2 n."""
    n = 1 << (heads.bit_length() - 1)
    powers = [8 * (i + 1) / n if i < n else 8 * (2 * (i - n) + 1) / (2 * n) for i in range(heads)]
    return torch.tensor([0.5**power for power in powers], dtype=torch.float64)


def _turn(spec: ModelSpec, i: int) -> float:
    """The angle of pair i from one position to the next."""
    plain, scaling = spec.rope_theta ** (-2 * i / spec.rope_dim), spec.rope_scaling
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":
        first = max(floor(_pair_that_turns(spec, scaling.beta_fast)), 0)
        last = min(ceil(_pair_that_turns(spec, scaling.beta_slow)), spec.rope_dim - 1)
        share = (i - first) / max(last - first, 0.001)
        return plain + (slow - plain) * min(max(share, 0.0), 1.0)
    turned = scaling.original_max_seq_len * plain / (2 * pi)  # times round, over the first context
    share = (turned - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return slow + (plain - slow) * min(max(share, 0.0), 1.0)


def _pair_that_turns(spec: ModelSpec, times: float) -> float:
    """The pair, between whole ones, that goes round so many times over the first context (2309.00071)."""
    assert spec.rope_scaling is not None
    context = spec.rope_scaling.original_max_seq_len / (2 * pi * times)
    return spec.rope_dim * log(context, spec.rope_theta) / 2

"""Attention and mlp side by side on one input (GPT-NeoX, Black et al. 2022, sec. 2.1; GPT-J).

    x + attention(norm(x)) + mlp(norm'(x))

What both make is added up before it is moved: under tp one sum of partial sums, forward, instead of two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita.model.attention import Attention
from partita.model.mlp import MLP
from partita.parallel.regions import Region
from partita.parallel.tp.linear import AddBias
from partita.parallel.units import Weight


@dataclass(frozen=True)
class Joined:
    """Both parts added up, moved by the region, then the biases of both."""

    region: Region
    biases: tuple[Weight, ...]

    def __call__(self, a: Tensor, b: Tensor, replay: bool = False) -> Tensor:
        """[batch, seq, hidden] each -> [batch, seq or its share, hidden]; `replay`: nothing reads it."""
        y = _Join.apply(a, b, self.region, replay)
        for bias in self.biases:
            y = AddBias.apply(y, bias)
        return y  # type: ignore[return-value]


class _Join(torch.autograd.Function):
    """Keeps nothing."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, region: Region, replay: bool) -> Tensor:
        """Adds, then moves."""
        ctx.region = region
        return a.new_empty(region.shape_after(a.shape)) if replay else region.forward(a + b)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The conjugate, once for both."""
        dy = ctx.region.backward(dy)
        return dy, dy, None, None


@dataclass(frozen=True)
class Beside:
    """A layer's two segments as one. Their last linears neither move what they make nor have a bias."""

    attention: Attention
    mlp: MLP
    join: Callable[[Tensor, Tensor, bool], Tensor]

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """x and what both make of it; `replay`: only what backward needs is made (see Row)."""
        a = self.attention.made(x, batch, step, training, replay)
        return x + self.join(a, self.mlp.made(x, batch, step, training, replay), replay)

"""Ulysses (Jacobs et al. 2023): an all_to_all turns a cut of the sequence into a cut of heads and back.

    x [batch, heads, share, d]  ->  [batch, heads / n, share * n, d]      q, k, v before attention
                                <-                                        its output behind

Ranks are side by side on the sequence, so that the shares joined in rank order are in laid order. Kv heads
that the ranks do not divide: each is handed in as often as it takes (4 on 6 ranks three times: 12, two a
rank), and backward adds what comes back. Backward of an exchange is the exchange the other way. The exchanges
keep nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor

from partita.parallel.cp.tile import wide
from partita.parallel.regions import Region, Unplayed

Core = Callable[[Tensor, Tensor, Tensor, Any, int, bool], Tensor]


@dataclass(frozen=True)
class Turned:
    """A core (model/core.py) around another: `regions` exchange q, k, v and the output."""

    inner: Core
    regions: tuple[Region, Region, Region, Region]
    unplayed: Unplayed | None  # where a replay leaves the last exchange out

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        """Attention of this rank's heads over what its ring's rank holds."""
        turned = (_ToHeads.apply(x, r) for x, r in zip((q, k, v), self.regions, strict=False))
        out = self.inner(*turned, batch, step, training)  # type: ignore[arg-type]
        wanted = self.unplayed is None or not self.unplayed.is_needless
        return _ToSequence.apply(out, self.regions[3], wanted)  # type: ignore[return-value]


def to_heads(x: Tensor, region: Region) -> Tensor:
    """[batch, heads, share, d] -> [batch, heads / n, share * n, d]."""
    n = region.comm.size
    b, heads, s, dim = x.shape
    apart = x.view(b, n, heads // n, s, dim).permute(1, 0, 3, 2, 4).contiguous()
    came = region.comm.all_to_all(apart, site=region.site)  # [ranks of seq, b, s, heads / n, d]
    return came.transpose(0, 1).reshape(b, n * s, heads // n, dim).transpose(1, 2)


def to_sequence(x: Tensor, region: Region) -> Tensor:
    """[batch, heads / n, share * n, d] -> [batch, heads, share, d]."""
    n = region.comm.size
    b, heads, s, dim = x.shape
    apart = x.view(b, heads, n, s // n, dim).permute(2, 0, 3, 1, 4).contiguous()
    came = region.comm.all_to_all(apart, site=region.site)  # [ranks of heads, b, s / n, heads, d]
    return came.permute(1, 2, 0, 3, 4).reshape(b, s // n, n * heads, dim).transpose(1, 2)


def copies(heads: int, ranks: int) -> int:
    """How often a head is handed in: the least number of times after which ranks divide the heads."""
    return lcm(heads, ranks) // heads


class _ToHeads(torch.autograd.Function):
    """Forward: heads are cut, the sequence is joined. Backward: the other way, copies of a head added."""

    @staticmethod
    def forward(ctx, x: Tensor, region: Region) -> Tensor:
        """Each head as often as it is needed."""
        ctx.region, ctx.heads = region, x.shape[1]
        times = copies(x.shape[1], region.comm.size)
        return region.known(lambda: to_heads(x.repeat_interleave(times, 1), region))

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        """One gradient for each head."""
        came = to_sequence(g, ctx.region)
        times = came.shape[1] // ctx.heads
        if times > 1:
            apart = came.unflatten(1, (ctx.heads, times))
            came = apart.sum(2, dtype=wide(came.dtype)).to(came.dtype)
        return came, None


class _ToSequence(torch.autograd.Function):
    """Forward: the sequence is cut, heads are joined. Backward: the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, region: Region, wanted: bool) -> Tensor:
        """This rank's tokens with all heads; where they are not wanted, any numbers of that shape."""
        ctx.region, n = region, region.comm.size
        if wanted:
            return region.known(lambda: to_sequence(x, region))
        b, heads, s, dim = x.shape
        return x.new_zeros(b, heads * n, s // n, dim)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        """This rank's heads with all tokens."""
        return to_heads(g, ctx.region), None, None

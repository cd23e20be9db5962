"""Attention whose keys and values lie on other ranks: ring attention and its gathered form.

    forward    for each share, own first: its tiles' outputs are merged by their log-sum-exp
    backward   shares are seen again; each tile's gradients need the merged output and lse alone
    kept       q, k, v of this rank, the output, lse: what one device would keep of them

With dropout on probabilities those are made whole: [batch, heads, share, seq], keys in laid order; keys go
round for the scores, values for their use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from partita.parallel.cp.alibi import biased
from partita.parallel.cp.split import CAUSAL, Split, Tile
from partita.parallel.cp.tile import Merged, Scale, attend, attend_back, wide
from partita.parallel.cp.travel import Travel
from partita.parallel.regions import Region, Unplayed


@dataclass(frozen=True)
class SharedKeys:
    """A core (model/core.py) for the shares of a ring or gather; `regions` move k and v. q [batch, heads,
    share, head_dim], k and v [batch, kv_heads, share, head_dim]; `scale` as tile.py has it, `slopes` of
    this rank's heads where scores fall off with distance (alibi.py); `unplayed`, where a replay leaves what
    reads values out; `window` where it is not the split's."""

    travel: Travel
    regions: tuple[Region, Region]
    scale: Scale = None
    slopes: Tensor | None = None
    unplayed: Unplayed | None = None
    window: int | None = None

    def _seen(self, split: Split, tile: Tile, mine: int, owner: int) -> tuple[Tensor | None, bool]:
        """A tile's mask, and whether its upper half is hidden."""
        if self.slopes is None:
            return split.seen(tile, mine, owner), tile.kind == CAUSAL
        return biased(self.slopes, *split.pair(tile, mine, owner), split.window), False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        """Exact attention over the whole sequence."""
        split = batch.split.of_window(self.window)
        return _Flash.apply(q, k, v, self, split)  # type: ignore[return-value]

    def known(self, q: Tensor, k: Tensor, v: Tensor, split: Split) -> tuple[Tensor, Tensor]:
        """(output, lse), or those that were kept."""
        at = self.unplayed
        if at is not None and at.is_known:
            return at.tape.brought.pop(0), at.tape.brought.pop(0)
        found = self.forward(q, k, v, split)
        if at is not None and at.kept and at.tape.writing:
            at.tape.brought += found
        return found

    def forward(self, q: Tensor, k: Tensor, v: Tensor, split: Split) -> tuple[Tensor, Tensor]:
        """(output, lse) of this rank's queries."""
        mine, merged = self.travel.rank, Merged(q, v.shape[-1])
        for owner, share in self.travel.shares(self.regions, _laid(k, v), "F"):
            own, theirs = (t.transpose(1, 2) for t in share)
            for tile in split.tiles(mine, owner):
                seen, causal = self._seen(split, tile, mine, owner)
                at = tile.rows, slice(None), tile.k
                part = q[tile.rows, :, tile.q]
                merged.add(tile, *attend(part, own[at], theirs[at], seen, causal, self.scale))
            del share, own, theirs  # no third share while the next one comes
        return merged.out, merged.lse

    def backward(
        self, g: Tensor, saved: Sequence[Tensor], split: Split
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v: those of k and v follow their shares home."""
        q, k, v, out, lse = saved
        mine = self.travel.rank
        dq = torch.zeros_like(q, dtype=wide(q.dtype))
        gradients = self.travel.gradients(self.regions, _laid(k, v))
        for owner, share in self.travel.shares(self.regions, _laid(k, v), "B"):
            own, theirs = (t.transpose(1, 2) for t in share)
            parts = [torch.zeros_like(t, dtype=wide(t.dtype)) for t in share]
            dk, dv = (t.transpose(1, 2) for t in parts)
            for tile in split.tiles(mine, owner):
                seen, causal = self._seen(split, tile, mine, owner)
                rows, keys = (tile.rows, slice(None), tile.q), (tile.rows, slice(None), tile.k)
                found = attend_back(
                    g[rows], (q[rows], own[keys], theirs[keys]), out[rows], lse[rows], seen,
                    causal, self.scale,
                )  # fmt: skip
                for whole, at, part in zip((dq, dk, dv), (rows, keys, keys), found, strict=True):
                    whole[at] += part
            gradients.add(owner, parts)
            del share, own, theirs
        dk, dv = (t.transpose(1, 2).to(k.dtype) for t in gradients.home())
        return dq.to(q.dtype), dk, dv


def _laid(*tensors: Tensor) -> list[Tensor]:
    """As they travel: [batch, share, heads, head_dim]."""
    return [t.transpose(1, 2) for t in tensors]


class _Flash(torch.autograd.Function):
    """Keeps q, k, v, the output and lse."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, core: SharedKeys, split: Split) -> Tensor:
        """Merged over all shares."""
        out, lse = core.known(q, k, v, split)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.core, ctx.split = core, split
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        """Shares are seen again."""
        return *ctx.core.backward(g, ctx.saved_tensors, ctx.split), None, None


def _keys(k: Tensor, core: SharedKeys) -> Iterator[tuple[int, Tensor]]:
    """(owner, its keys) as they travel; of all, where the plan keeps them."""
    region, travel = core.regions[0], core.travel

    def shares() -> Iterator[tuple[int, Tensor]]:
        return ((owner, keys) for owner, (keys,) in travel.shares((region,), _laid(k), "F"))

    if region.tape is None:
        return shares()
    every = region.known(
        lambda: torch.cat([keys for _, keys in sorted(shares(), key=itemgetter(0))], 1)
    )
    return iter(enumerate(every.chunk(region.comm.size, 1)))


class Probabilities(torch.autograd.Function):
    """softmax(q k / sqrt(d)) over all keys, in laid order; keeps q, k and itself. k goes round, where it
    is not known all of it."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, hidden: Tensor, core: SharedKeys) -> Tensor:
        """Scores share by share, then the softmax."""
        b, heads, s, dim = q.shape
        scores = q.new_empty(b, heads, s, hidden.shape[-1])
        for owner, keys in _keys(k, core):
            block = q @ keys.permute(0, 2, 3, 1)
            scores[..., owner * s : (owner + 1) * s] = block * dim**-0.5
        probs = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        ctx.save_for_backward(q, k, probs)
        ctx.core = core
        return probs

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        """k goes round again, its gradient with it."""
        q, k, probs = ctx.saved_tensors
        core: SharedKeys = ctx.core
        s = q.shape[2]
        slope = torch._softmax_backward_data(g, probs, -1, probs.dtype) * q.shape[-1] ** -0.5
        dq = torch.zeros_like(q, dtype=wide(q.dtype))
        gradients = core.travel.gradients(core.regions[:1], _laid(k))
        for owner, (keys,) in core.travel.shares(core.regions[:1], _laid(k), "B"):
            part = slope[..., owner * s : (owner + 1) * s]
            dq += part @ keys.transpose(1, 2)
            dk = (part.transpose(-1, -2) @ q).transpose(1, 2)
            gradients.add(owner, [dk.to(dq.dtype).contiguous()])
        return dq.to(q.dtype), gradients.home()[0].transpose(1, 2).to(k.dtype), None, None


class Use(torch.autograd.Function):
    """Dropped probabilities times values; keeps both. v goes round, but not where a replay leaves it out."""

    @staticmethod
    def forward(ctx, probs: Tensor, v: Tensor, core: SharedKeys) -> Tensor:
        """As `made`, unless it is known or nobody wants it."""
        ctx.save_for_backward(probs, v)
        ctx.core, at = core, core.unplayed
        if at is None:
            return Use.made(probs, v, core)
        if at.is_needless:
            return v.new_empty(*probs.shape[:-1], v.shape[-1])
        return at.made(lambda: Use.made(probs, v, core))

    @staticmethod
    def made(probs: Tensor, v: Tensor, core: SharedKeys) -> Tensor:
        """Added up share by share, wide."""
        s, b, heads = v.shape[2], *v.shape[:2]
        out = v.new_zeros(b, s, heads, v.shape[-1], dtype=wide(v.dtype)).transpose(1, 2)
        for owner, (values,) in core.travel.shares(core.regions[1:], _laid(v), "F"):
            out += probs[..., owner * s : (owner + 1) * s] @ values.transpose(1, 2)
        return out.to(v.dtype)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        """v goes round again, its gradient with it."""
        probs, v = ctx.saved_tensors
        core: SharedKeys = ctx.core
        s, slope = v.shape[2], torch.empty_like(probs)
        gradients = core.travel.gradients(core.regions[1:], _laid(v))
        for owner, (values,) in core.travel.shares(core.regions[1:], _laid(v), "B"):
            at = slice(owner * s, (owner + 1) * s)
            slope[..., at] = g @ values.permute(0, 2, 3, 1)
            dv = (probs[..., at].transpose(-1, -2) @ g).transpose(1, 2)
            gradients.add(owner, [dv.to(wide(v.dtype)).contiguous()])
        return slope, gradients.home()[0].transpose(1, 2).to(v.dtype), None

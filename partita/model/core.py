"""Attention proper on one rank's heads: q [batch, heads, seq, head_dim], k and v [batch, kv_heads, seq,
head_dim] -> [batch, heads, seq, head_dim].

    Flash            q, k, v, the output and its log-sum-exp are kept: one tile
    Explicit         probabilities and their dropout mask are kept
    SharedExplicit   the same where keys and values go round a ring or are gathered; its flash form is
                     parallel/cp/ring.py, and parallel/cp/ulysses.py goes around any

A query sees the keys of its own document that are not behind it, the last `window` of them where there is
a window; where `causal` is false those behind it too, as many. Grouped-query heads are not copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from partita.model.dropout import Dropout
from partita.parallel.cp.alibi import biased
from partita.parallel.cp.ring import Probabilities, SharedKeys, Use
from partita.parallel.cp.tile import Scale, attend, attend_back, wide
from partita.parallel.cp.visible import Tokens, visible
from partita.parallel.kernels.chain import Link
from partita.parallel.recompute.replay import Again
from partita.parallel.regions import Tape


class Core(Protocol):
    """What an attention segment calls; `training` turns dropout on."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        """Attention of every query of this rank."""
        ...


@dataclass(frozen=True)
class Flash:
    """The kernel that keeps no probabilities (Dao et al. 2022)."""

    window: int = 0
    scale: Scale = None  # of products; None: head_dim^-0.5
    slopes: Tensor | None = None  # of these heads, where scores fall off with distance
    causal: bool = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        """Without a mask where at most the upper half is hidden."""
        seq = q.shape[-2]
        mask = self._mask(seq, batch, q.device)
        bands = bands_of(seq, self.window, self.causal)
        return Tiled.apply(q, k, v, mask, self.scale, bands, self.causal)  # type: ignore[return-value]

    def link(self, seq: int, batch: Any, device: torch.device) -> Link:
        """The same of `seq` tokens as a link of a chain."""
        bands = bands_of(seq, self.window, self.causal)
        return Tiled, self._mask(seq, batch, device), self.scale, bands, self.causal

    def _mask(self, seq: int, batch: Any, device: torch.device) -> Callable[[Band], Tensor] | None:
        """What makes the mask of a band; None where attention is causal, or full, and nothing else."""
        if batch.documents is None and not 0 < self.window < seq and self.slopes is None:
            return None
        documents = batch.documents  # alone: a link that is kept shall hold no batch

        def mask(band: Band) -> Tensor:
            tokens = Tokens.first(seq, documents, device)
            q, k = tokens.part(*band[:2]), tokens.part(*band[2:])
            if self.slopes is not None:
                return biased(self.slopes, q, k, self.window)
            return visible(q, k, self.window, self.causal).unsqueeze(1)

        return mask


Band = tuple[int, int, int, int]  # first query and behind the last, first key and behind the last
BAND = 256  # queries of a band, at least


def bands_of(seq: int, window: int, causal: bool = True) -> tuple[Band, ...]:
    """Queries side by side, each with all keys that any of them sees: what no window reaches is not computed.
    One band where that would be less than half of the sequence's queries, or there is no window."""
    size = max(window, BAND)
    if not window or seq < 2 * size:
        return ((0, seq, 0, seq),)
    ahead = 0 if causal else window - 1
    firsts = range(0, seq, size)
    return tuple(
        (a, min(a + size, seq), max(a - window + 1, 0), min(a + size + ahead, seq)) for a in firsts
    )


class Tiled(torch.autograd.Function):
    """Flash by a device's kernels as they are (parallel/cp/tile.py), a tile a band, whose backward begins
    with the output and its lse alone: a mask is not kept, backward makes it again. `causal` says whether the
    upper half is hidden where there is none."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Callable[[Band], Tensor] | None,
        scale: Scale,
        bands: tuple[Band, ...],
        causal: bool,
    ) -> Tensor:
        """A band after the other; each sees all that its queries see."""
        upper = causal and mask is None
        if len(bands) == 1:
            out, lse = attend(q, k, v, mask and mask(bands[0]), upper, scale)
        else:
            assert mask is not None
            b, heads, s, _ = q.shape
            out = v.new_empty(b, s, heads, v.shape[-1]).transpose(1, 2)
            lse = q.new_empty(b, heads, s, dtype=wide(q.dtype))
            for band in bands:
                rows, keys = slice(*band[:2]), slice(*band[2:])
                own = q[:, :, rows], k[:, :, keys], v[:, :, keys]
                out[:, :, rows], lse[:, :, rows] = attend(*own, mask(band), False, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mask, ctx.scale, ctx.upper, ctx.bands = mask, scale, upper, bands
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        """Scores are made again."""
        q, k, v, out, lse = ctx.saved_tensors
        mask, nothing = ctx.mask, (None, None, None, None)
        if len(ctx.bands) == 1:
            seen = mask and mask(ctx.bands[0])
            return *attend_back(g, (q, k, v), out, lse, seen, ctx.upper, ctx.scale), *nothing
        whole = [torch.zeros_like(t, dtype=wide(t.dtype)) for t in (q, k, v)]
        for band in ctx.bands:
            rows, keys = slice(*band[:2]), slice(*band[2:])
            own = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            held = out[:, :, rows], lse[:, :, rows]
            found = attend_back(g[:, :, rows], own, *held, mask(band), False, ctx.scale)
            for total, at, part in zip(whole, (rows, keys, keys), found, strict=True):
                total[:, :, at] += part
        return *(t.to(q.dtype) for t in whole), *nothing


class Merge(torch.autograd.Function):
    """[batch, heads, seq, head_dim] -> [batch, seq, heads head_dim]; a view where seq lies outside."""

    @staticmethod
    def forward(ctx, out: Tensor, heads: int) -> Tensor:
        """Heads side by side."""
        ctx.heads = heads
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        """Apart again."""
        return dy.unflatten(2, (ctx.heads, -1)).transpose(1, 2), None


@dataclass(frozen=True)
class Explicit:
    """Probabilities are made whole, so that they can be dropped. `future` is True where a key is hidden:
    above the diagonal, or nowhere; `again`: backward makes them from q, k, v, and what that tape has."""

    drop: Dropout
    future: Tensor
    window: int = 0
    again: Tape | None = None
    causal: bool = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        """softmax(q k) dropped, times v."""
        if not training:
            return Flash(self.window, causal=self.causal)(q, k, v, batch, step, training)
        s = q.shape[-2]
        hidden = self.future[:s, :s]
        if batch.documents is not None or 0 < self.window < s:
            tokens = Tokens.first(s, batch.documents, q.device)
            hidden = ~visible(tokens, tokens, self.window, self.causal).unsqueeze(1)

        def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            group = q.shape[1] // k.shape[1]
            if group > 1:
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            # Added, not filled in: a sum keeps nothing for backward
            added = scores.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            return self.drop((scores + added).softmax(-1), step, batch) @ v

        if self.again is not None and torch.is_grad_enabled():
            return Again.apply(explicit, self.again, q, k, v)  # type: ignore[return-value]
        return explicit(q, k, v)


@dataclass(frozen=True)
class SharedExplicit:
    """As Explicit, for this rank's queries and the keys of all shares in laid order."""

    flash: SharedKeys
    drop: Dropout
    again: Tape | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        """softmax(q k) dropped, times v."""
        if not training:
            return self.flash(q, k, v, batch, step, training)
        hidden = ~batch.split.of_window(self.flash.window).mask(self.flash.travel.rank)

        def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            probs: Any = Probabilities.apply(q, k, hidden, self.flash)
            return Use.apply(self.drop(probs, step, batch), v, self.flash)  # type: ignore[return-value]

        if self.again is not None and torch.is_grad_enabled():
            return Again.apply(explicit, self.again, q, k, v)  # type: ignore[return-value]
        return explicit(q, k, v)

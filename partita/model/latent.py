"""Multi-head latent attention (DeepSeek-V2, 2405.04434; spec/families/latent.py has the picture).

Shapes: x [batch, seq or its share, hidden]. Latents and the shared key k_pe are whole on tp, and cut by sp as
x is; heads are this rank's, seq between the regions its share of context parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita.model.core import Core
from partita.model.rope import Rotate, apart, halves
from partita.parallel.recompute.replay import made_again
from partita.parallel.regions import Region
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import Column, Row
from partita.spec.model import Latent


@dataclass(frozen=True)
class LatentAttention:
    """norm -> latents and k_pe by one matmul (`down`) -> their norms -> q; k and v by one matmul (`wkv`) ->
    rope -> core -> wo, added to x. `k_pe` is the region behind that key. `places` and `remakes` as Attention
    has them; without q_norm queries are made of the token."""

    sizes: Latent
    heads: int
    norm: Norm
    down: Column
    q_norm: Norm | None
    wq: Column
    kv_norm: Norm
    wkv: Column
    k_pe: Region
    wo: Row
    rope: tuple[Tensor, Tensor]
    places: tuple[int, int]
    core: Core
    remakes: frozenset[str] = frozenset()

    def __call__(self, x: Tensor, batch: Any, step: int, training: bool) -> Tensor:
        """x + attention(norm(x))."""
        q, kv, k_pe = self.project(x)
        b, s, _ = q.shape
        if batch.split is None:
            cos, sin = (t[:s].unsqueeze(1) for t in self.rope)
        else:
            cos, sin = (t.unsqueeze(2) for t in batch.split.tables(self.rope, *self.places))
        v_size, rope = self.heads * self.sizes.v, self.sizes.rope
        k, v = (
            t.reshape(b, s, self.heads, -1) for t in kv.split([kv.shape[-1] - v_size, v_size], -1)
        )
        q, q_pe = q.view(b, s, self.heads, -1).split([k.shape[-1], rope], -1)
        q_pe = Rotate.apply(halves(q_pe), cos, sin)
        k_pe = Rotate.apply(halves(k_pe).unsqueeze(2), cos, sin)
        q = torch.cat([q, q_pe], -1)  # type: ignore[list-item]
        k = torch.cat([k, k_pe.expand(-1, -1, self.heads, -1)], -1)  # type: ignore[attr-defined]
        q, k, v = (t.transpose(1, 2) for t in (q, k, apart(v)))
        a = self.core(q, k, v, batch, step, training)
        return x + self.wo(a.transpose(1, 2).reshape(b, s, -1))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(q, k and v side by side, k_pe) [batch, seq, ...], heads folded, without positions."""
        h = self.norm(x)
        with made_again(h, lambda: self.norm(x), "attention.norm" in self.remakes):
            parts = self.down(h)
            q = None if self.q_norm is not None else self.wq(h)
        made = [self.sizes.kv, self.sizes.rope]
        *queries, kv_made, k_pe = parts.split([self.sizes.q, *made] if self.sizes.q else made, -1)
        if self.q_norm is not None:
            q = _behind(self.q_norm, queries[0], self.wq, "attention.q_norm" in self.remakes)
        assert q is not None
        kv = _behind(self.kv_norm, kv_made, self.wkv, "attention.kv_norm" in self.remakes)
        return q, kv, self.k_pe(k_pe.contiguous())


def _behind(norm: Norm, latent: Tensor, linear: Column, again: bool) -> Tensor:
    """linear(norm(latent)); the latent is copied, since a view would keep its neighbours."""
    latent = apart(latent)
    n = norm(latent)
    with made_again(n, lambda: norm(latent), again):
        return linear(n)

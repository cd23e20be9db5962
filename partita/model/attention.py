"""The attention segment of a layer: norm, q k v as one matmul, positions, attention, output projection.

Shapes: x [batch, seq or its share, hidden]; between tp's regions seq is this rank's share of context
parallelism and heads are this rank's. Key/value heads shared by several tp ranks are held by each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partita.model.core import Core
from partita.model.dropout import Dropout
from partita.model.rope import Rotate
from partita.parallel.recompute.replay import made_again
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import Column, Row


@dataclass(frozen=True)
class Attention:
    """norm -> qkv -> norms of heads -> rope -> core -> wo, added to x. `rope` holds (cos, sin) or None;
    `places` is this rank's share of the laid sequence; `core` is chosen by the laid program (see
    model/core.py); `drop_residual` is set where the model drops; `remakes` are the ops that backward
    runs again."""

    norm: Norm
    qkv: Column
    wo: Row
    heads: int
    kv_heads: int
    head_dim: int
    rope: tuple[Tensor, Tensor] | None
    places: tuple[int, int]
    core: Core
    drop_residual: Dropout | None = None
    remakes: frozenset[str] = frozenset()
    qk_norms: tuple[Norm, Norm] | None = None

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """x + attention(norm(x)); `replay`: only what backward needs is made (see Row)."""
        h = self.norm(x)
        with made_again(h, lambda: self.norm(x), "attention.norm" in self.remakes):
            qkv = self.qkv(h)
        b, s, _ = qkv.shape
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (t.view(b, s, -1, self.head_dim) for t in qkv.split(sizes, -1))
        if self.qk_norms is not None:  # copies: the norms keep q and k, and a view would keep v too
            q, k, v = (t.contiguous() for t in (q, k, v))
            q, k = self.qk_norms[0](q), self.qk_norms[1](k)
        if self.rope is not None:
            if batch.split is None:
                cos, sin = (t[:s].unsqueeze(1) for t in self.rope)
            else:
                cos, sin = (t.unsqueeze(2) for t in batch.split.tables(self.rope, *self.places))
            q, k = Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
            v = v.contiguous()  # a view would keep the unrotated q and k alive
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        a = self._core(q, k, v, batch, step, training).transpose(1, 2).reshape(b, s, -1)
        y = self.wo(a, replay)
        if self.drop_residual is not None and training:
            y = self.drop_residual(y, step, batch)
        return x + y

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        return self.core(q, k, v, batch, step, training)

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
from partita.model.rope import Rotate, SplitRotate
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
        q, k, v = self._rotated(qkv, batch)
        a = self._core(q, k, v, batch, step, training).transpose(1, 2).reshape(b, s, -1)
        y = self.wo(a, replay)
        if self.drop_residual is not None and training:
            y = self.drop_residual(y, step, batch)
        return x + y

    def _rotated(self, qkv: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [batch, its heads, seq, head_dim], normalised and at their positions."""
        cos = sin = None
        if self.rope is not None:
            if batch.split is None:
                cos, sin = (t[: qkv.shape[1]].unsqueeze(1) for t in self.rope)
            else:
                cos, sin = (t.unsqueeze(2) for t in batch.split.tables(self.rope, *self.places))
        if cos is not None and self.qk_norms is None:
            return SplitRotate.apply(qkv, (self.heads, self.kv_heads), cos, sin)  # type: ignore[return-value]
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, -2)
        if self.qk_norms is not None:  # copies: the norms keep q and k, and a view would keep v too
            q, k, v = (t.contiguous() for t in (q, k, v))
            q, k = self.qk_norms[0](q), self.qk_norms[1](k)
        if cos is not None:
            q, k = Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # type: ignore[union-attr]

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        return self.core(q, k, v, batch, step, training)

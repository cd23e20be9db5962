"""The attention segment of a layer: norm, q k v as one matmul, positions, attention, output projection.

Shapes: x [batch, seq or its share, hidden]; between tp's regions seq is this rank's share of context
parallelism and heads are this rank's. Key/value heads shared by several tp ranks are held by each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partita.model.core import Core, Flash, Merge
from partita.model.dropout import Dropout
from partita.model.rope import Rotate, SplitRotate
from partita.parallel.chain import Link, Residual
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
    chained: bool = True  # one node of autograd, where its parts allow it

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """x + attention(norm(x)); `replay`: only what backward needs is made (see Row)."""
        core = self._core_link(x, batch)
        if core is not None:
            return self._chain(x, core, batch, replay)
        return x + self.made(x, batch, step, training, replay)

    def made(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """attention(norm(x))."""
        q, k, v = self._heads(x, batch)
        a = self.core(q, k, v, batch, step, training).transpose(1, 2).flatten(2)
        y = self.wo(a, replay)
        if self.drop_residual is not None and training:
            y = self.drop_residual(y, step, batch)
        return y

    def _heads(self, x: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [batch, its heads, seq, head_dim], normalised and at their positions."""
        h = self.norm(x)
        with made_again(h, lambda: self.norm(x), "attention.norm" in self.remakes):
            qkv = self.qkv(h)
        tables = self._tables(qkv.shape[1], batch)
        if tables and self.qk_norms is None:
            return SplitRotate.apply(qkv, (self.heads, self.kv_heads), *tables)  # type: ignore[return-value]
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, -2)
        if self.qk_norms is not None:  # copies: the norms keep q and k, and a view would keep v too
            q, k, v = (t.contiguous() for t in (q, k, v))
            q, k = self.qk_norms[0](q), self.qk_norms[1](k)
        if tables:
            q, k = Rotate.apply(q, *tables), Rotate.apply(k, *tables)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # type: ignore[union-attr]

    def _core_link(self, x: Tensor, batch: Any) -> Link | None:
        """Attention proper as a link, where all of the segment can be one node."""
        parts = self.rope is None or self.qk_norms is not None or bool(self.remakes)
        if parts or not self.chained or not isinstance(self.core, Flash) or x.device.type != "cpu":
            return None
        return self.core.link(self.qkv.region.shape_after(x.shape)[1], batch)

    def _chain(self, x: Tensor, core: Link, batch: Any, replay: bool) -> Tensor:
        """All of it as one node."""
        tables = self._tables(self.qkv.region.shape_after(x.shape)[1], batch)
        rotate = SplitRotate, (self.heads, self.kv_heads), *tables
        links = (
            self.norm.link,
            self.qkv.link,
            rotate,
            core,
            (Merge, self.heads),
            *self.wo.links(replay),
        )
        return Residual.apply(x, *links)  # type: ignore[return-value]

    def _tables(self, seq: int, batch: Any) -> tuple[Tensor, ...]:
        """cos and sin of the positions of this rank's q and k, beside their heads; none without RoPE."""
        if self.rope is None:
            return ()
        if batch.split is not None:
            return tuple(t.unsqueeze(2) for t in batch.split.tables(self.rope, *self.places))
        return tuple(t.narrow(0, 0, seq).unsqueeze(1) for t in self.rope)

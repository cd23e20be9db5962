"""The attention segment of a layer: norm, q k v as one matmul, positions, attention, output projection.

Shapes: x [batch, seq or its share, hidden]; between tp's regions seq is this rank's share of context
parallelism and heads are this rank's. Key/value heads shared by several tp ranks are held by each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from partita.model.core import Core, Flash, Merge
from partita.model.dropout import Dropout
from partita.model.rope import Rotate, SplitRotate, apart
from partita.parallel.kernels.chain import Residual, Segment, call
from partita.parallel.recompute.replay import made_again
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import Column, Row


@dataclass(frozen=True)
class Attention:
    """norm -> qkv -> norms of heads -> rope -> core -> wo, added to x. `rope` holds (cos, sin) or None;
    `places` is this rank's share of the laid sequence; `core` is chosen by the laid program (see
    model/core.py); `drop_residual` is set where the model drops; `remakes` are the ops that backward
    runs again; `post_norm` stands behind wo, with a norm before it or alone."""

    norm: Norm | None  # None: x comes normalised (post_norm.py)
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
    post_norm: Norm | None = None
    chained: bool = True  # one node of autograd, where its parts allow it
    _known: dict[int, Segment] = field(default_factory=dict, init=False, compare=False, repr=False)
    # its links by tokens, where all microbatches have the same

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """x + attention(norm(x)); `replay`: only what backward needs is made (see Row)."""
        links = self.links(x, batch, replay)
        if links:
            return call(Residual, x, links)  # type: ignore[return-value]
        return x + self.made(x, batch, step, training, replay)

    def made(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """attention(norm(x))."""
        q, k, v = self._heads(x, batch)
        a = self.core(q, k, v, batch, step, training).transpose(1, 2).flatten(2)
        y = self.wo(a, replay and self.post_norm is None)  # which keeps what it reads
        if self.post_norm is not None:
            y = self.post_norm(y)
        if self.drop_residual is not None and training:
            y = self.drop_residual(y, step, batch)
        return y

    def _heads(self, x: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each [batch, its heads, seq, head_dim], normalised and at their positions."""
        norm = self.norm
        if norm is None:
            qkv = self.qkv(x)
        else:
            h = norm(x)
            with made_again(h, lambda: norm(x), "attention.norm" in self.remakes):
                qkv = self.qkv(h)
        tables = self._tables(qkv.shape[1], batch)
        if tables and self.qk_norms is None:
            tables = tuple(t.unsqueeze(-2) for t in tables)
            return call(SplitRotate, qkv, (self.heads, self.kv_heads), *tables)  # type: ignore[return-value]
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, -2)
        if self.qk_norms is not None:  # copies: the norms keep q and k, and a view would keep v too
            q, k, v = (apart(t) for t in (q, k, v))
            q, k = self.qk_norms[0](q), self.qk_norms[1](k)
        if tables:
            q, k = call(Rotate, q, *tables), call(Rotate, k, *tables)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # type: ignore[union-attr]

    def links(self, x: Tensor, batch: Any, replay: bool = False) -> Segment:
        """All of it on x, or what has its shape, as links of one node; none where it cannot be one."""
        parts = self.rope is None or self.qk_norms is not None or bool(self.remakes)
        parts = parts or self.norm is None
        if parts or not self.chained or not isinstance(self.core, Flash):
            return ()
        if self.norm is None or self.post_norm is not None:
            return ()
        seq = self.qkv.region.shape_after(x.shape)[1]
        if replay or batch.split is not None or batch.documents is not None:
            return self._links(x, seq, batch, replay)
        if seq not in self._known:
            self._known.clear()  # a sample grows by a token at a time
            self._known[seq] = self._links(x, seq, batch, replay)
        return self._known[seq]

    def _links(self, x: Tensor, seq: int, batch: Any, replay: bool) -> Segment:
        """The same of `seq` tokens, where x is."""
        assert self.norm is not None
        tables = (t.unsqueeze(-2) for t in self._tables(seq, batch))
        assert self.norm is not None
        return (
            self.norm.link,
            self.qkv.link,
            (SplitRotate, (self.heads, self.kv_heads), *tables),
            self.core.link(seq, batch, x.device),
            (Merge, self.heads),
            *self.wo.links(replay),
        )

    def _tables(self, seq: int, batch: Any) -> tuple[Tensor, ...]:
        """cos and sin of the positions of this rank's q and k, beside their heads; none without RoPE."""
        if self.rope is None:
            return ()
        if batch.split is not None:
            return tuple(t.unsqueeze(2) for t in batch.split.tables(self.rope, *self.places))
        return tuple(t.narrow(0, 0, seq).unsqueeze(1) for t in self.rope)

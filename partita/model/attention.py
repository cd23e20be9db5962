"""The attention segment of a layer: norm, q k v as one matmul, positions, attention, output projection.

Shapes: x [batch, seq or its share, hidden]; between the regions seq is whole and heads are this rank's.
Key/value heads shared by several tp ranks are held by each; grouped-query heads are not copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from partita.model.dropout import Dropout
from partita.model.rope import Rotate
from partita.parallel.recompute.replay import Again, made_again
from partita.parallel.sp.norm import Norm
from partita.parallel.tp.linear import Column, Row


@dataclass(frozen=True)
class Attention:
    """norm -> qkv -> rope -> core -> wo, added to x. `rope` holds (cos, sin) or None; `drop_core` and
    `drop_residual` are set where the model drops; `remakes` are the ops that backward runs again."""

    norm: Norm
    qkv: Column
    wo: Row
    heads: int
    kv_heads: int
    head_dim: int
    rope: tuple[Tensor, Tensor] | None
    future: Tensor | None = (
        None  # [seq, seq], True above the diagonal, where probabilities are explicit
    )
    drop_core: Dropout | None = None
    drop_residual: Dropout | None = None
    remakes: frozenset[str] = frozenset()

    def __call__(self, x: Tensor, batch: Any, step: int, training: bool) -> Tensor:
        """x + attention(norm(x))."""
        h = self.norm(x)
        with made_again(h, lambda: self.norm(x), "attention.norm" in self.remakes):
            qkv = self.qkv(h)
        b, s, _ = qkv.shape
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (t.view(b, s, -1, self.head_dim) for t in qkv.split(sizes, -1))
        if self.rope is not None:
            cos, sin = (t[:s].unsqueeze(1) for t in self.rope)
            q, k = Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
            v = v.contiguous()  # a view would keep the unrotated q and k alive
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self.wo(self._core(q, k, v, batch, step, training).transpose(1, 2).reshape(b, s, -1))
        if self.drop_residual is not None and training:
            y = self.drop_residual(y, step, batch.samples)
        return x + y

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Any, step: int, training: bool
    ) -> Tensor:
        mask = causal_mask(batch.documents) if batch.documents is not None else None
        if self.drop_core is None or not training:
            return scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=self.heads != self.kv_heads,
            )
        s, drop = q.shape[-2], self.drop_core
        assert self.future is not None
        hidden = ~mask if mask is not None else self.future[:s, :s]

        def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            group = self.heads // self.kv_heads
            if group > 1:
                k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
            probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            return drop(probs, step, batch.samples) @ v

        if "attention.softmax" in self.remakes and torch.is_grad_enabled():
            return Again.apply(explicit, q, k, v)  # type: ignore[return-value]
        return explicit(q, k, v)


def causal_mask(documents: Tensor) -> Tensor:
    """[batch, 1, seq, seq]: True where a position sees an earlier one of its own document."""
    s = documents.shape[-1]
    causal = torch.ones(s, s, dtype=torch.bool, device=documents.device).tril_()
    return ((documents.unsqueeze(-1) == documents.unsqueeze(-2)) & causal).unsqueeze(1)

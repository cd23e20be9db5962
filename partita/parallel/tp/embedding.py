"""Vocab-parallel lookup: each rank holds a range of rows; tokens of other ranks contribute zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partita.parallel.regions import Region
from partita.parallel.units import Weight


@dataclass(frozen=True)
class Lookup:
    """ids [batch, seq] -> [batch, seq or its share, hidden]. `first` is the range's first id; padded
    rows are never met, since ids are checked before training."""

    table: Weight
    first: int
    region: Region

    def __call__(self, ids: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Looks up and adds over the ranks. `anchor` is empty and gives the output a backward."""
        anchor = torch.empty(0, requires_grad=True) if anchor is None else anchor
        return _Lookup.apply(anchor, ids, self)  # type: ignore[return-value]

    def accumulate(self, ids: Tensor, dy: Tensor) -> None:
        """Adds each token's gradient to its row, where this rank holds it; zero to the first row where
        not: which tokens these are stays on the device."""
        gradient = self.table.gradient
        local, rows = (ids - self.first).reshape(-1), dy.reshape(-1, dy.shape[-1])
        if self.region.kind != "identity":
            outside = (local < 0) | (local >= gradient.shape[0])
            local = local.masked_fill(outside, 0)
            rows = rows.masked_fill(outside.unsqueeze(-1), 0)
        gradient.index_add_(0, local, rows.to(gradient.dtype))


class _Lookup(torch.autograd.Function):
    """Keeps ids, unless the table is frozen."""

    @staticmethod
    def forward(ctx, anchor: Tensor, ids: Tensor, layer: Lookup) -> Tensor:
        """Rows of the own range, zero elsewhere, then the region."""
        ctx.save_for_backward(ids if layer.table.trains else None)
        ctx.layer, ctx.device = layer, anchor.device
        rows = layer.table.shape[0]
        if layer.region.kind == "identity":  # the whole table is here
            return layer.region.forward(layer.table.value[ids])
        local = ids - layer.first
        outside = (local < 0) | (local >= rows)
        found = layer.table.value[local.masked_fill(outside, 0)]
        return layer.region.forward(found.masked_fill_(outside.unsqueeze(-1), 0))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """The region's conjugate, then the table's gradient."""
        (ids,) = ctx.saved_tensors
        layer: Lookup = ctx.layer
        dy = layer.region.backward(dy)
        if ids is not None:
            layer.table.queue.add(layer.accumulate, ids, dy)
        return torch.empty(0, device=ctx.device), None, None

"""Dropout whose masks are pure functions of (seed, step, sample, site, element).

A rank draws the mask of the box it holds: under tp the masks of heads differ and those of the residual
stream agree, under sp each rank draws its own positions, and a replay draws the same again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from partita.comm.random.seeds import dropout_box, dropout_rows
from partita.parallel.cp.balance import Order
from partita.spec.layout import Box


@dataclass(frozen=True)
class Dropout:
    """One site. `box` is the part of a sample's `shape` that this rank holds; along the dims that are `laid`
    it is a share of the laid sequence (parallel/cp/balance.py). Behind `shape` lies what fills a sequence up,
    of which nothing is dropped."""

    seed: int
    site: str
    probability: float
    shape: tuple[int, ...]
    box: Box
    laid: tuple[bool, ...] = ()

    def mask(self, step: int, batch: Any) -> Tensor:
        """bool [batch, *box], True where an element stays."""
        if batch.split is None or not any(self.laid):
            return self._draw(step, batch.samples, list(self.box))
        rows = range(len(batch.split.order.rows))
        if len(rows) == 1:
            return self._pieces(step, batch.samples, batch.split.order, 0)
        each = batch.samples.split(1)
        return torch.cat([self._pieces(step, each[r], batch.split.order, r) for r in rows])

    def _pieces(self, step: int, samples: Tensor, order: Order, row: int) -> Tensor:
        """The mask of samples of one order, drawn where their positions are neighbours."""
        spans = [
            order.spans(row, *span) if laid else [span]
            for span, laid in zip(self.box, self.laid, strict=True)
        ]

        def along(held: list[tuple[int, int]]) -> Tensor:
            d = len(held)
            if d == len(spans):
                return self._draw(step, samples, held)
            return torch.cat([along([*held, span]) for span in spans[d]], d + 1)

        return along([])

    def _draw(self, step: int, samples: Tensor, box: list[tuple[int, int]]) -> Tensor:
        inside = [(min(a, n), min(b, n)) for (a, b), n in zip(box, self.shape, strict=True)]
        drawn = dropout_box(
            self.seed, step, self.site, samples, shape=self.shape, box=inside, p=self.probability
        )
        if inside == box:
            return drawn
        whole = drawn.new_ones(len(drawn), *(b - a for a, b in box))
        whole[(slice(None), *(slice(b - a) for a, b in inside))] = drawn
        return whole

    def __call__(self, x: Tensor, step: int, batch: Any) -> Tensor:
        """x with elements dropped, the others scaled by 1 / (1 - p); keeps the mask."""
        return x * self.mask(step, batch) * (1.0 / (1.0 - self.probability))


@dataclass(frozen=True)
class RowDropout:
    """One site of rows of experts. A sample's logical tensor is [experts, seq, columns]; this rank's experts
    begin at `expert`; it has `columns` of `whole`, from `column`."""

    seed: int
    site: str
    probability: float
    seq: int
    whole: int
    expert: int
    column: int
    columns: int

    def mask(self, step: int, counts: Sequence[int], tokens: Tensor) -> Tensor:
        """bool [rows, columns], True where an element stays: of this rank's experts `counts` rows each, one
        behind the other. `tokens` int64 [rows] are theirs, sample * seq + position."""
        many = torch.tensor(counts, device=tokens.device)
        expert = torch.arange(len(counts), device=tokens.device).repeat_interleave(many)
        samples, positions = tokens // self.seq, tokens % self.seq
        first = ((self.expert + expert) * self.seq + positions) * self.whole + self.column
        p = self.probability
        return dropout_rows(self.seed, step, self.site, samples, first, self.columns, p)

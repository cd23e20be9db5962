"""The first block: the token table, and behind it what a family has: learned positions, types, a norm,
dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partita.model.maker import Maker
from partita.parallel.tp.embedding import Lookup
from partita.parallel.units import Weight


class EmbeddingBlock:
    """ids -> x."""

    def __init__(self, make: Maker) -> None:
        self.training, self.loss_scale = True, 1.0
        spec = make.spec
        first, _ = make.vocab_range("embedding.table")
        at = make.regions.at("embedding.lookup")
        self.lookup = Lookup(make.weight("embedding.table"), first, at)
        self.scale = spec.embedding_scale
        self.norm = make.norm("embedding.norm") if spec.embedding_norm else None
        self.type = make.weight("embedding.type") if spec.token_types else None
        self.position: Weight | None = None
        if spec.has_positions:
            self.position = make.weight("embedding.position")
            self._span, request = make.places("e"), make.laid.request
            self._last = (
                request.seq_len - 1
            )  # has a position; what fills a sequence up takes it too
            self._filled = request.laid_len > request.seq_len
        self.drop = make.dropout("dropout", "e_mask") if spec.dropout else None

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """Table, scale, positions, types, norm, dropout. x, where given, is empty: a place for backward to
        end at."""
        h = self.lookup(batch.ids, x)
        if self.scale != 1.0:
            h = h * self.scale
        if self.position is not None:
            if batch.split is None and not self._filled:
                h = AddPosition.apply(h, self.position, self._span[0])
            else:
                h = AddPositions.apply(h, self.position, self._positions(batch, h.device))
        if self.type is not None:  # of one sentence, whose tokens have the first
            h = AddPositions.apply(h, self.type, h.new_zeros((1, h.shape[1]), dtype=torch.int64))
        if self.norm is not None:
            h = self.norm(h)
        if self.drop is not None and self.training:
            h = self.drop(h, batch.step, batch)
        return h

    def _positions(self, batch: Any, device: torch.device) -> Tensor:
        """[samples or 1, places of this rank]."""
        if batch.split is None:
            at = torch.arange(*self._span, device=device).unsqueeze(0)
        else:
            at = batch.split.tokens.part(*self._span).positions
        return at.clamp(max=self._last)


class AddPosition(torch.autograd.Function):
    """x + position[first : first + seq]; the gradient sums this rank's samples."""

    @staticmethod
    def forward(ctx, x: Tensor, position: Weight, first: int) -> Tensor:
        """Adds rows of the table."""
        ctx.position, ctx.first = position, first
        return x + position.value[first : first + x.shape[1]]

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """Passes on."""
        if ctx.position.trains:
            ctx.position.queue.add(_add_rows, ctx.position.gradient, ctx.first, dy)
        return dy, None, None


class AddPositions(torch.autograd.Function):
    """x + position[at], for `at` [samples or 1, seq]."""

    @staticmethod
    def forward(ctx, x: Tensor, position: Weight, at: Tensor) -> Tensor:
        """Adds rows of the table."""
        ctx.position, ctx.at = position, at
        return x + position.value[at]

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """Passes on."""
        if ctx.position.trains:
            ctx.position.queue.add(_add_at, ctx.position.gradient, ctx.at, dy)
        return dy, None, None


def _add_at(gradient: Tensor, at: Tensor, dy: Tensor) -> None:
    """Samples that share their positions are added up first."""
    if at.shape[0] == 1:
        dy = dy.sum(0, keepdim=True, dtype=gradient.dtype)
    gradient.index_add_(0, at.flatten(), dy.flatten(0, 1).to(gradient.dtype))


def _add_rows(gradient: Tensor, first: int, dy: Tensor) -> None:
    gradient[first : first + dy.shape[1]].add_(dy.sum(0, dtype=gradient.dtype))

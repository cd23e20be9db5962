"""Vocab-parallel cross-entropy (Shoeybi et al. 2019): logits are never gathered.

    loss = sum over valid tokens of (max + log sum exp(logit - max) - logit[target]) / N

Three reductions of [batch, seq] over tp: the maximum, the sum, the target's logit. N counts the valid
tokens of the whole step, so the loss does not change with the plan. Statistics are fp32 (fp64 under fp64).

Where no rank has a part of the vocabulary, one softmax takes the place of subtraction, exponential and, in
backward, division (it exponentiates in half of exp's time); the largest probability is 1 / sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partita.parallel.regions import Region


@dataclass(frozen=True)
class CrossEntropy:
    """logits [batch, seq, local vocab] -> scalar. `first` is the first id of this rank, `rows` how many
    of its columns are real: padding takes no part."""

    first: int
    rows: int
    maximum: Region
    total: Region
    target: Region

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        valid: Tensor,
        total_valid: int,
        loss_scale: float = 1.0,
        hits: list[Tensor] | None = None,
    ) -> Tensor:
        """The rank's share of the step's loss; its gradient is times `loss_scale`. Into `hits`, where it is
        given, goes which valid targets are the first of the largest logits; over tp by one more maximum."""
        seed = loss_scale / total_valid
        return _CrossEntropy.apply(logits, targets, valid, (total_valid, seed, hits), self)  # type: ignore[return-value]

    @property
    def is_whole(self) -> bool:
        """Whether every logit is here."""
        regions = self.maximum, self.total, self.target
        return self.first == 0 and all(r.kind == "identity" for r in regions)

    def place(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(column of each target on this rank, or 0; whether it lies elsewhere)."""
        local = targets - self.first
        outside = (local < 0) | (local >= self.rows)
        return local.masked_fill(outside, 0), outside


class _CrossEntropy(torch.autograd.Function):
    """Keeps exp(logit - max), or where logits are whole the softmax, its sum and maximum, targets and mask:
    what the program declares."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        targets: Tensor,
        valid: Tensor,
        scales: tuple[int, float, list[Tensor] | None],
        layer: CrossEntropy,
    ) -> Tensor:
        """Max, exp, sum, pick; each summed over tp."""
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        x = logits.to(wide) if logits.dtype != wide else logits
        ctx.is_whole = layer.is_whole and layer.rows == x.shape[-1]
        total_valid, ctx.scale, hits = scales
        if hits is not None:
            hits.append((_likeliest(x, layer) == targets) & valid)
        parts = _whole if ctx.is_whole else _cut
        probs, total, top, pick = parts(x, targets, layer, x is not logits)
        losses = (total.log() + top - pick) * valid
        ctx.save_for_backward(probs, total, top, targets, valid)
        ctx.layer, ctx.dtype = layer, logits.dtype
        return losses.sum() * (1.0 / total_valid)

    @staticmethod
    def backward(ctx, seed: Tensor) -> tuple[Tensor, None, None, None, None]:
        """(softmax - one hot) * valid * S / N, made in place of the probabilities."""
        probs, total, _, targets, valid = ctx.saved_tensors
        weight = valid * (seed * ctx.scale)
        if ctx.is_whole:
            local, own = targets.clamp(0, ctx.layer.rows - 1), weight.neg()
        else:
            local, outside = ctx.layer.place(targets)
            own = weight.masked_fill(outside, 0).neg_()
            weight = weight / total
        dx = probs.mul_(weight.unsqueeze(-1))
        dx.scatter_add_(-1, local.unsqueeze(-1), own.unsqueeze(-1))
        return dx.to(ctx.dtype), None, None, None, None


Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""(probabilities, sum, maximum, target's logit) of logits in the wide dtype."""


def _whole(x: Tensor, targets: Tensor, layer: CrossEntropy, own: bool) -> Parts:
    """Of all logits, in place where they are our `own`. A target that is not counted may be anything."""
    top = x.amax(-1)
    local = targets.clamp(0, layer.rows - 1).unsqueeze(-1)
    pick = x.gather(-1, local).squeeze(-1)
    probs = torch.softmax(x, -1, out=x) if own else x.softmax(-1)
    return probs, probs.amax(-1).reciprocal_(), top, pick


def _cut(x: Tensor, targets: Tensor, layer: CrossEntropy, own: bool) -> Parts:
    """Of this rank's logits; probabilities are not divided by their sum."""
    if layer.rows < x.shape[-1]:
        x, own = x if own else x.clone(), True
        x[..., layer.rows :] = -torch.inf
    top = _maximum(x.amax(-1), layer.maximum)
    local, outside = layer.place(targets)
    pick = x.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill_(outside, 0)
    probs = (x.sub_(top.unsqueeze(-1)) if own else x - top.unsqueeze(-1)).exp_()
    return probs, layer.total.forward(probs.sum(-1)), top, layer.target.forward(pick)


def _likeliest(x: Tensor, layer: CrossEntropy) -> Tensor:
    """[batch, seq]: the first id of the largest logit of all ranks' x [batch, seq, local vocab]."""
    own, at = x[..., : layer.rows].max(-1)
    at = at + layer.first
    top = _maximum(own, layer.maximum)
    far = torch.full_like(at, torch.iinfo(at.dtype).max)
    return -_maximum(-torch.where(own == top, at, far), layer.maximum)


def _maximum(top: Tensor, region: Region) -> Tensor:
    """The maximum over ranks; it carries no gradient."""
    return (
        top
        if region.kind == "identity"
        else region.comm.all_reduce(top, site=region.site, op="max")
    )

"""The router of a layer: scores, the choice, and the auxiliary losses, which backward feeds by itself.

    scores   softmax or sigmoid of x W.T in fp32 (fp64 under fp64)
    choice   the top_k best, the lower expert on ties; of the best groups alone; a bias moves the choice only
    gates    the chosen scores, made to add up to router_scale, or times it

Each auxiliary loss is an output of the block with a seed of its own, coefficient / samples of the step: the
backward of the gates adds its gradient to the scores'. Balance (DeepSeek-V3, eq. 17) is of each sequence, so
its counts are summed over the axes that cut seq (reduce_from, [batch, experts]) and never over dp; its
gradient needs no more. By name it is of a microbatch (Switch): counts are summed over dp too. z (ST-MoE,
eq. 5) is of each token. Their values are partial sums until the step adds them up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from partita.parallel.ep.loads import count
from partita.parallel.ep.log import RouterLog
from partita.parallel.kernels.product import times
from partita.parallel.regions import Region
from partita.parallel.units import Matrix, Weight
from partita.spec.model import ModelSpec

TINY = 1e-20  # gates whose scores add up to nothing are nothing
VECTOR = 16  # choices: a softmax of fewer takes a CPU 75 us for 512 rows of 8, its parts 21


@dataclass(frozen=True)
class Router:
    """x [batch, seq share, hidden] -> gates [batch, seq, top_k] and the experts they are for.

    `gate` [experts, hidden]; `bias` [experts] collects, for its gradient, the rows of each expert. `counts`
    is the region that sums rows over what cuts seq, `seq_len` the whole sequence, `samples` those of a step,
    `together` those whose rows are counted together: 1, or a microbatch's. `filled`: this rank's places of
    the laid sequence, where some hold tokens that fill it up, which count for nothing.
    """

    spec: ModelSpec
    gate: Matrix
    bias: Weight | None
    counts: Region
    seq_len: int
    samples: int
    log: RouterLog
    together: int = 1
    filled: tuple[int, int] | None = None

    def real(self, positions: Tensor | None, device: torch.device) -> Tensor | None:
        """bool [samples or 1, this rank's places]: the tokens that do not fill a sequence up; None where all
        are such. `positions` [samples or 1, whole seq] of the laid sequence's places, where not in order."""
        if self.filled is None:
            return None
        first, end = self.filled
        if positions is None:
            return torch.arange(first, end, device=device).unsqueeze(0) < self.seq_len
        return positions[:, first:end] < self.seq_len

    def logits(self, x: Tensor) -> Tensor:
        """[batch, seq, experts] in the wide dtype."""
        return Gate.apply(x, self)  # type: ignore[return-value]

    def __call__(
        self, logits: Tensor, records: bool, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(gates, chosen); `records` says that the losses' values count (not in a replay), `real` which
        tokens do."""
        return Route.apply(logits, self, records, real)  # type: ignore[return-value]

    def seed(self, coefficient: float) -> float:
        """What backward starts from at a token's part of an auxiliary loss."""
        return coefficient * self.log.loss_scale / (self.samples * self.seq_len)

    def scores(self, logits: Tensor) -> Tensor:
        """Of every expert."""
        if self.spec.router == "sigmoid":
            return logits.sigmoid()
        if logits.device.type != "cpu" or logits.shape[-1] >= VECTOR:
            return logits.softmax(-1)
        powers = (logits - logits.amax(-1, keepdim=True)).exp_()
        return powers.div_(powers.sum(-1, keepdim=True))


class Gate(torch.autograd.Function):
    """A linear in the wide dtype; keeps x, unless the gate is frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Router) -> Tensor:
        """x W.T, both widened."""
        ctx.save_for_backward(x if layer.gate.trains else None)
        ctx.layer, ctx.dtype = layer, x.dtype
        wide = layer.gate.gradient.dtype
        return times(x.to(wide), layer.gate.value.to(wide))

    @staticmethod
    def backward(ctx, dlogits: Tensor) -> tuple[Tensor, None]:
        """Two matmuls."""
        (x,) = ctx.saved_tensors
        gate: Matrix = ctx.layer.gate
        wide = dlogits.dtype
        if x is not None:
            gate.accumulate(dlogits.flatten(0, -2), x.flatten(0, -2).to(wide))
        return times(dlogits, gate.value.to(wide).t()).to(ctx.dtype), None


class Route(torch.autograd.Function):
    """Keeps the scores and the choice; counts for the balance loss, logits for the z-loss."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, layer: Router, records: bool, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores and chooses."""
        s = layer.spec
        scores = layer.scores(logits)
        bias = None if layer.bias is None else layer.bias.value.to(scores.dtype)
        chosen = choose(s, scores, bias)
        gates = scores.gather(-1, chosen)
        if s.normalise_top_k:
            gates = gates / (gates.sum(-1, keepdim=True) + TINY)
        counts = logits.new_empty(0)
        if s.balance_loss:
            rows = _real(one_hot(chosen, s.experts).sum(2), real).sum(1)
            rows = rows if s.balance_over == "sequence" else rows.sum(0, keepdim=True)
            counts = layer.counts.forward(rows.to(scores.dtype))
        saved = logits if s.z_loss else logits.new_empty(0)
        ctx.save_for_backward(scores, chosen, counts, saved)
        ctx.layer, ctx.real = layer, real
        ctx.mark_non_differentiable(chosen)
        if records:
            _record(layer, scores, counts, saved, real)
        return gates * s.router_scale, chosen

    @staticmethod
    def backward(ctx, dgates: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        """Through gates and scores, and from the auxiliary losses."""
        scores, chosen, counts, logits = ctx.saved_tensors
        layer: Router = ctx.layer
        s = layer.spec
        dscores = torch.zeros_like(scores).scatter_(-1, chosen, _ungate(s, dgates, scores, chosen))
        if s.balance_loss:
            dscores += _real(_balance_gradient(layer, scores, counts), ctx.real)
        if s.router == "softmax":
            dlogits = (dscores - (dscores * scores).sum(-1, keepdim=True)) * scores
        else:
            dlogits = dscores * scores * (1 - scores)
        if s.z_loss:
            seed = layer.seed(s.z_loss)
            slope = 2 * seed * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1)
            dlogits += _real(slope, ctx.real)
        if layer.bias is not None:
            rows = count(kept(chosen, ctx.real), s.experts).to(scores.dtype)
            layer.bias.accumulate(rows * layer.log.loss_scale)
        return dlogits, None, None, None


def kept(chosen: Tensor, real: Tensor | None) -> Tensor:
    """The choices [..., top_k] of tokens that do not fill a sequence up."""
    return chosen if real is None else chosen[real.expand(chosen.shape[:-1])]


def _real(x: Tensor, real: Tensor | None) -> Tensor:
    """x [batch, seq, n], zero where a token fills a sequence up."""
    return x if real is None else x * real.unsqueeze(-1)


def choose(spec: ModelSpec, scores: Tensor, bias: Tensor | None) -> Tensor:
    """int64 [..., top_k]: the experts of each token. With groups only those of the best router_top_groups
    count, by their best score, under sigmoid by the sum of their two best (DeepSeek-V2, V3)."""
    ranked = scores if bias is None else scores + bias
    if spec.router_groups > 1:
        groups = ranked.unflatten(-1, (spec.router_groups, -1))
        best = 2 if spec.router == "sigmoid" else 1
        worth = groups.sort(dim=-1, descending=True).values[..., :best].sum(-1)
        best_of_all = _first(worth, spec.router_top_groups)
        shut = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, best_of_all, False)
        ranked = groups.masked_fill(shut.unsqueeze(-1), -torch.inf).flatten(-2)
    return _first(ranked, spec.top_k)


def _first(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest, the lower on ties: on a CPU one after the other, as a sort of all is slower;
    a GPU sorts in three kernels where that takes two of each."""
    if x.device.type != "cpu":
        return x.sort(dim=-1, descending=True, stable=True).indices[..., :k].contiguous()
    left, found = x.clone(), []
    for _ in range(k):
        found.append(left.max(-1, keepdim=True).indices)  # the first of equal ones
        left.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, -1)


def _ungate(s: ModelSpec, dgates: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """Gradient of the chosen scores from that of the gates."""
    d = dgates * s.router_scale
    if not s.normalise_top_k:
        return d
    mine = scores.gather(-1, chosen)
    total = mine.sum(-1, keepdim=True) + TINY
    return (d - (d * mine).sum(-1, keepdim=True) / total) / total


def _share(layer: Router, counts: Tensor) -> Tensor:
    """experts / (top_k * seq) * rows of each expert: 1 where they are even. [batch, experts]"""
    s = layer.spec
    return counts * (s.experts / (s.top_k * layer.seq_len * layer.together))


def _balance_gradient(layer: Router, scores: Tensor, counts: Tensor) -> Tensor:
    s = layer.spec
    d = (_share(layer, counts) * layer.seed(s.balance_loss)).unsqueeze(1)
    if s.router == "softmax":
        return d.expand_as(scores)
    total = scores.sum(-1, keepdim=True)
    return (d - (d * scores).sum(-1, keepdim=True) / total) / total


def _record(
    layer: Router, scores: Tensor, counts: Tensor, logits: Tensor, real: Tensor | None
) -> None:
    """This rank's part of the losses' values, where they are made."""
    s, now = layer.spec, layer.log.now
    if s.balance_loss:
        p = scores if s.router == "softmax" else scores / scores.sum(-1, keepdim=True)
        p = _real(p, real).sum(1)
        now.balance = now.balance + (_share(layer, counts) * p).sum() / layer.seq_len
    if s.z_loss:
        z = _real(logits.logsumexp(-1, keepdim=True).square(), real)
        now.z = now.z + z.sum() / layer.seq_len

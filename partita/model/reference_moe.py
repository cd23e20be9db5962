"""The judge's experts: a loop over them in plain PyTorch, and the auxiliary losses of a microbatch.

gate      softmax or sigmoid of x W.T in fp32 (fp64 under fp64); top_k of it, the lower expert on ties
expert    SwiGLU of the rows sent to it; added up in fp32, weighed by their gates, then rounded
capacity  of each sequence and expert ceil(factor * seq * top_k / experts) rows; later positions are dropped
balance   of each sequence experts / (top_k * seq) * sum of counts * mean probability (DeepSeek-V3, eq. 17);
          over the batch: counts are the mean of a microbatch's sequences
z         of each sequence the mean of logsumexp(logits)^2 (ST-MoE, eq. 5)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot, silu

from partita.spec.model import ModelSpec


@dataclass
class Auxiliary:
    """What the experts of one forward pass say besides their output, sums over layers and samples:
    `loss` is what backward starts from besides the tokens' losses, times samples; `counts` by layer."""

    loss: Tensor | float = 0.0
    balance: float = 0.0
    z: float = 0.0
    dropped: int = 0
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: Auxiliary) -> None:
        """Adds what another pass saw; its loss is done with."""
        self.balance, self.z = self.balance + other.balance, self.z + other.z
        self.dropped += other.dropped
        for name, counts in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + counts


@dataclass(frozen=True)
class Told:
    """What another run chose, [seq, top_k] by (step, layer, sample). At low precision its scores are not the
    judge's to the last bit: where they may be `near` apart and its choice be right, the judge takes it, as a
    token at another expert is no rounding to either. Else it keeps its own."""

    chosen: Mapping[tuple[int, str, int], Tensor]
    near: float

    def follow(self, judge: Judge, name: str, ranked: Tensor, own: Tensor) -> Tensor:
        """The experts of a layer's tokens, whose scores are `ranked` and choice `own`."""
        assert judge.samples is not None
        theirs = torch.stack([self.chosen[judge.step, name, i] for i in judge.samples.tolist()])
        towards = 2 * one_hot(theirs, judge.spec.experts).sum(-2) - 1
        best = choice(judge.spec, ranked + self.near * towards)
        may = (best.sort(-1).values == theirs.sort(-1).values).all(-1, keepdim=True)
        return theirs.where(may, own)


class Judge(Protocol):
    """The reference, as the experts need it."""

    spec: ModelSpec
    auxiliary: Auxiliary
    step: int
    samples: Tensor | None  # of the pass, places in the step's global batch
    told: Told | None
    linear: Callable[[Tensor, Tensor], Tensor]  # x W.T, at the plan's precision

    def weight(self, name: str) -> Tensor:
        """A weight in the compute dtype."""
        ...

    def adapted(
        self,
        name: str,
        x: Tensor,
        y: Tensor,
        part: int | tuple[int, ...] | None = None,
        stays: Tensor | None = None,
    ) -> Tensor:
        """y and what LoRA adds; x times `stays`, where that is given, in the place of its own dropout."""
        ...

    def drop(self, site: str, x: Tensor, samples: Tensor | None, p: float | None = None) -> Tensor:
        """Dropout by counter, while training."""
        ...


def moe(judge: Judge, name: str, h: Tensor) -> Tensor:
    """What layer `name` makes of normalised h [batch, seq, hidden]."""
    spec, weight, linear, aux = judge.spec, judge.weight, judge.linear, judge.auxiliary
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    logits = h.to(wide) @ weight(f"{name}.router.gate").to(wide).t()
    scores = logits.softmax(-1) if spec.router == "softmax" else logits.sigmoid()
    bias = weight(f"{name}.router.balance_bias").to(wide) if spec.router_bias else None
    ranked = scores.detach() if bias is None else scores.detach() + bias.detach()
    chosen = choice(spec, ranked)
    if judge.told is not None:
        chosen = judge.told.follow(judge, name, ranked, chosen)
    gates = scores.gather(-1, chosen)
    if spec.normalise_top_k:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    gates = gates * spec.router_scale
    picked = one_hot(chosen, spec.experts).sum(-2)  # [batch, seq, experts]
    _losses(spec, name, logits, scores, picked, aux)
    sent = picked
    if spec.capacity_factor is not None:
        limit = ceil(spec.capacity_factor * h.shape[1] * spec.top_k / spec.experts)
        sent = picked * (picked.cumsum(1) <= limit)
        aux.dropped += int((picked - sent).sum())
    y = torch.zeros_like(h, dtype=wide)
    gate_up, down = weight(f"{name}.experts.gate_up"), weight(f"{name}.experts.down")
    stays = {
        w: _stays(judge, f"{name}.experts.{w}.lora", y, width)
        for w, width in (("gate_up", spec.hidden), ("down", spec.expert_ffn_hidden))
    }
    for e in range(spec.experts):
        rows = sent[..., e].bool()
        of_up, of_down = (stays[w][:, e][rows] for w in ("gate_up", "down"))
        mine = (gates * (chosen == e)).sum(-1)[rows].unsqueeze(-1)
        gate, up = (
            judge.adapted(f"{name}.experts.gate_up", h[rows], linear(h[rows], w), (e, i), of_up)
            for i, w in enumerate(gate_up[e])
        )
        act, out = silu(gate) * up, torch.zeros_like(y)
        made = judge.adapted(f"{name}.experts.down", act, linear(act, down[e]), e, of_down)
        out[rows] = mine * made.to(wide)
        y = y + out
    y = y.to(h.dtype)
    if spec.shared_experts:
        gate, up = (
            judge.adapted(f"{name}.shared.gate_up", h, linear(h, w), i)
            for i, w in enumerate(weight(f"{name}.shared.gate_up"))
        )
        act = silu(gate) * up
        made = judge.adapted(f"{name}.shared.down", act, linear(act, weight(f"{name}.shared.down")))
        if spec.shared_gate:
            made = made * linear(h, weight(f"{name}.shared.gate")).sigmoid()
        y = y + made
    return y


def _stays(judge: Judge, site: str, y: Tensor, width: int) -> Tensor:
    """[batch, experts, seq, width]: what each element that an adapter of each expert might read is times;
    y [batch, seq, hidden] says how many and how wide."""
    whole = y.new_ones(y.shape[0], judge.spec.experts, y.shape[1], width)
    return judge.drop(site, whole, judge.samples, judge.spec.lora_dropout)


def choice(spec: ModelSpec, ranked: Tensor) -> Tensor:
    """The top_k experts [batch, seq, top_k] by score (and bias), the best first; with groups those of the
    best groups alone, which are worth their best expert, under sigmoid their two best."""
    if spec.router_groups > 1:
        size = spec.experts // spec.router_groups
        best = min(1 if spec.router == "softmax" else 2, size)
        worth = torch.stack([g.topk(best).values.sum(-1) for g in ranked.split(size, -1)], -1)
        opened = worth.argsort(dim=-1, descending=True, stable=True)[..., : spec.router_top_groups]
        groups = one_hot(opened, spec.router_groups).sum(-2).bool()
        ranked = ranked.where(groups.repeat_interleave(size, -1), -torch.inf)
    return ranked.argsort(dim=-1, descending=True, stable=True)[..., : spec.top_k]


def _losses(
    spec: ModelSpec, name: str, logits: Tensor, scores: Tensor, picked: Tensor, aux: Auxiliary
) -> None:
    seq = scores.shape[1]
    aux.counts[name] = picked.sum((0, 1))
    if spec.balance_loss:
        probability = scores / scores.sum(-1, keepdim=True) if spec.router == "sigmoid" else scores
        rows = picked.sum(1).to(scores.dtype)  # integers times a float are float32
        if spec.balance_over == "batch":
            rows = rows.sum(0, keepdim=True) / rows.shape[0]
        share = rows * (spec.experts / (spec.top_k * seq))
        balance = (share * probability.mean(1)).sum()
        aux.balance += float(balance.detach())
        aux.loss = aux.loss + spec.balance_loss * balance
    if spec.z_loss:
        z = logits.logsumexp(-1).square().mean(1).sum()
        aux.z += float(z.detach())
        aux.loss = aux.loss + spec.z_loss * z

"""From logits to a token: a function of one row, the request and what it has so far; never of the batch.

    logits --mask, bias, penalties--> --temperature--> --top_k, top_p, min_p--> --draw--> token

Drawn by the inverse of the distribution over the kept ids in their order, at a number in [0, 1) that is a
function of (seed, choice, number of the token): the same in any batch, after a preemption and behind any
draft. All arithmetic is in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from partita.base.errors import NonFiniteError
from partita.serve.request import SamplingParams, TokenLogprob

FEW = 1024  # likeliest ids, which mostly hold top_p


@dataclass(slots=True)
class Drawing:
    """What a choice draws by, and the tokens it has seen."""

    params: SamplingParams
    seed: int
    index: int  # of the choice
    prompt: frozenset[int] = frozenset()
    counts: dict[int, int] = field(default_factory=dict)  # of the answer's tokens

    def add(self, token: int) -> None:
        """A token of the answer."""
        self.counts[token] = self.counts.get(token, 0) + 1


def likeliest(logits: Tensor) -> list[int]:
    """The first largest of each row [rows, vocab]; -1 of a row whose largest is no finite number."""
    if not len(logits):
        return []
    best, ids = logits.max(-1)
    return torch.where(best.isfinite(), ids, -1).tolist()


def choose(logits: Tensor, drawing: Drawing, number: int, allowed: Tensor | None = None) -> int:
    """The `number`-th token of an answer, from logits [vocab]; `allowed`: bool [vocab], a grammar's.

    Raises NonFiniteError where nothing can be chosen: a logit is no number, or all are ruled out.
    """
    params = drawing.params
    scores = logits.double()
    if params.changes:
        scores = changed(scores, params, drawing.prompt, drawing.counts)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    best = scores.max()
    if not best.isfinite():
        bad = "no token is allowed" if allowed is not None and best == -torch.inf else "not finite"
        raise NonFiniteError(f"token {number} cannot be chosen: its logits are {best:g}, {bad}")
    if params.temperature == 0:
        return int(scores.argmax())
    scores = (scores - best) / params.temperature
    ids = kept(scores, params)
    reached = scores[ids].exp().cumsum(0)
    place = torch.searchsorted(reached, at(drawing, number) * reached[-1], right=True)
    return int(ids[min(int(place), len(ids) - 1)])


def at(drawing: Drawing, number: int) -> float:
    """The number in [0, 1), of 53 bits, by which the `number`-th token of a choice is drawn."""
    named = f"{drawing.seed} {drawing.index} {number}".encode()
    return (int.from_bytes(blake2b(named, digest_size=8).digest()) >> 11) * 2.0**-53


def changed(
    logits: Tensor, params: SamplingParams, prompt: Iterable[int], counts: Mapping[int, int]
) -> Tensor:
    """Logits [vocab] with bias and penalties; `counts` of the answer's tokens so far."""
    logits = logits.clone()
    if params.logit_bias:
        logits[list(params.logit_bias)] += logits.new_tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1 and (seen := sorted({*prompt, *counts})):
        x = logits[seen]
        by = params.repetition_penalty
        logits[seen] = torch.where(x > 0, x / by, x * by)
    if counts and (params.presence_penalty or params.frequency_penalty):
        times = logits.new_tensor(list(counts.values()))
        logits[list(counts)] -= params.presence_penalty + params.frequency_penalty * times
    return logits


def kept(scores: Tensor, params: SamplingParams) -> Tensor:
    """Ids, rising, that may be drawn from scores [vocab] (logits over temperature): those of top_k, of them
    those of top_p, of them those of min_p; of equals the lowest ids."""
    ids = torch.arange(len(scores))
    if 0 < params.top_k < len(scores):
        ids = _best(scores, params.top_k)
    if params.top_p < 1:
        within = scores[ids]
        p, few = within.softmax(0), min(FEW, len(ids))
        best = _best(within, few)
        if float(p[best].sum()) < params.top_p:
            best = torch.arange(len(ids))
        best = best[within[best].sort(descending=True, stable=True).indices]
        ids = ids[best[p[best].cumsum(0) - p[best] < params.top_p]].sort().values
    if params.min_p:
        ids = ids[scores[ids].exp() >= params.min_p * scores.max().exp()]
    return ids[scores[ids] > -torch.inf]


def _best(scores: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest, rising; of equals the lowest."""
    least = scores.topk(count).values[-1]
    above = (scores > least).nonzero().flatten()
    equal = (scores == least).nonzero().flatten()[: count - len(above)]
    return torch.cat([above, equal]).sort().values


def logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    """Log-probability of `token` under logits [vocab], with those of the `count` likeliest, equals by id."""
    row = logits.double()
    total = float(row.logsumexp(0))
    found: list[tuple[int, float]] = []
    if count:
        top = row.topk(min(count, len(row)))
        found = sorted(
            zip(top.indices.tolist(), (top.values - total).tolist(), strict=True),
            key=lambda pair: (-pair[1], pair[0]),
        )
    return TokenLogprob(token, float(row[token]) - total, tuple(found))

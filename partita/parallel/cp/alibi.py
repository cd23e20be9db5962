"""ALiBi (Press et al. 2021, 2108.12409): no positions; a head's scores fall off with distance by its slope.

    score(q, k) = q . k / sqrt(d) - slope * (position of q - position of k)

Slopes are a head's, and positions the sequence's own, whatever cuts either; within a packed document only
distances count, so positions need not start again.
"""

from __future__ import annotations

from math import floor, log2

import torch
from torch import Tensor

from partita.parallel.cp.visible import Tokens, visible


def slopes(heads: int) -> Tensor:
    """[heads] fp64: 2^(-8 i / n), i = 1 .. n; where heads is no power of two those of the next lower n,
    then every second one of 2n heads, as the authors' code has it."""
    low = 2 ** floor(log2(heads))
    powers = [8 * i / low for i in range(1, low + 1)]
    powers += [4 * i / low for i in range(1, 2 * (heads - low), 2)]
    return 2.0 ** -torch.tensor(powers, dtype=torch.float64)


def biased(slopes: Tensor, q: Tokens, k: Tokens, window: int = 0) -> Tensor:
    """What is added to scores, [samples or 1, heads, queries, keys] in the slopes' dtype; -inf where a key is
    not seen."""
    hidden = visible(q, k, window).logical_not_().unsqueeze(1)
    ahead = q.positions.unsqueeze(-1) - k.positions.unsqueeze(-2)
    found = -slopes.view(-1, 1, 1) * ahead.unsqueeze(1)
    if hidden.shape[0] > found.shape[0]:  # documents: a mask of each sample
        return found.masked_fill(hidden, -torch.inf)
    return found.masked_fill_(hidden, -torch.inf)

"""Which keys a query sees: those of its own document that are not behind it, the last `window` of them;
where attention is not causal those behind it too, as many.

position   0 1 2 3 4 5 6 7      window 3, two documents of 5 and 3 tokens: query 4 sees 2 3 4,
document   a a a a a b b b      query 6 sees 5 6
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Global positions [rows, n] of some tokens, and their documents [samples, n]; rows is 1 where the
    positions of all samples agree."""

    positions: Tensor
    documents: Tensor | None = None

    @staticmethod
    def first(
        n: int, documents: Tensor | None = None, device: torch.device | None = None
    ) -> Tokens:
        """Positions 0 .. n - 1."""
        return Tokens(torch.arange(n, device=device).unsqueeze(0), documents)

    def part(self, first: int, end: int) -> Tokens:
        """The tokens at places first .. end - 1."""
        documents = None if self.documents is None else self.documents[:, first:end]
        return Tokens(self.positions[:, first:end], documents)


def visible(q: Tokens, k: Tokens, window: int = 0, causal: bool = True) -> Tensor:
    """bool [samples or 1, queries, keys]; window 0 means no window."""
    ahead = q.positions.unsqueeze(-1) - k.positions.unsqueeze(-2)
    seen = ahead >= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window:
        seen = seen & (ahead < window)
        if not causal:
            seen = seen & (ahead > -window)
    if q.documents is not None and k.documents is not None:
        seen = seen & (q.documents.unsqueeze(-1) == k.documents.unsqueeze(-2))
    return seen

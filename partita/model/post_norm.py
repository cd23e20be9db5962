"""A layer whose norms stand behind its sums, on the residual stream (Vaswani et al. 2017; BERT).

y = norm(x + attention(x))        norm'(y + mlp(y))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partita.model.attention import Attention
from partita.model.mlp import MLP
from partita.parallel.recompute.replay import made_again
from partita.parallel.sp.norm import Norm


@dataclass(frozen=True)
class Behind:
    """A layer's two segments, which have no norm of their own, and the norm behind each; `remakes` are the
    ops that backward runs again."""

    attention: Attention
    mlp: MLP
    norms: tuple[Norm, Norm]
    remakes: frozenset[str] = frozenset()

    def __call__(
        self, x: Tensor, batch: Any, step: int, training: bool, replay: bool = False
    ) -> Tensor:
        """[batch, seq or its share, hidden] -> same. A replay leaves nothing out: norms keep the sums."""
        first, last = self.norms
        read = x + self.attention.made(x, batch, step, training)
        x = first(read)
        with made_again(x, lambda: first(read), "attention.norm" in self.remakes):
            y = self.mlp.made(x, batch, step, training)
        return last(x + y)

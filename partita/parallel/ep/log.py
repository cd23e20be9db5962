"""What the routers of a rank did in one step: values of the auxiliary losses, rows of each expert, rows that
were dropped. The step adds them up over ranks once (site step.routing:reduce_from)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from partita.comm.protocol import Where


@dataclass
class RouterLog:
    """One layer's. `counts` [experts] are rows that tokens chose; `sent` holds, by microbatch, the rows that
    left this rank for each expert."""

    experts: int
    where: Where
    balance: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    z: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    sent: dict[int, tuple[int, ...]] = field(default_factory=dict)
    loss_scale: float = 1.0  # what gradients are times, under fp16

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """A new step."""
        self.balance, self.z = torch.zeros((2,), dtype=torch.float64)
        self.counts, self.sent = torch.zeros(self.experts, dtype=torch.int64), {}

    def rows(self, chosen: Tensor, sent: list[int]) -> None:
        """Adds one microbatch: the experts chosen, and the rows that were sent to each."""
        self.counts += torch.bincount(chosen.flatten(), minlength=self.experts)
        self.sent[self.where.microbatch] = tuple(sent)

    @property
    def dropped(self) -> int:
        """Rows that were chosen and not sent."""
        return int(self.counts.sum()) - sum(map(sum, self.sent.values()))


@dataclass(frozen=True)
class Routed:
    """A whole step's: means over its samples, added up over layers; `counts` [layer][expert]."""

    balance: float = 0.0
    z: float = 0.0
    dropped: int = 0
    counts: tuple[tuple[int, ...], ...] = ()

    @property
    def rows(self) -> int:
        """Rows that tokens chose."""
        return sum(map(sum, self.counts))

    @property
    def imbalance(self) -> float:
        """Rows of the busiest expert over those of an even share, in the most uneven layer."""
        return max((max(c) * len(c) / max(sum(c), 1) for c in self.counts), default=1.0)

    @property
    def load(self) -> list[float]:
        """Each expert's share of all rows."""
        return [sum(c) / max(self.rows, 1) for c in zip(*self.counts, strict=True)]

"""What the routers of a rank did in one step: values of the auxiliary losses, rows of each expert, rows that
were dropped. The step adds them up over ranks once (site step.routing:reduce_from)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from partita.comm.protocol import Where
from partita.parallel.ep.loads import Counts, Loads, count, host_of

Sent = tuple[int, ...] | Tensor  # on a device, where the host was not told


@dataclass
class Seen:
    """Of one microbatch, or several: `counts` [experts] are rows that tokens chose, `sent` those that left
    this rank for each expert."""

    counts: Tensor
    sent: Sent = ()
    chosen: Tensor | None = None  # [batch, seq share, top_k], where they are asked for
    balance: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    z: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @property
    def dropped(self) -> int:
        """Rows that were chosen and not sent: none where the host is not told, as nothing limits them."""
        return 0 if isinstance(self.sent, Tensor) else int(self.counts.sum()) - sum(self.sent)

    def __add__(self, other: Seen) -> Seen:
        mine, theirs = self.sent, other.sent
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            sent = mine + theirs
        else:
            both = zip_longest(_numbers(mine), _numbers(theirs), fillvalue=0)
            sent = tuple(a + b for a, b in both)
        balance, z = self.balance + other.balance, self.z + other.z
        return Seen(self.counts + other.counts, sent, balance=balance, z=z)


@dataclass
class RouterLog:
    """One layer's, by microbatch. An asynchronous pipeline has microbatches of two steps under way."""

    experts: int
    where: Where
    seen: dict[int, Seen] = field(default_factory=dict)
    loss_scale: float = (
        1.0  # what gradients are times: under fp16, and where a step has several updates
    )
    keeps: bool = False  # the choices themselves

    @property
    def now(self) -> Seen:
        """Of the microbatch under way."""
        number = self.where.microbatch
        if number not in self.seen:
            self.seen[number] = self._nothing()
        return self.seen[number]

    @property
    def sent(self) -> dict[int, tuple[int, ...]]:
        """By microbatch, the rows that left this rank for each expert."""
        return {m: _numbers(seen.sent) for m, seen in self.seen.items()}

    def clear(self, before: int = 0) -> None:
        """A new step, whose first microbatch is numbered `before`: what came earlier is forgotten. At 0
        numbers begin anew: everything is."""
        self.seen = {m: seen for m, seen in self.seen.items() if 0 < before <= m}

    def rows(self, chosen: Tensor, sent: Sequence[Counts], real: Tensor | None = None) -> None:
        """Adds one microbatch: the experts chosen by tokens that are `real`, and the rows that were sent to
        each, chunk by chunk."""
        now, late = self.now, [each for each in sent if isinstance(each, Loads)]
        if late:
            now.sent = torch.cat([each.counts for each in late])
            rows = now.sent.view(-1, self.experts).sum(0)
        else:
            now.sent = tuple(n for each in sent for n in host_of(each))
            counted = chosen if real is None else chosen[real.expand(chosen.shape[:-1])]
            rows = count(counted, self.experts)
        # counts that are not where rows are made are the zeros they began as
        now.counts = now.counts + rows if now.counts.device == rows.device else rows
        if self.keeps:
            now.chosen = chosen.clone()  # what it lies in may go elsewhere until backward

    def total(self, end: int | None = None) -> Seen:
        """Of all microbatches, or those before `end`."""
        found = [seen for m, seen in self.seen.items() if end is None or m < end]
        return sum(found[1:], found[0]) if found else self._nothing()

    def _nothing(self) -> Seen:
        return Seen(torch.zeros(self.experts, dtype=torch.int64))


def _numbers(sent: Sent) -> tuple[int, ...]:
    return tuple(sent.tolist()) if isinstance(sent, Tensor) else sent


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

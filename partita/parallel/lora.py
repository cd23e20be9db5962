"""LoRA's two matmuls beside a linear's own (spec/lora.py): y += s B A x, s = alpha / rank.

    forward    h = x A.T,  y += s h B.T
    backward   dh = s dy B,  dx += dh A      with the input half
               h again,  dB += s dy.T h,  dA += dh.T x      with the weight half

With dropout A sees drop(x), x itself what it did: masks are drawn again wherever they are wanted, so that
none is kept.

Sends nothing: a column-parallel linear moves x before both, a row-parallel one moves the sum of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

from torch import Tensor

from partita.parallel.units import Matrix, Weight


@dataclass
class Now:
    """What a layer computes on, where its adapters draw masks: set before each pass."""

    batch: Any = None
    training: bool = False


class Masks(Protocol):
    """Masks as pure functions of step, sample and element (model/dropout.py)."""

    @property
    def probability(self) -> float:
        """Of an element to be dropped."""
        ...

    def mask(self, step: int, batch: Any) -> Tensor:
        """True where an element stays."""
        ...


def _whole(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Drop:
    """Dropout on what one linear's A reads."""

    masks: Masks
    now: Now

    def of_now(self) -> Callable[[Tensor], Tensor]:
        """x with elements dropped, and the gradient of that; nothing is dropped where it does not train."""
        if not self.now.training:
            return _whole
        batch, masks = self.now.batch, self.masks
        return lambda x: masked(masks.mask(batch.step, batch), masks.probability)(x)


class RowMasks(Protocol):
    """Masks of rows of experts as pure functions of step, sample and element (model/dropout.py)."""

    @property
    def probability(self) -> float:
        """Of an element to be dropped."""
        ...

    def mask(self, step: int, counts: Sequence[int], tokens: Tensor) -> Tensor:
        """True where an element stays, of each expert's rows one behind the other."""
        ...


def masked(stays: Tensor, probability: float) -> Callable[[Tensor], Tensor]:
    """x with elements dropped, and the gradient of that."""
    return lambda x: x * stays.view(x.shape) * (1.0 / (1.0 - probability))


@dataclass(frozen=True)
class LowRank:
    """A and B [rank, columns], [rows, rank] of each group (gate and up are two); their rows of y begin at
    `first`."""

    a: tuple[Matrix, ...]
    b: tuple[Matrix, ...]
    scale: float
    first: int = 0
    drop: Drop | None = None
    dropped: Callable[[Tensor], Tensor] = _whole

    def begin(self) -> LowRank:
        """The same for one pass, whose microbatch's masks it draws."""
        if self.drop is None:
            return self
        return replace(self, dropped=self.drop.of_now())

    @staticmethod
    def of(a: Weight, b: Weight, groups: int, scale: float, first: int = 0) -> LowRank:
        """`a` [groups, rank, input dims] and `b` [groups, output dims, rank]; one group has no dim."""
        rank = b.shape[-1]

        def cut(w: Weight, rows: int) -> tuple[Matrix, ...]:
            size = prod(w.shape) // groups
            places = (w.first + i * size for i in range(groups))
            return tuple(w.unit.matrix(w.name, at, (rows, size // rows)) for at in places)

        return LowRank(cut(a, rank), cut(b, prod(b.shape) // (groups * rank)), scale, first)

    def split(self, parts: int) -> tuple[LowRank, ...]:
        """The groups in equal runs, each with rows of its own: an expert's."""
        n = len(self.a) // parts
        runs = (slice(i * n, (i + 1) * n) for i in range(parts))
        return tuple(LowRank(self.a[run], self.b[run], self.scale) for run in runs)

    @property
    def trains(self) -> bool:
        """Whether some part has a gradient."""
        return any(m.trains for m in (*self.a, *self.b))

    def _parts(self, y: Tensor) -> Iterator[tuple[Matrix, Matrix, Tensor]]:
        at = self.first
        for a, b in zip(self.a, self.b, strict=True):
            yield a, b, y.narrow(-1, at, b.shape[0])
            at += b.shape[0]

    def add(self, y: Tensor, x: Tensor) -> None:
        """Adds to y [..., rows], in place."""
        x = self.dropped(x)
        for a, b, part in self._parts(y):
            part.add_(b.multiply(a.multiply(x)), alpha=self.scale)

    def back(self, dy: Tensor, dx: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Adds to dx [..., columns], in place; returns each dh with A, for `accumulate`: where a W comes
        later, and stage 3 has given A back by then, a copy."""
        found = []
        for a, b, part in self._parts(dy):
            dh = b.back(part) * self.scale
            dx += self.dropped(a.back(dh))
            found.append((dh, a.value.clone() if a.queue.defers else a.value))
        return tuple(found)

    def accumulate(self, dy: Tensor, x: Tensor, dhs: tuple[tuple[Tensor, Tensor], ...]) -> None:
        """Adds A's and B's gradients of dy [tokens, rows] and x [tokens, columns]."""
        x = self.dropped(x)
        for (a, b, part), (dh, kept) in zip(self._parts(dy), dhs, strict=True):
            if b.trains:
                b.accumulate(part * self.scale, a.product.forward(x, kept))
            a.accumulate(dh.reshape(-1, dh.shape[-1]), x)

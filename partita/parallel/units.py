"""Flat units in memory: working weights, masters and gradients of weights that are reduced together.

    master    fp32 (fp64 under fp64), what the optimizer updates
    working   what modules multiply by: the master itself, or its bf16 copy
    gradient  as wide as the master; every microbatch adds to it, through `accumulate`

A Weight is a view of its unit: its value shaped as laid, its gradient beside it. Neighbours in one unit
can be multiplied as one matrix, since they lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from partita.parallel.deferred import WeightQueue
from partita.parallel.laid import Laid, local_shape
from partita.parallel.product import PLAIN, Product


def plain(weight: str) -> Product:
    """Every weight by the matmul as it is."""
    return PLAIN


@dataclass(frozen=True)
class Weight:
    """A rank's part of one weight: `value` in the compute dtype, `gradient` in the wide one, both of the
    laid local shape (a padded vocabulary counts its padding). `unit` and `first` say where it lies."""

    name: str
    value: Tensor
    gradient: Tensor
    unit: Unit
    first: int

    @property
    def queue(self) -> WeightQueue:
        """Where work on its gradient goes."""
        return self.unit.queue

    def matrix(self, columns: int = 1) -> Matrix:
        """Value and gradient as [rows, columns]; `columns` counts the trailing dims folded into them."""
        split = self.value.dim() - columns
        rows = prod(self.value.shape[:split])
        value, gradient = self.value.view(rows, -1), self.gradient.view(rows, -1)
        return Matrix(value, gradient, self.queue, self.unit.product_of(self.name))

    def accumulate(self, part: Tensor) -> None:
        """gradient += part, of its number of elements: now, or at the W of a split backward."""
        self.queue.add(self.gradient.add_, part.view(self.gradient.shape))


@dataclass(frozen=True, eq=False)
class Unit:
    """One flat unit of a stage; `places` are (full weight name, first element, elements)."""

    name: str
    places: tuple[tuple[str, int, int], ...]
    shapes: tuple[tuple[int, ...], ...]
    working: Tensor
    master: Tensor
    gradient: Tensor
    queue: WeightQueue = field(default_factory=WeightQueue)
    product_of: Callable[[str], Product] = plain

    def round_working(self) -> None:
        """Rounds the masters into the working copies; nothing where they are one."""
        if self.master is not self.working:
            self.working.copy_(self.master)

    def weights(self) -> dict[str, Weight]:
        """Full name -> Weight."""
        found = {}
        for (name, first, size), shape in zip(self.places, self.shapes, strict=True):
            part = slice(first, first + size)
            value, gradient = self.working[part].view(shape), self.gradient[part].view(shape)
            found[name] = Weight(name, value, gradient, self, first)
        return found


def make_units(
    laid: Laid,
    stage: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    queue: WeightQueue | None = None,
    product_of: Callable[[str], Product] = plain,
) -> list[Unit]:
    """The stage's units, zeroed, from the laid program's layouts: no shape is computed twice. Their
    gradients are added to through one `queue`."""
    queue = queue or WeightQueue()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    for spec in laid.units(stage):
        shapes = tuple(local_shape(t, laid.sizes) for _, t, _ in spec.weights)
        places, first = [], 0
        for (name, _, _), shape in zip(spec.weights, shapes, strict=True):
            places.append((name, first, prod(shape)))
            first += prod(shape)
        master = torch.zeros(first, dtype=wide, device=device)
        gradient = torch.zeros(first, dtype=wide, device=device)
        working = master if dtype == wide else torch.zeros(first, dtype=dtype, device=device)
        found.append(
            Unit(spec.name, tuple(places), shapes, working, master, gradient, queue, product_of)
        )
    return found


@dataclass(frozen=True)
class Matrix:
    """What one matmul multiplies by: [rows, columns] of one weight, or of neighbours side by side."""

    value: Tensor
    gradient: Tensor
    queue: WeightQueue
    product: Product = PLAIN

    def multiply(self, x: Tensor) -> Tensor:
        """x W.T: [..., columns] -> [..., rows]."""
        return self.product.forward(x, self.value)

    def back(self, dy: Tensor) -> Tensor:
        """dy W: [..., rows] -> [..., columns]."""
        return self.product.input_gradient(dy, self.value)

    def accumulate(self, dy: Tensor, x: Tensor) -> None:
        """gradient += dy.T @ x, for dy [tokens, rows] and x [tokens, columns]: now, or at the W of a
        split backward, which keeps both until then."""
        self.queue.add(self._add, dy, x)

    def _add(self, dy: Tensor, x: Tensor) -> None:
        """Exact in the compute dtype, added up in the wide one."""
        if self.gradient.dtype == dy.dtype:
            self.gradient.addmm_(dy.t(), x)
        else:
            self.gradient.add_(self.product.weight_gradient(dy, x))


def matrices(weights: Sequence[Weight], columns: int = 1) -> list[Matrix]:
    """The weights as few matrices as possible: neighbours of one unit are one."""
    runs: list[list[Weight]] = []
    for w in weights:
        last = runs[-1][-1] if runs else None
        joined = (
            last is not None and last.unit is w.unit and last.first + last.value.numel() == w.first
        )
        if joined:
            runs[-1].append(w)
        else:
            runs.append([w])
    found = []
    for run in runs:
        unit, first = run[0].unit, run[0].first
        width = prod(run[0].value.shape[run[0].value.dim() - columns :])
        part = slice(first, first + sum(w.value.numel() for w in run))
        value, gradient = unit.working[part].view(-1, width), unit.gradient[part].view(-1, width)
        found.append(Matrix(value, gradient, unit.queue, unit.product_of(run[0].name)))
    return found

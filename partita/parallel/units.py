"""Flat units in memory: working weights, masters and gradients of weights that are reduced together.

    master    fp32 (fp64 under fp64), what the optimizer updates
    working   what modules multiply by: the master itself, or its bf16 copy
    gradient  as wide as the master; every microbatch adds to it, through `accumulate`

ZeRO cuts a unit over some ranks: each stores its part of the masters (stage 1), of the gradients too (2),
of the working weights too (3). What modules use is always the whole unit: a Buffer, which is lent
memory for a while where only a part is stored. A part of the gradient has memory from the step's first
reduction until the next step begins; at stage 3 a working weight that differs from its master is made as it
is gathered, and no part of it is stored.

Under stochastic rounding the bf16 working weights are the masters. A frozen unit is parameters alone: its
master is what modules multiply by, and its gradient is empty.

A Weight is a view of its unit: its value shaped as laid, its gradient beside it. Neighbours in one unit
can be multiplied as one matrix, since they lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from partita.parallel.deferred import WeightQueue
from partita.parallel.kernels import brgemm16, paired
from partita.parallel.kernels.product import (
    PLAIN,
    Product,
    add_narrow,
    add_small,
    add_steady,
    add_varied,
    is_little_16,
    is_paired,
    is_small,
)
from partita.parallel.laid import Laid, local_shape
from partita.parallel.laid import Unit as LaidUnit
from partita.spec.layout import product_coordinate

Zeros = Callable[
    [str, int, torch.dtype], Tensor
]  # (ledger category, elements, dtype) -> flat zeros


def plain(weight: str) -> Product:
    """Every weight by the matmul as it is."""
    return PLAIN


class Away(Protocol):
    """Gradients that lie elsewhere than on the device: what microbatches make goes there to be added up."""

    def store(self, unit: Unit, into: Tensor, made: Tensor, adds: bool) -> None:
        """Moves `made`, on the device, into a unit's `sums` or `gradient`: added to it, or in its place."""
        ...

    def fetch(self, unit: Unit, stored: Tensor) -> Tensor:
        """A copy on the device of what is stored."""
        ...

    def settle(self) -> None:
        """All that was stored is there."""
        ...


class Shards(Protocol):
    """Working shards of stage 3 that lie elsewhere than on the device."""

    def expect(self, units: Sequence[Unit]) -> None:
        """They will be gathered soon."""
        ...

    def bring(self, unit: Unit) -> Tensor:
        """A copy of a unit's shard on the device."""
        ...

    def changed(self, unit: Unit) -> None:
        """A unit's shard is another now."""
        ...

    def sent(self, unit: Unit, start_s: float) -> None:
        """It came from the device, since `start_s`."""
        ...


class Buffer:
    """A flat tensor and shaped views of it, which follow it to other memory; without memory the views
    are empty, so that using a weight which is not there is an error."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.tensor: Tensor | None = None
        self._views: list[tuple[Tensor, int, tuple[int, ...]]] = []

    def view(self, first: int, shape: tuple[int, ...]) -> Tensor:
        """Elements from `first` on, in row-major order."""
        made = torch.empty(0, dtype=self.dtype, device=self.device)
        self._views.append((made, first, shape))
        if self.tensor is not None:
            _follow(made, self.tensor, first, shape)
        return made

    def lend(self, tensor: Tensor) -> None:
        """From now on the views show this tensor, of `size` elements."""
        self.tensor = tensor
        for view, first, shape in self._views:
            _follow(view, tensor, first, shape)

    def take(self) -> Tensor:
        """The memory back."""
        tensor, self.tensor = self.tensor, None
        assert tensor is not None, "nothing is lent"
        for view, *_ in self._views:
            view.set_()
        return tensor


def _follow(view: Tensor, tensor: Tensor, first: int, shape: tuple[int, ...]) -> None:
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    with torch.no_grad():
        view.set_(tensor.untyped_storage(), tensor.storage_offset() + first, shape, strides)


@dataclass(frozen=True)
class Weight:
    """A rank's part of one weight: `value` in the compute dtype, `gradient` in the wide one, both of the
    laid local `shape` (a padded vocabulary counts its padding) while the unit is there. `unit` and `first`
    say where it lies."""

    name: str
    shape: tuple[int, ...]
    value: Tensor
    gradient: Tensor
    unit: Unit
    first: int

    @property
    def queue(self) -> WeightQueue:
        """Where work on its gradient goes."""
        return self.unit.queue

    @property
    def trains(self) -> bool:
        """Whether it has a gradient."""
        return not self.unit.spec.frozen

    def matrix(self, columns: int = 1) -> Matrix:
        """Value and gradient as [rows, columns]; `columns` counts the trailing dims folded into them."""
        rows = prod(self.shape[: len(self.shape) - columns])
        return self.unit.matrix(self.name, self.first, (rows, prod(self.shape) // rows))

    def accumulate(self, part: Tensor) -> None:
        """gradient += part, of its number of elements: now, or at the W of a split backward; nothing where
        it is frozen."""
        if self.trains:
            self.queue.add(self.gradient.add_, part.view(self.shape))


@dataclass(frozen=True, eq=False)
class Unit:
    """One flat unit of a stage; `places` are (full weight name, first element, elements) of the whole.

    `working`, `master` and `gradient` are what is stored: flat, whole or this rank's `part` of the whole; the
    last two lie beside each other, element by element; `gradient` is of `sums`, what microbatches add up in.
    `values` and `gradients` are the whole unit.
    """

    spec: LaidUnit
    places: tuple[tuple[str, int, int], ...]
    shapes: tuple[tuple[int, ...], ...]
    part: slice
    working: Tensor
    master: Tensor
    gradient: Tensor
    sums: Tensor
    values: Buffer
    gradients: Buffer
    queue: WeightQueue = field(default_factory=WeightQueue)
    product_of: Callable[[str], Product] = plain

    @property
    def name(self) -> str:
        """Its site without the kind."""
        return self.spec.name

    @property
    def shard(self) -> Tensor:
        """This rank's part of the working values, where it is stored."""
        return self.working if self.spec.stage == 3 else self.working[self.part]

    @property
    def casts(self) -> bool:
        """Whether working values are made from the masters as they are gathered."""
        return self.spec.stage == 3 and self.working.numel() < self.master.numel()

    def handed_in(self, whole: Tensor) -> Tensor:
        """This rank's part of the working values, to be gathered into `whole`: stored, or rounded there."""
        return whole[self.part].copy_(self.master) if self.casts else self.shard

    def round_working(self) -> None:
        """Rounds the masters into this rank's part of the working values; nothing where they are one, or
        where it is not stored."""
        if not self.casts and self.master.data_ptr() != self.shard.data_ptr():
            self.shard.copy_(self.master)

    def hold_gradient(self) -> None:
        """Its part of the gradient has memory, whatever is in it."""
        self._resize_gradient(self.gradient.nbytes)

    def drop_gradient(self) -> None:
        """That memory is free again; views of it stay, and none may be used: torch would read at 0."""
        self._resize_gradient(0)

    def _resize_gradient(self, size: int) -> None:
        storage = self.gradient.untyped_storage()
        if storage.nbytes() != size:
            storage.resize_(size)

    def weights(self) -> dict[str, Weight]:
        """Full name -> Weight."""
        found = {}
        for (name, first, _), shape in zip(self.places, self.shapes, strict=True):
            value, gradient = self.values.view(first, shape), self.gradients.view(first, shape)
            found[name] = Weight(name, shape, value, gradient, self, first)
        return found

    def matrix(self, name: str, first: int, shape: tuple[int, int]) -> Matrix:
        """Elements from `first` on as one matrix, multiplied as the weight `name` is."""
        value, gradient = self.values.view(first, shape), self.gradients.view(first, shape)
        trains = not self.spec.frozen
        return Matrix(value, gradient, shape, self.queue, self.product_of(name), trains)


def make_units(
    laid: Laid,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    queue: WeightQueue | None = None,
    product_of: Callable[[str], Product] = plain,
    apart: bool = False,
    elsewhere: Mapping[str, Zeros] | None = None,
) -> list[Unit]:
    """The units that a rank stores, zeroed, from the laid program's layouts: no shape is computed twice.
    Their gradients are added to through one `queue`. `apart`: working weights are never the masters.
    `elsewhere`: who allocates the categories that do not lie on the device."""
    queue = queue or WeightQueue()
    at = laid.mesh.coords(rank)
    alone = laid.request.plan.precision.rounding == "stochastic"  # no masters
    found = []
    for spec in laid.units(at["pp"]):
        shapes = tuple(local_shape(t, laid.sizes) for _, t, _ in spec.weights)
        places, first = [], 0
        for (name, _, _), shape in zip(spec.weights, shapes, strict=True):
            places.append((name, first, prod(shape)))
            first += prod(shape)
        ways, mine = product_coordinate(laid.sizes, at, spec.shard)
        each = -(-first // ways)
        part = slice(mine * each, (mine + 1) * each)
        tensors = _allocate(spec, each * ways, part, dtype, device, elsewhere or {}, apart, alone)
        found.append(Unit(spec, tuple(places), shapes, part, *tensors, queue, product_of))
    return found


def _zeros(
    elsewhere: Mapping[str, Zeros], device: torch.device | str, category: str, size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if category in elsewhere:
        return elsewhere[category](category, size, dtype)
    return torch.zeros(size, dtype=dtype, device=device)


def _allocate(
    spec: LaidUnit, size: int, part: slice, dtype: torch.dtype, device: torch.device | str,
    elsewhere: Mapping[str, Zeros], apart: bool, alone: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Buffer, Buffer]:  # fmt: skip
    """What a rank stores of a unit of `size` elements: working, master, gradient, and its sums."""
    stage = spec.stage
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if stage < 3:
        elsewhere = {c: zeros for c, zeros in elsewhere.items() if c != "parameters"}
    apart = apart or "parameters" in elsewhere
    zeros = partial(_zeros, elsewhere, device)
    each = part.stop - part.start
    one = spec.frozen or alone or (dtype == wide and not apart)
    casts = stage == 3 and not one and not {"optimizer", "parameters"} & elsewhere.keys()
    working = zeros("parameters", 0 if casts else each if stage == 3 else size, dtype)
    shard = working if stage == 3 else working[part]
    master = shard if one else zeros("optimizer", each, wide)
    values, gradients = Buffer(size, dtype, device), Buffer(size, wide, device)
    if stage < 3:
        values.lend(working)
    if spec.frozen:
        none = torch.empty(0, dtype=wide, device=device)
        return working, master, none, none, values, gradients
    sums = gradient = zeros("gradients", each if spec.cuts_gradient else size, wide)
    if not spec.cuts_gradient:
        if "gradients" not in elsewhere:
            gradients.lend(gradient)
        gradient = gradient[part]
    return working, master, gradient, sums, values, gradients


@dataclass(frozen=True)
class Matrix:
    """What one matmul multiplies by: `shape` [rows, columns] of one weight, or of neighbours side by
    side."""

    value: Tensor
    gradient: Tensor
    shape: tuple[int, int]
    queue: WeightQueue
    product: Product = PLAIN
    trains: bool = True

    def multiply(self, x: Tensor) -> Tensor:
        """x W.T: [..., columns] -> [..., rows]."""
        return self.product.forward(x, self.value)

    def back(self, dy: Tensor) -> Tensor:
        """dy W: [..., rows] -> [..., columns]."""
        return self.product.input_gradient(dy, self.value)

    def accumulate(self, dy: Tensor, x: Tensor) -> None:
        """gradient += dy.T @ x, for dy [tokens, rows] and x [tokens, columns]: now, or at the W of a
        split backward, which keeps both until then; nothing where it is frozen."""
        if self.trains:
            self.queue.add(add_product, self.gradient, dy, x, self.product, True)


def add_product(
    gradient: Tensor, dy: Tensor, x: Tensor, product: Product, steady: bool = False
) -> None:
    """gradient += dy.T @ x, exact in the compute dtype, added up in the wide one; small ones in the wide one
    throughout. `steady`: such numbers of tokens come again."""
    if gradient.dtype == dy.dtype:
        if steady:
            add_steady(gradient, dy, x)
        else:
            add_varied(gradient, dy, x)
    elif product is PLAIN and is_paired(dy, x, steady):
        paired.add(gradient, dy, x)
    elif product is PLAIN and is_little_16(dy, (len(dy), len(gradient), x.shape[1])):
        brgemm16.add(gradient, dy, x)
    elif product is PLAIN and is_small(dy, x):
        add_small(gradient, dy, x)
    else:
        add_narrow(gradient, product.weight_gradient(dy, x))


def matrices(weights: Sequence[Weight], columns: int = 1) -> list[Matrix]:
    """The weights as few matrices as possible: neighbours of one unit are one."""
    runs: list[list[Weight]] = []
    for w in weights:
        last = runs[-1][-1] if runs else None
        joined = (
            last is not None and last.unit is w.unit and last.first + prod(last.shape) == w.first
        )
        if joined:
            runs[-1].append(w)
        else:
            runs.append([w])
    found = []
    for run in runs:
        first, rest = run[0], prod(run[0].shape[len(run[0].shape) - columns :])
        size = sum(prod(w.shape) for w in run)
        found.append(first.unit.matrix(first.name, first.first, (size // rest, rest)))
    return found

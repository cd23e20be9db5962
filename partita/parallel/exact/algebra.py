"""Exact arithmetic for execute.py: local tensors modulo a prime.

A local tensor knows which *global* indices it holds, so using one that is not whole is an error and
never a number. The whole file runs on one rank; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from partita.base.errors import PartitaError
from partita.spec.program import Tensor

P = 2**31 - 1  # a product of two fits in 64 bits
Values = NDArray[np.int64]


class ExecuteError(PartitaError):
    """A laid program that cannot be executed: a collective is missing, or a tensor was not kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """What one rank holds of a tensor: the global indices of every dim, and the values there."""

    dims: tuple[str, ...]
    spans: tuple[range, ...]
    values: Values

    def span(self, dim: str) -> range:
        """Global indices held along a dim."""
        return self.spans[self.dims.index(dim)]


Get = Callable[[str], Local]
Found = dict[str, Local]


@dataclass(frozen=True)
class Place:
    """Where an op runs: the block's tensors, which part of each its rank holds, and which samples:
    `first` is the step's sample at index 0 of the batch dim; `order` the global position of each laid
    place of seq (and of keys)."""

    block: str
    tensors: Mapping[str, Tensor]
    share: Callable[[Tensor], tuple[range, ...]]
    step: int
    first: int
    order: Values
    falls: bool = False  # attention's scores fall off with distance (ALiBi)
    drops: bool = False  # LoRA's adapters read x times a mask
    tokens: int = 0  # of a sequence; what lies at later positions fills it up

    def positions(self, places: range) -> Values:
        """Where in the sequence laid places lie."""
        return self.order[places.start : places.stop]

    def real(self, places: range) -> Values:
        """1 where a laid place holds a token of the sequence, 0 where it fills it up."""
        return (self.positions(places) < self.tokens).astype(np.int64)

    def dims(self, name: str) -> tuple[str, ...]:
        """Names of a tensor's dims."""
        return tuple(d.name for d in self.tensors[name].dims)

    def size(self, name: str, dim: str) -> int:
        """Logical size of a tensor's dim."""
        return next(d.size for d in self.tensors[name].dims if d.name == dim)

    def filled(self, name: str, value: int = 0) -> Local:
        """A local part full of one value."""
        spans = self.share(self.tensors[name])
        return Local(self.dims(name), spans, np.full([len(s) for s in spans], value, np.int64))

    def drawn(self, name: str, key: str) -> Local:
        """A local part of random numbers that depend on the element's sample and place alone."""
        dims, spans = self.dims(name), self.share(self.tensors[name])
        places: list[Sequence[int]] = []
        for d, s in zip(dims, spans, strict=True):
            if d == "batch":
                places.append(range(s.start + self.first, s.stop + self.first))
            else:
                places.append(tuple(self.positions(s).tolist()) if d in ("seq", "keys") else s)
        return Local(dims, spans, noise(f"{key} {self.step}", tuple(places)))


@lru_cache(maxsize=2048)
def noise(key: str, places: tuple[Sequence[int], ...]) -> Values:
    """Numbers modulo P that depend on the key and the global index alone; drawn once, not to be written."""
    found = np.array(crc32(key.encode()) % P, np.int64)
    for place in places:
        index = np.asarray(place, np.int64)
        found = (found[..., None] * 48271 + (index + 1) * 1_664_525) % P
        found = (found * found + 12_345) % P
    found = (found * found + found * 69_621) % P
    found.flags.writeable = False
    return found


def inverse(x: Values) -> Values:
    """1/x modulo P, element by element. Raises ExecuteError at 0, which data alone does not make."""
    if not x.all():
        raise ExecuteError("a division by zero: a sum is missing")
    return np.array([pow(v, -1, P) for v in x.ravel().tolist()], np.int64).reshape(x.shape)


@dataclass(frozen=True, slots=True)
class Fit:
    """How tensors of given dims meet over `out` and what else they have. By tensor: its dims in order, and
    where it has none; by dim of `out`: (tensor, dim) that has it; which (tensor, dim) are to be one; and the
    dims behind `out`."""

    views: tuple[tuple[tuple[int, ...], tuple[slice | None, ...]], ...]
    held: tuple[tuple[int, int], ...]
    same: tuple[tuple[int, int, int, int], ...]
    behind: tuple[int, ...]


@cache
def _fit(out: tuple[str, ...], *dims: tuple[str, ...]) -> Fit:
    first: dict[str, tuple[int, int]] = {}
    same = []
    for i, x in enumerate(dims):
        for at, d in enumerate(x):
            if d in first:
                same.append((*first[d], i, at))
            first.setdefault(d, (i, at))
    order = (*out, *(d for d in first if d not in out))
    views = [
        (
            tuple(x.index(d) for d in order if d in x),
            tuple(slice(None) if d in x else None for d in order),
        )
        for x in dims
    ]
    behind = tuple(range(len(out), len(order)))
    return Fit(tuple(views), tuple(first[d] for d in out), tuple(same), behind)


def _met(out: tuple[str, ...], xs: Sequence[Local]) -> Fit:
    """How they meet; raises ExecuteError where they hold other indices of a dim they share."""
    fit = _fit(out, *(x.dims for x in xs))
    for i, a, j, b in fit.same:
        one, other = xs[i].spans[a], xs[j].spans[b]
        if one is not other and one != other:
            raise ExecuteError(f"{xs[i].dims[a]}: {one} meets {other}: a collective is missing")
    return fit


def meet(xs: Sequence[Local]) -> None:
    """Tensors that meet in one op hold the same indices of the dims they share."""
    _met((), xs)


def contract(out: tuple[str, ...], *xs: Local) -> Local:
    """The product of all, summed over the dims that `out` leaves out."""
    fit, value = _met(out, xs), None
    for x, (order, at) in zip(xs, fit.views, strict=True):
        factor = x.values.transpose(order)[at]
        value = factor if value is None else value * factor % P
    assert value is not None
    summed = value.sum(axis=fit.behind) % P
    return Local(out, tuple([xs[i].spans[a] for i, a in fit.held]), summed)


def total(out: tuple[str, ...], *xs: Local) -> Local:
    """The sum of all, those with fewer dims repeated along the others."""
    fit = _met(out, xs)
    assert not fit.behind
    value = sum(x.values.transpose(order)[at] for x, (order, at) in zip(xs, fit.views, strict=True))
    return Local(out, tuple([xs[i].spans[a] for i, a in fit.held]), value % P)


def times(x: Local, factor: Values | int) -> Local:
    """x with its values multiplied, element by element."""
    return Local(x.dims, x.spans, x.values * factor % P)

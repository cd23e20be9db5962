"""Exact arithmetic for execute.py: local tensors modulo a prime.

A local tensor knows which *global* indices it holds, so using one that is not whole is an error and
never a number. The whole file runs on one rank; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
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
        part = self.filled(name)
        found = [np.arange(s.start, s.stop, dtype=np.int64) for s in part.spans]
        for i, (d, s) in enumerate(zip(part.dims, part.spans, strict=True)):
            if d == "batch":
                found[i] += self.first
            elif d in ("seq", "keys"):
                found[i] = self.positions(s)
        return replace(part, values=noise(f"{key} {self.step}", found))


def noise(key: str, spans: Sequence[range | Values]) -> Values:
    """Numbers modulo P that depend on the key and the global index alone."""
    found = np.array(crc32(key.encode()) % P, np.int64)
    for span in spans:
        index = np.asarray(span, np.int64)
        found = (found[..., None] * 48271 + (index + 1) * 1_664_525) % P
        found = (found * found + 12_345) % P
    return (found * found + found * 69_621) % P


def inverse(x: Values) -> Values:
    """1/x modulo P, element by element. Raises ExecuteError at 0, which data alone does not make."""
    if not x.all():
        raise ExecuteError("a division by zero: a sum is missing")
    return np.array([pow(v, -1, P) for v in x.ravel().tolist()], np.int64).reshape(x.shape)


def meet(xs: Sequence[Local]) -> None:
    """Tensors that meet in one op hold the same indices of the dims they share."""
    spans: dict[str, range] = {}
    for x in xs:
        for dim, span in zip(x.dims, x.spans, strict=True):
            if spans.setdefault(dim, span) != span:
                raise ExecuteError(f"{dim}: {spans[dim]} meets {span}: a collective is missing")


def _view(x: Local, order: Sequence[str]) -> Values:
    values = x.values.transpose([x.dims.index(d) for d in order if d in x.dims])
    return values.reshape([len(x.span(d)) if d in x.dims else 1 for d in order])


def contract(out: tuple[str, ...], *xs: Local) -> Local:
    """The product of all, summed over the dims that `out` leaves out."""
    meet(xs)
    spans = {d: s for x in xs for d, s in zip(x.dims, x.spans, strict=True)}
    order = (*out, *(d for d in spans if d not in out))
    value = reduce(lambda a, b: a * b % P, (_view(x, order) for x in xs))
    summed = value.sum(axis=tuple(range(len(out), len(order)))) % P
    return Local(out, tuple(spans[d] for d in out), summed)


def total(out: tuple[str, ...], *xs: Local) -> Local:
    """The sum of all, those with fewer dims repeated along the others."""
    meet(xs)
    spans = {d: s for x in xs for d, s in zip(x.dims, x.spans, strict=True)}
    value = sum((_view(x, out) for x in xs), np.zeros([len(spans[d]) for d in out], np.int64))
    return Local(out, tuple(spans[d] for d in out), value % P)


def times(x: Local, factor: Values | int) -> Local:
    """x with its values multiplied, element by element."""
    return replace(x, values=x.values * factor % P)

"""How one logical tensor lies on the mesh: a compact rule, and one function that everything reads.

`pieces(mesh, rank)` lists boxes of the logical tensor. The elements of a box, in row-major order, are
contiguous in the rank's local storage from `start` on; a box that would not be is split. Exactly one
owner of an element is *primary*: norms, checkpoints and hashes count that one. It is decided by
coordinates, never by comparing boxes: with shared heads and flat shards the same element lies in
differently shaped boxes.

    wk [2 kv heads, 4, 6] on tp4        rank 0, 1 hold head 0 (0 primary); rank 2, 3 head 1
    table [10, 3], padded to 12, tp4    rows 0-2, 3-5, 6-8, 9-9: padding belongs to no box
    down [2, 10], padded to 12, tp4     rank 3 stores rows of 3: boxes (0, 9) at 0 and (1, 9) at 3
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod

from partita.spec.mesh import DENSE, EXPERT, Mesh
from partita.spec.program import Sizes, Tensor

Box = tuple[tuple[int, int], ...]  # (first, end) of every dim


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of a dim that is cut on its own, in whole units (heads, rows). `padded`: ways divide
    that many units, those beyond the size are padding. `share`: with fewer units than ways,
    neighbours hold the same one (else some ranks hold none)."""

    start: int
    size: int
    units: int
    padded: int = 0
    share: bool = False

    def span(self, ways: int, at: int) -> tuple[int, int, bool]:
        """(first, end, whether this holder is the primary one) of the `at`-th of `ways` parts."""
        width = self.size // self.units
        if self.share and self.units < ways:
            holders = ways // self.units
            first, end, primary = at // holders, at // holders + 1, at % holders == 0
        elif self.padded:
            each = self.padded // ways
            first, end, primary = at * each, (at + 1) * each, True
        else:
            base, more = divmod(self.units, ways)
            first = at * base + min(at, more)
            end, primary = first + base + (at < more), True
        return self._clip(first * width), self._clip(end * width), primary

    def held(self, ways: int, at: int) -> int:
        """What the `at`-th of `ways` stores of it, padding counted."""
        first, end, _ = self.span(ways, at)
        return self.widest(ways) if self.padded else end - first

    def widest(self, ways: int) -> int:
        """What the holder of most stores of it, padding counted."""
        width = self.size // self.units
        if self.share and self.units < ways:
            return width
        return -(-(self.padded or self.units) // ways) * width

    def _clip(self, offset: int) -> int:
        return self.start + min(offset, self.size)


@dataclass(frozen=True, slots=True)
class Cut:
    """One dim cut by a product of axes (outermost first), section by section."""

    dim: int
    axes: tuple[str, ...]
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the logical tensor, where it starts in local storage, and whether it counts."""

    box: Box
    start: int
    primary: bool

    def numel(self) -> int:
        """Elements in the box."""
        return prod(b - a for a, b in self.box)


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor of `shape` lie.

    `stages`: pp coordinates that hold it, the first is primary (a tied weight lies on two).
    `view`: the axes it speaks of, dense or experts'. A weight of a flat unit: `unit` are the unit's
    layouts in order and `index` its own place; each takes as much of the buffer as the rank that holds
    most of it stores, so that all ranks' buffers are alike. `flat`: axes over which the buffer is
    sharded, each rank storing a ceil(1/ways) of it.
    """

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...] = ()
    stages: tuple[int, ...] = (0,)
    view: tuple[str, ...] = DENSE
    flat: tuple[str, ...] = ()
    unit: tuple[Layout, ...] = ()
    index: int = 0

    @property
    def alone(self) -> Layout:
        """The weight by itself: what a module multiplies by, wherever its unit's shards lie."""
        return replace(self, flat=(), unit=(), index=0)

    def pieces(self, mesh: Mesh, rank: int) -> list[Piece]:
        """What the rank holds of the tensor, in the order of its local storage."""
        at = mesh.coords(rank)
        if at["pp"] not in self.stages:
            return []
        pieces = list(self._dense(mesh, at))
        if not self.unit:
            return pieces
        if not self.flat:
            before = sum(x.stored(mesh.sizes) for x in self.unit[: self.index])
            return [Piece(p.box, before + p.start, p.primary) for p in pieces]
        stored = [x.stored(mesh.sizes) for x in self.unit]
        before, total = sum(stored[: self.index]), sum(stored)
        ways, mine = product_coordinate(mesh.sizes, at, self.flat)
        each = -(-total // ways)
        shard = (mine * each, min((mine + 1) * each, total))
        return [p for x in pieces for p in _clip_to_shard(x, before, shard)]

    def stored(self, sizes: Sizes) -> int:
        """Elements of a rank's local storage before flat sharding, padding counted: alike on all."""
        if not self.cuts:
            return prod(self.shape)
        shape = list(self.shape)
        for c in self.cuts:
            ways = prod([sizes[a] for a in c.axes])
            shape[c.dim] = sum([s.widest(ways) for s in c.sections])
        return prod(shape)

    def _dense(self, mesh: Mesh, at: Mapping[str, int]) -> Iterator[Piece]:
        """Boxes of the local tensor, which is the sections side by side along each cut dim."""
        used = {a for c in self.cuts for a in c.axes} | set(self.flat) | {"pp"}
        primary = at["pp"] == self.stages[0] and all(at[a] == 0 for a in self.view if a not in used)
        spans: list[list[Span]] = [[(0, n, True, 0)] for n in self.shape]
        held = list(self.shape)
        for c in self.cuts:
            ways, mine = product_coordinate(mesh.sizes, at, c.axes)
            widths = [s.held(ways, mine) for s in c.sections]
            starts = accumulate(widths[:-1], initial=0)
            spans[c.dim] = [
                (*s.span(ways, mine), x) for s, x in zip(c.sections, starts, strict=True)
            ]
            held[c.dim] = sum(widths)
        broken = (
            d for d, s in enumerate(spans) if len(s) > 1 or s[0][1] - s[0][0] < held[d]
        )  # its rows are not neighbours in storage
        last = max(broken, default=0)
        rows = [_explode(s) if d < last else s for d, s in enumerate(spans)]
        strides = [prod(held[d + 1 :]) for d in range(len(held))]
        for choice in product(*rows):
            box = tuple((a, b) for a, b, *_ in choice)
            start = sum(x * stride for (*_, x), stride in zip(choice, strides, strict=True))
            piece = Piece(box, start, primary and all(p for _, _, p, _ in choice))
            if piece.numel():
                yield piece


Span = tuple[int, int, bool, int]  # first, end, whether primary, where it starts in the local dim


def _explode(spans: Sequence[Span]) -> list[Span]:
    return [(i, i + 1, flag, x + i - a) for a, b, flag, x in spans for i in range(a, b)]


def product_coordinate(sizes: Sizes, at: Mapping[str, int], axes: Sequence[str]) -> tuple[int, int]:
    """Ways and coordinate over a product of axes, the last one innermost."""
    ways, coordinate = 1, 0
    for a in axes:
        ways, coordinate = ways * sizes[a], coordinate * sizes[a] + at[a]
    return ways, coordinate


def _clip_to_shard(p: Piece, offset: int, shard: tuple[int, int]) -> Iterator[Piece]:
    """The part of a piece inside a range of the flat buffer: at most 2 * ndim - 1 boxes."""
    first = max(shard[0] - offset - p.start, 0)
    end = min(shard[1] - offset - p.start, p.numel())
    for box, start in range_boxes(p.box, first, end):
        yield Piece(box, p.start + offset + start - shard[0], p.primary)


def range_boxes(box: Box, first: int, end: int) -> Iterator[tuple[Box, int]]:
    """Row-major elements first..end of a box, as boxes: a row's tail, whole rows, a row's head."""
    if first >= end:
        return
    (low, _), *rest = box
    if not rest:
        yield ((low + first, low + end),), first
        return
    row = prod(b - a for a, b in rest)
    top, bottom = first // row, end // row
    inner = tuple(rest)
    if first % row or top == bottom:
        stop = min(end, (top + 1) * row)
        for part, start in range_boxes(inner, first - top * row, stop - top * row):
            yield ((low + top, low + top + 1), *part), top * row + start
        if stop == end:
            return
        top += 1
    if bottom > top:
        yield ((low + top, low + bottom), *inner), top * row
    for part, start in range_boxes(inner, 0, end - bottom * row):
        yield ((low + bottom, low + bottom + 1), *part), bottom * row + start


def layout_of(weight: Tensor, sizes: Sizes, stages: tuple[int, ...] = (0,)) -> Layout:
    """The layout that a laid weight states."""
    cuts = []
    for i, d in enumerate(weight.dims):
        if d.cut:
            ways = d.ways(sizes)
            padded = d.local(sizes) * ways if d.padded else 0
            share = d.size < ways and not d.padded
            section = Section(0, d.size, d.size, padded, share)
            cuts.append(Cut(i, d.cut, (section,)))
    experts = any(d.name == "experts" for d in weight.dims)
    view = EXPERT if experts else DENSE
    return Layout(tuple(d.size for d in weight.dims), tuple(cuts), stages, view)


def flat_unit(layouts: Sequence[Layout], axes: tuple[str, ...] = ()) -> list[Layout]:
    """The layouts of a unit: side by side in one flat buffer, sharded over `axes`."""
    whole = tuple(x.alone for x in layouts)
    return [replace(x, flat=axes, unit=whole, index=i) for i, x in enumerate(whole)]


def intersect(a: Box, b: Box) -> Box | None:
    """The box two boxes share, or None."""
    both = tuple((max(x, u), min(y, v)) for (x, y), (u, v) in zip(a, b, strict=True))
    return both if all(x < y for x, y in both) else None

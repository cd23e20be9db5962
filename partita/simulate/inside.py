"""The worst moment inside a block: bytes beyond what a microbatch of it keeps.

A walk over its ops, forward and backward, of what is there at each:

    forward     a value from the op that writes it to the last that reads it; of what is kept, what is made
    backward    a gradient from the last op that reads its value to the one that wrote it; of what is kept,
                what an op wants that is still to come; what moves again, and what is made again

    input half  a backward whose weight half comes later: what that reads stays, inputs of products with
                weights and the gradients of what these make

A little matrix in fp32 is turned for forward, or what it multiplies and some of what it makes, where that is
less (parallel/kernels/brgemm.py; elsewhere half a MiB less is held). A layer
with matmuls among what it makes again does so as a whole, before its backward, which holds its output
too; else each piece is made where backward comes to the ops that want it. What comes round a ring is seen
share by share, two at a time. A value that carries no gradient has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

from partita.parallel.read import (
    BYTES,
    bytes_of,
    is_run_again,
    once_inside,
    once_of_segments,
    replayed,
)
from partita.spec.program import (
    DRAWN_AT_ONCE,
    LITTLE_HELD,
    LITTLE_MATRIX,
    LITTLE_ROWS,
    NARROW,
    NORMED_AT_ONCE,
    Block,
    Op,
    Sizes,
)

DRAWN_BYTES = 24  # of an element of a mask that is drawn: 20 of Philox (comm/random), its counters

PRODUCTS = ("linear", "lookup", "conv")  # of whose weights the gradients are made in a weight half

Span = tuple[int, int, int]  # first and last op, bytes


@once_inside
def transient_bytes(block: Block, sizes: Sizes, goes: bool = True) -> int:
    """At the worst moment. `goes`: what is kept is let go of op by op, else with the whole block."""
    return worst_op(block, sizes, goes)[0]


@once_inside
def worst_half(block: Block, sizes: Sizes) -> tuple[int, int, int]:
    """(bytes at the worst moment of a forward, of an input half whose weight half comes later), beyond what
    the block keeps, and of the weight half, beyond what that reads. What is made again is so in the input
    half."""
    walk = _Walk(block, sizes, True)
    forward, half = (
        max(max(0, *_sums(spans, walk.count)) for spans in each)
        for each in ([walk.forward(False)], [walk.forward(), walk.backward(halves=True)])
    )
    made = read_later(block)[1]
    products = (walk.gradient(op, w) for op in walk.ops for w in op.weights if op.writes in made)
    return forward, half, max(products, default=0)


@once_inside
def worst_op(block: Block, sizes: Sizes, goes: bool = True, beside: int = 0) -> tuple[int, int]:
    """(bytes at the worst moment, of what the block keeps those that are not there then). `beside`: what of
    other things stands beside a backward alone, which tells which moment it is."""
    walk, found = _Walk(block, sizes, goes), list[tuple[int, int, int]]()
    for more, spans in ((0, list(walk.forward())), (beside, list(walk.backward()))):
        sums = _sums(spans, walk.count)
        at = max(range(walk.count), key=sums.__getitem__)
        gone = -sum(size for first, last, size in spans if size < 0 and first <= at <= last)
        found.append((sums[at] + more, sums[at], gone))
    return max(0, *(size for _, size, _ in found)), max(found)[2]


def _sums(spans: Iterable[Span], count: int) -> list[int]:
    """[op]: bytes that are there."""
    steps = [0] * (count + 1)
    for first, last, size in spans:
        if first <= last:
            steps[max(first, 0)] += size
            steps[last + 1] -= size
    return list(accumulate(steps[:-1]))


@once_of_segments
def read_later(block: Block) -> tuple[frozenset[str], frozenset[str]]:
    """What a weight half reads: inputs of a block's products with weights, and what these and lookups make,
    of which it reads the gradients."""
    products = [op for op in block.ops() if op.weights and op.kind in PRODUCTS]
    inputs = frozenset(t for op in products for t in op.saves)
    return inputs, frozenset(op.writes for op in products)


@dataclass(frozen=True)
class _Lives:
    """Of the ops of a block, whatever is kept: which makes a tensor (none before the first, which makes the
    input), the last that reads it (the output is there to the end), the first and the last whose backward
    does; the last op of each segment."""

    written: dict[str, int]
    read: dict[str, int]
    saved: dict[str, tuple[int, int]]
    ends: dict[str, int]


@once_of_segments
def _lives(block: Block) -> _Lives:
    ops = block.ops()
    written = {op.writes: i for i, op in enumerate(ops)}
    saved: dict[str, tuple[int, int]] = {}
    for i, op in enumerate(ops):
        for t in op.saves:
            written.setdefault(t, i if block.tensors[t].role == "stat" else -1)
            saved[t] = saved.get(t, (i, i))[0], i
    read = {t: i for i, op in enumerate(ops) for t in op.reads}
    return _Lives(
        {**written, block.input: -1},
        {**read, block.output: len(ops) - 1},
        saved,
        {op.segment: i for i, op in enumerate(ops)},
    )


@once_of_segments
def _share_bytes(block: Block, sizes: Sizes) -> dict[str, int]:
    """Bytes of each tensor, of what comes round a ring two shares."""
    each = bytes_of(block, sizes)
    return each | {op.writes: 2 * each[op.reads[0]] for op in block.ops() if op.kind == "ring"}


@once_of_segments
def _inside_ops(block: Block, sizes: Sizes) -> tuple[list[Span], list[Span], list[Span]]:
    """What lives inside one op, whatever is kept: forward, backward, and of backward the gradients of
    weights."""
    walk = _Walk(block, sizes, True)
    beside = list(walk.beside())
    there, back, gradients = ([*beside], [*beside], list[Span]())
    for i, op in enumerate(walk.ops):  # turned, packed
        packed = walk.packed(op)
        there.append((i, i, sum(walk.turned(op, w) for w in op.weights if walk.is_little(w))))
        there.append((i, i, packed + walk.normed(op, 2, 1)))
        # the gate, up's gradient by it, the gate's
        back.append((i, i, 3 * packed + walk.normed(op, 4, 2, is_backward=True)))
        gradients.append((i, i, sum(walk.gradient(op, w) for w in op.weights)))
        if any(e.phase == "B" and not e.gradient for e in op.events):
            wants = [k for k, o in enumerate(walk.ops) if op.writes in o.reads]
            back.append((min(wants, default=i), max(wants, default=i), walk.each[op.writes]))
    return tuple([span for span in spans if span[2]] for spans in (there, back, gradients))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Walk:
    """Spans of a block's tensors over its ops, beyond what the block keeps."""

    block: Block
    sizes: Sizes
    goes: bool

    @cached_property
    def ops(self) -> list[Op]:
        return self.block.ops()

    @cached_property
    def count(self) -> int:
        return len(self.ops)

    @cached_property
    def each(self) -> dict[str, int]:
        return _share_bytes(self.block, self.sizes)

    @cached_property
    def lives(self) -> _Lives:
        return _lives(self.block)

    @cached_property
    def again(self) -> dict[str, int]:
        """What is made again: up to which op it is there."""
        made, saved = replayed(self.block), self.lives.saved
        held = (
            {t for op in self.ops for t in op.saves if t not in self.block.kept} if made else set()
        )
        if self._whole:
            return dict.fromkeys(held, self.count - 1)
        ends = dict[str, int]()
        for op in reversed(made):  # what follows from a piece is made with it
            mine = {op.writes, *op.saves} - self.block.kept
            end = max((saved[t][1] for t in mine if t in saved), default=-1)
            end = max([end, *(ends.get(t, -1) for t in mine)])
            ends |= dict.fromkeys((*mine, *op.reads), end)
        return {t: ends[t] for t in held if t in ends}

    def forward(self, again: bool = True) -> Iterable[Span]:
        """Of a forward, or where it is made `again` of a layer."""
        kept, whole, lives = self.block.kept, again and self._whole, self.lives
        for t, at in lives.written.items():
            if t in kept and at >= 0:  # while what makes it runs it is not yet kept
                is_stat = self.block.tensors[t].role == "stat"
                end = lives.ends[self.ops[at].segment] if is_stat else at
                yield 0, end, -self.each[t]
                yield at, end, self.each[t]
            elif t in kept:
                continue
            elif t in self.again and whole:
                yield at, self.count - 1, self.each[t]
            elif at >= 0:
                yield at, lives.read.get(t, at), self.each[t]
        if whole:  # the gradient that waits for it
            yield 0, self.count - 1, self.each[self.block.output]
        yield from _inside_ops(self.block, self.sizes)[0]

    def backward(self, halves: bool = False) -> Iterable[Span]:
        """Of a backward; of its input half, where `halves`: what is read later stays to the end."""
        tensors, kept, lives = self.block.tensors, self.block.kept, self.lives
        inputs, made = read_later(self.block) if halves else (frozenset(), frozenset())
        for t, at in lives.written.items():
            if tensors[t].role in ("value", "aux"):
                yield 0 if t in made else at, lives.read.get(t, at), self.each[t]
            if t in kept and t in lives.saved and t not in inputs and self.goes:
                yield 0, lives.saved[t][0] - 1, -self.each[t]
        for t, end in self.again.items():
            yield 0 if t in inputs else lives.saved[t][0], end, self.each[t]
        if self._whole:
            yield 0, self.count - 1, self.each[self.block.output]
        _, back, gradients = _inside_ops(self.block, self.sizes)
        yield from back
        for span in gradients:
            if not (halves and self.ops[span[0]].writes in made):
                yield span

    def is_little(self, weight: str) -> bool:
        elements = self.block.tensors[weight].local(self.sizes)
        return elements <= LITTLE_MATRIX and self.each[weight] == 4 * elements

    def turned(self, op: Op, weight: str) -> int:
        """For forward, of a little matrix: it, or tokens and as many rows of what they make as are held."""
        made = {d.name for d in self.block.tensors[op.writes].dims}
        dims = self.block.tensors[weight].dims
        rows = prod(d.local(self.sizes) for d in dims if d.name in made)
        columns, tokens = self.each[weight] // (4 * rows), self.each[op.writes] // (4 * rows)
        if tokens * (rows + columns) > rows * columns:
            return self.each[weight]
        return 4 * tokens * (columns + min(rows, LITTLE_HELD // max(tokens, 1)))

    def packed(self, op: Op) -> int:
        """SwiGLU's gate, which is packed where it is narrow."""
        pairs = any(d.name == "pair" for t in op.reads for d in self.block.tensors[t].dims)
        if op.weights or op.is_region or not pairs:
            return 0
        half = self.block.tensors[op.writes].dims[-1].local(self.sizes)
        return self.each[op.writes] if half < NARROW else 0

    def normed(self, op: Op, times: int, copies: int, is_backward: bool = False) -> int:
        """What a response norm makes for itself, `times` the images it works on at a time, one of them with
        two channels more on both sides, and so many `copies` where these are narrower than statistics. A rank
        of tp sees its neighbours' edge channels, and gives gradients zeros there."""
        if op.kind != "response":
            return 0
        made = self.block.tensors[op.writes]
        images, _, own = (d.local(self.sizes) for d in made.dims[:3])
        ways = made.dims[2].ways(self.sizes)
        channels = min(own + 2 * min(ways - 1, 2), own * ways)
        elements = made.local(self.sizes) * channels // max(images * own, 1)  # of one
        wide = max(BYTES[made.dtype], BYTES["fp32"])
        times += copies * (wide > BYTES[made.dtype]) + (is_backward and ways > 1)
        number = min(max(1, NORMED_AT_ONCE // max(elements, 1)), images)
        return number * elements * wide * (times * channels + 4) // channels

    def gradient(self, op: Op, weight: str) -> int:
        """What makes a weight's gradient: its product, to be added; of a little one in fp32, added as it
        is made, some rows of the output's gradient turned."""
        if not self.is_little(weight):
            return self.each[weight]
        columns = self.block.tensors[weight].dims[-1].local(self.sizes)
        return min(self.each[op.writes], LITTLE_ROWS * self.each[weight] // columns)

    @cached_property
    def _whole(self) -> bool:
        """Whether the layer is made again as one."""
        return is_run_again(self.block)

    def beside(self) -> Iterable[Span]:
        """What lives inside an op alone, forward and backward."""
        for i, op in enumerate(self.ops):
            yield i, i, sum(self.each[t] for t in op.scratch)
            for t in (*op.scratch, op.writes):
                drawn = op.kind != "attention"  # which keys a query sees is worked out
                if drawn and self.block.tensors[t].role == "mask":
                    elements = self.block.tensors[t].local(self.sizes)
                    yield i, i, DRAWN_BYTES * min(elements, DRAWN_AT_ONCE)

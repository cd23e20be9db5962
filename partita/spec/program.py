"""What one microbatch computes, as data: blocks -> segments -> ops on tensors with named dims.

An op states six facts, and they are enough to derive every collective, byte and FLOP:
    sums    dims it adds up                    a cut one leaves a partial sum
    whole   (tensor, dim) it must see entire   a cut one must travel
    space   its iteration space                FLOPs = flops_per_point x local points
    saves   tensors kept for backward, by name a block keeps their union: none counts twice
    scratch tensors that live inside it alone  the ledger's, forward and backward
    cheap   selective recompute may drop what it writes

One rule gives every partial sum: a dim cut by an axis, present in the op and absent from its output,
from an input or from a weight makes that value, or that gradient, partial over the axis.

Rooms cut dims and insert *regions*: ops that only move data, each with its events. A laid program is
again a Program. Names of dims are the interface between rooms: batch (dp), seq (cp, then ulysses, then
sp), heads, kv_heads, ffn, vocab (tp), experts, expert_ffn (ep), groups (split), height and rows of
images (cp); others are never cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any

Sizes = Mapping[str, int]  # mesh axis -> its size

DRAWN_AT_ONCE = (
    1 << 17
)  # elements of a mask, or of a weight: 1 MB an int64 temporary, which stays in cache
NORMED_AT_ONCE = 1 << 16  # elements of a map in a response norm, of one image at least
LITTLE_MATRIX = 1 << 17  # elements of a weight that fits a core's second cache, in fp32: half a MiB
LITTLE_ROWS = 128  # that are multiplied by it at a time
LITTLE_HELD = 1 << 15  # elements that are made and then turned, or read and then added to: 128 KiB
NARROW = 256  # of SwiGLU's half of a row: below it kernels of strided rows take 2 to 7 times as long as of
# packed ones

ROLES = (
    "value",  # carries a gradient
    "weight",
    "stat",  # a float that backward needs or the loss is made of
    "aux",  # an auxiliary loss: a second output of its block, where backward starts too
    "constant",  # a float without a gradient: a running maximum
    "route",  # integers the block computes: which experts a token goes to
    "told",  # numbers that the host has
    "mask",
    "index",
    "label",
    "data",  # floats that data brings: the pixels of images
    "buffer",
)


@dataclass(frozen=True, slots=True)
class Dim:
    """A named dim. `cut` lists the mesh axes that cut it, outermost first; `of` the dims it is folded
    from: cutting one of them cuts it too. `padded`: it is padded until it divides
    (vocab, ffn, expert_ffn).

    A fold may be sparse: `slots` are those (expert, sample, position) that a router chose, and how many a
    rank has is data. `sizes` may say it by the dim's name; else it is the even share."""

    name: str
    size: int
    cut: tuple[str, ...] = ()
    of: tuple[str, ...] = ()
    padded: bool = False

    def ways(self, sizes: Sizes) -> int:
        """Into how many parts it is cut."""
        ways = 1
        for axis in self.cut:
            ways *= sizes[axis]
        return ways

    def local(self, sizes: Sizes) -> int:
        """The largest share of a rank. Fewer units than ways: ranks share one unit."""
        if self.of and self.name in sizes:
            return sizes[self.name]
        return -(-self.size // self.ways(sizes)) if self.cut else self.size


@dataclass(frozen=True, slots=True)
class Tensor:
    """A logical tensor. `role` says what it is; the precision room fills `dtype` in. `arena`: the memory it
    lies in, device, host or disk."""

    name: str
    dims: tuple[Dim, ...]
    role: str = "value"
    dtype: str = ""
    partial: tuple[str, ...] = ()
    arena: str = "device"
    frozen: bool = False  # a weight that has no gradient

    def with_dims(self, dims: tuple[Dim, ...]) -> Tensor:
        """The same with other dims; itself where they are its own."""
        if dims == self.dims:
            return self
        rest = self.role, self.dtype, self.partial, self.arena, self.frozen
        return Tensor(self.name, dims, *rest)  # `replace` takes thrice as long

    def typed(self, dtype: str) -> Tensor:
        """The same of another dtype."""
        return Tensor(self.name, self.dims, self.role, dtype, self.partial, self.arena, self.frozen)

    def local(self, sizes: Sizes) -> int:
        """Elements on the rank that holds most."""
        elements = 1
        for dim in self.dims:
            elements *= dim.local(sizes)
        return elements

    def numel(self) -> int:
        """Elements of the logical tensor, padding left out."""
        return prod(d.size for d in self.dims)

    def axes(self) -> set[str]:
        """All mesh axes that cut it."""
        return {a for d in self.dims for a in d.cut}


@dataclass(frozen=True, slots=True)
class Event:
    """One collective of a region. `of` is the tensor this rank hands in: bytes are read off at the
    end, when every room has cut it. `phase` is F, B or step (once a step). Where a schedule splits B,
    it is of the input half I, or of the weight half W (`weights`). `again`: not in the first since an
    update. `once`: once a step, though it has several updates.
    `beside`: tensors that go in the same call. `apart`: only of a microbatch that leaves between its F and
    its B."""

    phase: str
    collective: str  # all_reduce | reduce_scatter | all_gather | all_to_all | broadcast | send
    of: str
    gradient: bool = False
    times: int = 1
    weights: bool = False
    parts: int = 1  # calls that add up to `of`, one after the other
    again: bool = False
    beside: tuple[str, ...] = ()
    apart: bool = False
    once: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """One operation, or a region (then `axes` and `events` are set and `kind` is its autograd pair)."""

    name: str  # '<segment>.<op>', regions: '<op that wrote what it moves>:<kind>'
    kind: str
    reads: tuple[str, ...]
    writes: str
    weights: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    whole: tuple[tuple[str, str], ...] = ()
    saves: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()  # tensors that live inside it alone, forward and backward
    space: tuple[Dim, ...] = ()
    flops_per_point: int = 2
    cheap: bool = False
    axes: tuple[str, ...] = ()
    events: tuple[Event, ...] = ()
    lane: str = "compute"
    frozen: bool = (
        False  # its (first) weight is: backward makes the gradient of what it reads alone
    )
    extra: tuple[
        tuple[tuple[Dim, ...], float], ...
    ] = ()  # LoRA: spaces more, backward over forward
    # of convolution and pooling: kernel, stride, padding; of attention the keys that a query sees
    window: tuple[int, ...] = ()
    causal: bool = True  # of attention: no query sees what is behind it

    def over(self, change: Callable[[tuple[Dim, ...]], tuple[Dim, ...]]) -> Op:
        """The same over what `change` makes of its spaces; itself where that is nothing."""
        space = change(self.space)
        if space == self.space and not self.extra:
            return self
        extra = tuple((change(s), f) for s, f in self.extra)
        return Op(  # `replace` takes thrice as long
            self.name, self.kind, self.reads, self.writes, self.weights, self.sums, self.whole,
            self.saves, self.scratch, space, self.flops_per_point, self.cheap, self.axes, self.events,
            self.lane, self.frozen, extra, self.window, self.causal,
        )  # fmt: skip

    @property
    def segment(self) -> str:
        """The segment it belongs to."""
        return self.name.partition(".")[0]

    @property
    def is_region(self) -> bool:
        """Whether it only moves data."""
        return bool(self.axes)


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring ops that run as one piece: attention, mlp, embedding, head."""

    name: str
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Block:
    """A list of segments with one input and one output; equal blocks of a model are one object.

    `kept` names what one microbatch keeps for backward. `regions` are on weights and run around the
    block or once a step; those in segments run in order.
    """

    name: str
    segments: tuple[Segment, ...]
    tensors: Mapping[str, Tensor]
    input: str
    output: str
    kept: frozenset[str] = frozenset()
    regions: tuple[Op, ...] = ()

    def ops(self) -> list[Op]:
        """All ops in order, regions among them."""
        return [op for s in self.segments for op in s.ops]

    def weights(self) -> list[Tensor]:
        """Weights in the order of their first use."""
        names = dict.fromkeys(w for op in self.ops() for w in op.weights)
        return [self.tensors[n] for n in names]

    def keeping(self, kept: frozenset[str]) -> Block:
        """The same ops, of which a microbatch keeps this; what is known of the ops stays known."""
        block = replace(self, kept=kept)
        block.__dict__["known_of_ops"] = self.known_of_ops
        block.__dict__["known_inside"] = self.known_inside
        return block

    def beside(self, tensors: Mapping[str, Tensor], regions: tuple[Op, ...]) -> Block:
        """The same segments with other states and other regions on weights; what is known of the segments
        stays known."""
        block = replace(self, tensors=tensors, regions=regions)
        block.__dict__["known_inside"] = self.known_inside
        return block

    @cached_property
    def known(self) -> dict[object, Any]:
        """What readers have worked out of this block, by reader and arguments (`parallel.read.once`)."""
        return {}

    @cached_property
    def known_of_ops(self) -> dict[object, Any]:
        """The same of readers that do not ask what is kept (`parallel.read.once_of_ops`)."""
        return {}

    @cached_property
    def known_inside(self) -> dict[object, Any]:
        """The same of readers that ask of segments alone, and what is kept (`parallel.read.once_inside`)."""
        return {}


def distinct(blocks: Iterable[Block]) -> list[tuple[Block, int]]:
    """Each block once, in the order of the first, and how many there are of it: equal blocks are one object,
    and what adds up is read of one and multiplied."""
    every = list(blocks)
    of = {id(b): b for b in every}
    return [(of[key], n) for key, n in Counter(map(id, every)).items()]


@dataclass(frozen=True)
class Program:
    """blocks: embedding, the layers, head. `names[i]` is the full name of block i: 'embedding',
    'blocks.0', ..., 'head'. `tied`: weights held by two blocks under one name. `step`: regions that
    run once a step and belong to no block (token count, loss, gradient norm)."""

    blocks: tuple[Block, ...]
    names: tuple[str, ...]
    tied: tuple[str, ...] = ()
    step: tuple[Op, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # of the step regions

    def map(self, lay: Callable[[Block], Block]) -> Program:
        """Each distinct block laid once."""
        done = {id(b): lay(b) for b, _ in distinct(self.blocks)}
        return replace(self, blocks=tuple(done[id(b)] for b in self.blocks))

    def full_name(self, index: int, weight: str) -> str:
        """'blocks.3.attention.wq'; a tied weight keeps its owner's name wherever it is held."""
        if weight in self.tied or weight.startswith(f"{self.names[index]}."):
            return weight
        return f"{self.names[index]}.{weight}"

    def parameters(self) -> int:
        """Exact number of parameters; a tied weight counts once."""
        seen: set[str] = set()
        total = 0
        for i, block in enumerate(self.blocks):
            for w in block.weights():
                name = self.full_name(i, w.name)
                total += 0 if name in seen else w.numel()
                seen.add(name)
        return total


def rewrite(
    block: Block, change: Callable[[Op], Iterable[Op]], tensors: Mapping[str, Tensor] | None = None
) -> Block:
    """The block with every op replaced by what `change` makes of it, and `tensors` added."""
    segments = tuple(
        Segment(s.name, tuple(new for op in s.ops for new in change(op))) for s in block.segments
    )
    return replace(block, segments=segments, tensors={**block.tensors, **(tensors or {})})


def segments_of(ops: Iterable[Op]) -> tuple[Segment, ...]:
    """Neighbours of one segment name are a segment."""
    return tuple(Segment(n, tuple(group)) for n, group in groupby(ops, lambda op: op.segment))


def well_formed(block: Block) -> list[str]:
    """What is wrong with a block as data: each read written before, each name written once."""
    written = {block.input} | {
        n for n, t in block.tensors.items() if t.role in ("label", "index", "weight")
    }
    problems: list[str] = []
    names: set[str] = set()
    for op in block.ops():
        if op.name in names:
            problems.append(f"{block.name}: two ops are named {op.name}")
        names.add(op.name)
        problems += [
            f"{block.name}.{op.name} reads {x}, which nothing before it writes"
            for x in (*op.reads, *op.weights)
            if x not in written
        ]
        if op.writes in written:
            problems.append(f"{block.name}.{op.name} writes {op.writes} a second time")
        written |= {op.writes, *op.saves}
        every = (*op.reads, op.writes, *op.weights, *op.saves, *op.scratch)
        missing = [x for x in every if x not in block.tensors]
        problems += [f"{block.name}.{op.name} names {x}, which is no tensor" for x in missing]
    if block.output not in written:
        problems.append(f"{block.name}: its output {block.output} is never written")
    return problems

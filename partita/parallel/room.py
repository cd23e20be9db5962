"""The contract of a room, and the moves all rooms are made of.

A room answers two pure questions about its own axes:
    problems(job)       why this plan cannot be (empty: fine)
    lay(plan, program)  the program with dims cut and regions inserted

It reads dims, cuts, partial sums and regions on its own axes and never asks which room made them. Two
moves make them all: `cut` a dim wherever it appears, and `insert a region`. Three rules say where:

    sum_rule    an op that sums a dim cut by the axis writes a partial sum   -> reduce_from behind it
    sum_once    partial sums that are added up are reduced as one        -> reduce_from behind what adds
    copy_rule   a tensor whole on the axis, read by an op cut by it: its     -> copy_to before its readers
                gradient is a partial sum
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import lcm
from typing import Protocol

from partita.base.errors import Problem
from partita.spec.frozen import Frozen
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan
from partita.spec.program import Block, Dim, Event, Op, Program, Sizes, Tensor, rewrite

ACROSS = ("tied", "pp/copy")  # two places on pp: the holders of a tied weight, of a stage's copies
ARENAS = ("host", "disk")  # axes of copies: between the device and its host, the host and its disk
PRODUCT_ORDER = (
    "pp", "dp_replicate", "dp_shard", "cp", "ulysses", "tp", "split", "efsdp", "ep", "etp",
    "tp/share",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a room is asked about: a plan for a model at a batch, and how states are stored.

    `state_words` is the number of fp32 values an optimizer keeps for a parameter (AdamW 2; SGD 1 with
    momentum, else 0); masters are the precision room's. `frozen` says which weights have no gradient;
    `packed`, that samples are packed of documents, so that each has a mask of its own. `update_passes`: what
    an optimizer without a fused kernel reads and writes of a parameter, in fp32 values.
    """

    plan: Plan
    model: ModelSpec
    seq_len: int
    micro_batch_size: int = 1
    state_words: int = 2
    frozen: Frozen = field(default_factory=Frozen)
    packed: bool = False
    update_passes: int = 0

    @property
    def laid_len(self) -> int:
        """Tokens of a sequence as it is laid: filled up behind its end until it divides by the ranks that cut
        it, and of a ring that balances its shares by two chunks for each. What fills up has no target, and
        nobody sees it: attention is causal, or it is a document of its own."""
        mesh, ring = self.plan.mesh, self.plan.sizes["cp"]
        if self.model.image is not None:
            return self.seq_len
        balanced = ring > 1 and self.plan.context.method != "all_gather" and self.model.causal
        unit = lcm(mesh.cp * (mesh.tp if mesh.sp else 1), 2 * ring if balanced else 1)
        return -(-self.seq_len // unit) * unit

    @property
    def masks_samples(self) -> bool:
        """Whether each sample has a mask of its own: documents, or what fills it up and would be seen."""
        return self.packed or (not self.model.causal and self.laid_len > self.seq_len)


class Room(Protocol):
    """A module with these two functions."""

    def problems(self, job: Request) -> list[Problem]:
        """Everything that this room finds wrong."""
        ...

    def lay(self, job: Request, program: Program) -> Program:
        """The program with this room's cuts and regions."""
        ...


def axis_name(axes: Iterable[str]) -> str:
    """A product of axes as traffic shows it: 'dp_replicate.tp'."""
    return ".".join(
        sorted(axes, key=lambda a: PRODUCT_ORDER.index(a) if a in PRODUCT_ORDER else 99)
    )


def axis_size(axis: str, sizes: Sizes, kv_heads: int = 0) -> int:
    """Ranks that meet on one axis or named group; 'tp/share' are those that hold the same kv head."""
    if axis == "tp/share":
        return sizes["tp"] // kv_heads if kv_heads else 1
    return 2 if axis in (*ACROSS, *ARENAS) else sizes[axis]


def cut_tensor(t: Tensor, dims: Iterable[str], axis: str) -> Tensor:
    """Cuts nest as they come; heads belong to tp, so its cut is the outermost there."""
    return t.with_dims(_cut_dims(t.dims, frozenset(dims), axis))


def _cut_dims(dims: tuple[Dim, ...], names: frozenset[str], axis: str) -> tuple[Dim, ...]:
    return tuple(
        _cut_dim(d, axis) if d.name in names or not names.isdisjoint(d.of) else d for d in dims
    )


@lru_cache(maxsize=65_536)
def _cut_dim(d: Dim, axis: str) -> Dim:
    if axis in d.cut:
        return d
    heads = axis == "tp" and d.name in ("heads", "kv_heads")
    return replace(d, cut=(axis, *d.cut) if heads else (*d.cut, axis))


def cut(
    block: Block, dims: Iterable[str], axis: str, only: Callable[[Tensor], bool] = lambda t: True
) -> Block:
    """Cuts the dims on every tensor of the block that `only` admits."""
    names = tuple(dims)
    tensors = {n: cut_tensor(t, names, axis) if only(t) else t for n, t in block.tensors.items()}
    return replace(block, tensors=tensors)


def cut_space(op: Op, dims: Iterable[str], axis: str) -> Op:
    """Cuts an op's iteration space: FLOPs are its local points."""
    names = frozenset(dims)
    return op.over(lambda space: _cut_dims(space, names, axis)) if op.space else op


def cut_everywhere(block: Block, dims: Iterable[str], axis: str) -> Block:
    """Tensors and iteration spaces alike."""
    names = tuple(dims)
    return rewrite(cut(block, names, axis), lambda op: (cut_space(op, names, axis),))


def region(
    writer: str, kind: str, axes: tuple[str, ...], move: tuple[str, str], *events: Event
) -> Op:
    """An op that moves `move` = (from tensor, to tensor); its site is '<writer>:<kind>'."""
    x, y = move
    return Op(f"{writer}:{kind}", kind, (x,), y, axes=axes, events=events, lane=axes[0])


def reduce_from(writer: str, axes: tuple[str, ...], x: str, y: str) -> Op:
    """Forward all-reduce of x; backward passes on. Conjugate of copy_to (Megatron's g)."""
    return region(writer, "reduce_from", axes, (x, y), Event("F", "all_reduce", x))


def copy_to(writer: str, axes: tuple[str, ...], x: str, y: str) -> Op:
    """Forward passes on; backward all-reduces y's gradient (Megatron's f)."""
    return region(writer, "copy_to", axes, (x, y), Event("B", "all_reduce", y, gradient=True))


def gather_from(writer: str, axes: tuple[str, ...], x: str, y: str, again: bool = True) -> Op:
    """Forward all-gather along the dim that the axes cut of x and not of y; backward reduce-scatter, and
    `again` a second all-gather of the shard that was kept, for the weight gradient (none where readers keep
    the whole, or nothing: their weights are frozen)."""
    second = (Event("B", "all_gather", x, weights=True),) if again else ()
    return region(
        writer, "gather_from", axes, (x, y),
        Event("F", "all_gather", x),
        *second,
        Event("B", "reduce_scatter", y, gradient=True),
    )  # fmt: skip


def scatter_to(writer: str, axes: tuple[str, ...], x: str, y: str) -> Op:
    """Forward reduce-scatter of the partial sum along seq; backward all-gather."""
    return region(
        writer, "scatter_to", axes, (x, y),
        Event("F", "reduce_scatter", x),
        Event("B", "all_gather", y, gradient=True),
    )  # fmt: skip


def sum_rule(block: Block, axis: str) -> Block:
    """An op that sums a dim cut by `axis` writes a partial sum: reduce_from behind it."""
    new: dict[str, Tensor] = {}

    def change(op: Op) -> Iterable[Op]:
        names = (*op.reads, *op.weights)
        cuts = {d.name for n in names for d in block.tensors[n].dims if axis in d.cut}
        t = block.tensors[op.writes]
        if not cuts & set(op.sums) or op.is_region or axis in t.partial or t.role == "aux":
            return (op,)  # an auxiliary loss is added up once a step
        part = f"{op.writes}~{axis}"
        new[part] = replace(t, name=part, partial=(*t.partial, axis))
        return (replace(op, writes=part), reduce_from(op.name, (axis,), part, op.writes))

    return rewrite(block, change, new)


def sum_once(block: Block, axis: str) -> Block:
    """What adds up tensors that are reduced over `axis`, each for it alone, adds their partial sums: one
    region behind it."""
    reduced = {o.writes: o for o in block.ops() if o.kind == "reduce_from" and o.axes == (axis,)}
    readers = Counter(x for op in block.ops() for x in op.reads)
    joins = [
        op for op in block.ops()
        if op.kind == "map" and len(op.reads) > 1 and not op.weights
        and all(x in reduced and readers[x] == 1 for x in op.reads)
    ]  # fmt: skip
    gone = {x for op in joins for x in op.reads}
    new: dict[str, Tensor] = {}

    def change(op: Op) -> Iterable[Op]:
        if op.is_region and op.writes in gone:
            return ()
        if op not in joins:
            return (op,)
        y, part = op.writes, f"{op.writes}~{axis}"
        new[part] = replace(block.tensors[y], name=part, partial=(axis,))
        own = replace(op, reads=tuple(reduced[x].reads[0] for x in op.reads), writes=part)
        return own, reduce_from(op.name, (axis,), part, y)

    return rewrite(block, change, new) if joins else block


def copy_rule(block: Block, axis: str) -> Block:
    """copy_to once a tensor, not once a reader: q, k, v (gate, up) add up locally first."""
    new: dict[str, Tensor] = {}
    writer = {op.writes: op.name for op in block.ops()}

    def needs(op: Op, x: str) -> bool:
        t = block.tensors[x]
        other = [d for n in (op.writes, *op.weights) for d in block.tensors[n].dims]
        whole = t.role == "value" and axis not in t.axes()
        return not op.is_region and whole and any(axis in d.cut for d in other)

    def change(op: Op) -> Iterable[Op]:
        before, renamed = [], {}
        for x in op.reads:
            if needs(op, x):
                y = renamed[x] = f"{x}>{axis}"
                if y not in new:
                    new[y] = replace(block.tensors[x], name=y)
                    before.append(copy_to(writer.get(x, "input"), (axis,), x, y))
        if not renamed:
            return (op,)
        return (*before, replace(op, reads=tuple(renamed.get(x, x) for x in op.reads)))

    return rewrite(block, change, new)


def filled_up(job: Request, room: str, asked: str) -> list[Problem]:
    """A warning where sequences are longer as they are laid than they are."""
    more = job.laid_len - job.seq_len
    if not more:
        return []
    message = (
        f"a sequence of {job.seq_len} tokens is laid as {job.laid_len}: {more} that fill it up, without a "
        "target, are computed on and sent as the others"
    )
    limit = f"seq_len {job.laid_len}, for the same work"
    return [Problem(room, "seq_len", message, asked=asked, limit=limit, severity="warning")]


def error(room: str, rule: str, message: str, **facts: str) -> Problem:
    """A problem that forbids the plan; facts: asked, limit, nearest."""
    return Problem(room, rule, message, **facts)  # type: ignore[arg-type]

"""Readers of a laid program: gradient axes, replay, traffic, kept bytes, states, FLOPs.

None of them knows a room, an axis or a model. A number that one of them had to special-case would be a
fact missing in the program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from math import prod
from typing import Concatenate, ParamSpec, TypeVar

from partita.spec.program import Block, Op, Sizes, Tensor

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "bool": 1, "int64": 8, "": 0}
STATES = {"parameter": "parameters", "gradient": "gradients", "optimizer": "optimizer"}
P = ParamSpec("P")
R = TypeVar("R")


def once(reader: Callable[Concatenate[Block, P], R]) -> Callable[Concatenate[Block, P], R]:
    """The reader, which remembers on a block what it answered: equal blocks of all stages are one object, and
    are read once. Answers are shared: nobody changes one."""
    return _remembering(reader, lambda block: block.known)


def once_of_ops(reader: Callable[Concatenate[Block, P], R]) -> Callable[Concatenate[Block, P], R]:
    """The same of a reader that does not ask what is kept: of all that may be recomputed it reads once."""
    return _remembering(reader, lambda block: block.known_of_ops)


def once_inside(reader: Callable[Concatenate[Block, P], R]) -> Callable[Concatenate[Block, P], R]:
    """The same of a reader that asks of a block's segments alone, and of what is kept: of blocks that store
    their weights in other units it reads once."""
    return _remembering(reader, lambda block: block.known_inside, lambda block: block.kept)


def once_of_segments(
    reader: Callable[Concatenate[Block, P], R],
) -> Callable[Concatenate[Block, P], R]:
    """The same of a reader that does not ask what is kept either."""
    return _remembering(reader, lambda block: block.known_inside)


def _remembering(
    reader: Callable[Concatenate[Block, P], R],
    where: Callable[[Block], dict[object, R]],
    of: Callable[[Block], object] = lambda block: None,
) -> Callable[Concatenate[Block, P], R]:
    name = reader.__qualname__

    @wraps(reader)
    def read(block: Block, *args: P.args, **kwargs: P.kwargs) -> R:
        given = (*args, *kwargs.items()) if kwargs else args
        plain = [tuple(a.items()) if type(a) is dict else a for a in given]
        key, known = (name, of(block), *plain), where(block)
        if key not in known:
            known[key] = reader(block, *args, **kwargs)
        return known[key]

    return read


@dataclass(frozen=True, slots=True)
class Call:
    """One declared collective of a block: `bytes` of the tensor handed in, for one call, or for `parts` of
    them that add up to it. `half` is the phase that B's calls have where a schedule splits it;
    `again`: not in a step's first; `apart`: only of microbatches that leave between F and B."""

    axes: tuple[str, ...]
    collective: str
    site: str  # without the block's name
    phase: str
    bytes: int
    lane: str
    times: int = 1
    half: str = "I"
    parts: int = 1
    again: bool = False
    apart: bool = False
    once: bool = False


def tensor_bytes(t: Tensor, sizes: Sizes) -> int:
    """Bytes on the rank that holds most."""
    return t.local(sizes) * BYTES[t.dtype]


def local_shape(weight: Tensor, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a rank's part of a weight; a padded vocabulary counts its padding."""
    return tuple(d.local(sizes) for d in weight.dims)


def gradient_axes(block: Block, weight: Tensor, sizes: Sizes) -> tuple[str, ...]:
    """Over which axes the weight's gradient is a partial sum: those that cut a dim its ops contract
    for dW. Fewer units than ways: the ranks that share a unit add up too ('tp/share')."""
    axes: dict[str, None] = {}
    own = {d.name for d in weight.dims}
    for op in block.ops():
        if weight.name in op.weights:
            for t in (block.tensors[n] for n in (*op.reads, op.writes)):
                axes |= dict.fromkeys(a for d in t.dims if d.name not in own for a in d.cut)
    axes = {a: None for a in axes if a not in weight.axes()}
    for d in weight.dims:
        if not d.padded and d.ways(sizes) > d.size:
            axes |= dict.fromkeys(f"{a}/share" for a in d.cut)
    return tuple(axes)


@once_inside
def replayed(block: Block) -> list[Op]:
    """The ops backward must run again: those between what is kept and what backward wants."""
    writer = {op.writes: op for op in block.ops()}
    for op in block.ops():
        for t in op.saves:
            writer.setdefault(t, op)
    wanted = [t for op in block.ops() for t in op.saves if t not in block.kept]
    found: dict[str, Op] = {}
    while wanted:
        t = wanted.pop()
        op = writer.get(t)
        if t in block.kept or t == block.input or op is None or op.name in found:
            continue
        found[op.name] = op
        wanted += [r for r in op.reads if r not in block.kept]
    return [op for op in block.ops() if op.name in found]


def is_run_again(block: Block) -> bool:
    """Whether backward makes it again as one, its linears too."""
    return any(op.kind == "linear" for op in replayed(block))


def traffic(block: Block, sizes: Sizes) -> list[Call]:
    """Every collective of the block, in the order of phases F, B (replay first), step. F and B are of
    one microbatch."""
    forward, backward, step = _own_calls(block, sizes)
    again = [c for op in replayed(block) for c in _calls(block, op, "F", "B", sizes)]
    return [*forward, *again, *backward, *step]


@once_of_ops
def _own_calls(block: Block, sizes: Sizes) -> tuple[list[Call], list[Call], list[Call]]:
    """Of F, B and step, but for what is replayed."""
    ops = [*block.ops(), *block.regions]
    return (
        [c for op in ops for c in _calls(block, op, "F", "F", sizes)],
        [c for op in reversed(ops) for c in _calls(block, op, "B", "B", sizes)],
        [c for op in ops for c in _calls(block, op, "step", "step", sizes)],
    )


def _calls(block: Block, op: Op, phase: str, as_phase: str, sizes: Sizes) -> Iterator[Call]:
    for e in op.events:
        if e.phase == phase:
            size = sum(tensor_bytes(block.tensors[t], sizes) for t in (e.of, *e.beside))
            half = "W" if e.weights else "I"
            yield Call(
                op.axes, e.collective, op.name, as_phase, size, op.lane, e.times, half, e.parts, e.again,
                e.apart, e.once,
            )  # fmt: skip


@once_of_ops
def bytes_of(block: Block, sizes: Sizes) -> dict[str, int]:
    """Bytes of each tensor on the rank that holds most."""
    return {name: tensor_bytes(t, sizes) for name, t in block.tensors.items()}


@once
def kept_bytes(block: Block, sizes: Sizes) -> int:
    """Activation bytes one microbatch of this block keeps for backward."""
    each = bytes_of(block, sizes)
    return sum(each[t] for t in block.kept)


@once
def leaving_bytes(block: Block, sizes: Sizes) -> int:
    """What of a block's kept bytes leaves for one microbatch."""
    return sum(
        tensor_bytes(block.tensors[t], sizes)
        for op in block.regions
        for e in op.events
        if op.kind == "offload" and e.phase == "F"
        for t in (e.of, *e.beside)
    )


@once_of_ops
def state_bytes(block: Block, sizes: Sizes, arena: str = "device") -> Counter[str]:
    """Bytes by ledger category of what lives in an arena for the whole run."""
    found: Counter[str] = Counter()
    for t in block.tensors.values():
        if t.role in STATES and t.arena == arena:
            found[STATES[t.role]] += tensor_bytes(t, sizes)
    return found


def op_flops(op: Op, sizes: Sizes) -> int:
    """FLOPs of one op's forward on one rank (attention: the full square)."""
    if not op.space:
        return 0
    points = (
        prod(d.local(sizes) for d in space) for space in (op.space, *(s for s, _ in op.extra))
    )
    return op.flops_per_point * sum(points)


def backward_factor(op: Op) -> float:
    """Backward over forward: two matmuls for one, one where weights are frozen; flash attention makes its
    scores again (5 for 2)."""
    if op.frozen:
        return 1.0
    return 2.5 if op.kind == "attention" and len(op.reads) == 3 else 2.0


def backward_flops(op: Op, sizes: Sizes) -> float:
    """FLOPs of one op's backward on one rank."""
    extra = sum((f - backward_factor(op)) * prod(d.local(sizes) for d in s) for s, f in op.extra)
    return backward_factor(op) * op_flops(op, sizes) + op.flops_per_point * extra


@once
def flops(block: Block, sizes: Sizes) -> dict[str, float]:
    """FLOPs of one microbatch by phase: F, B, and replay, what recomputation adds to B."""
    forward, backward = _own_flops(block, sizes)
    again = sum(forward[op.name] for op in replayed(block))
    return {"F": sum(forward.values()), "B": backward, "replay": again}


@once_of_segments
def _own_flops(block: Block, sizes: Sizes) -> tuple[dict[str, int], float]:
    """Of each op's forward, and of backward."""
    ops = block.ops()
    backward = sum(backward_flops(op, sizes) for op in ops)
    return {op.name: op_flops(op, sizes) for op in ops}, backward

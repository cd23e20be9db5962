"""The kernels of a laid block, read off its ops: what runs forward, and in each half of backward.

    linear      a matmul; linears side by side that read one tensor are one. Backward: one for the input
                (I), one for the weight (W), which adds to the stored gradient. A convolution is one, its
                windows as rows; it reads each element of its input once
    attention   fused (three reads): half of its square where it is causal, of a window what it sees of that;
                backward 2.5 times. Explicit: batched matmuls over the whole square, and the probabilities
                pass through memory; what heads made is copied to lie token by token, the gradients of q, k
                and v to lie side by side
    elementwise neighbours (bias, map, mask, relu) are one kernel: it reads what comes from outside,
                writes its end
    cast        what a linear of 8 bits or fewer reads, and the gradient it is handed, become such
    the rest    what it reads and writes passes through memory

Nothing here knows a room, an axis or a model. Each kernel also says which pieces of layers it is (PIECES),
for a machine whose pieces were measured: the host around many kernels is most of a small layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from partita.cost.empirical import WEIGHT_WELL
from partita.cost.kernels import Kernel, is_aligned
from partita.cost.pieces import ATTENTION, BACK, WEIGHT
from partita.parallel.read import BYTES, bytes_of, once_inside, once_of_segments, replayed
from partita.spec.lora import GROUPS
from partita.spec.program import Block, Op, Sizes

ELEMENTWISE = ("bias", "map", "mask", "relu")
MATMULS = ("linear", "conv")
FLASH_BACKWARD = 2.5  # five matmuls for two: the scores are made again
LOW = {"fp8": 1, "fp4": 0.5}  # bytes of what a matmul reads, where it is not its tensors' width
CAST_BYTES = 4  # of an element that becomes one of 8 bits
STATE_BYTES = 8  # a weight's gradient is read and written as it grows
FULL_PASSES = {"norm": (2, 4), "lookup": (2, 3)}  # of the activation: forward, backward
# elementwise ops by the last part of their names; an act of (gate, up) is a gate
PIECES = {
    "rope_q": "rotate", "rope_k": "rotate", "act": "gelu", "residual": "add", "add_position": "add",
    "add_type": "add",
    "dropout": "",
}  # fmt: skip
TOGETHER = ("bias", "rotate")  # neighbours that run as one
SPARSE = ("router", "dispatch", "combine")  # whose pieces are measured together
ROUTED = ("dispatch", "experts", "combine")
Pieces = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class BlockWork:
    """Kernels of one microbatch in a block. `again`: what recomputation runs in B before I. `experts`: those
    of them between dispatch and combine, forward and backward."""

    forward: tuple[Kernel, ...]
    input: tuple[Kernel, ...]
    weight: tuple[Kernel, ...]
    again: tuple[Kernel, ...]
    experts: tuple[tuple[Kernel, ...], tuple[Kernel, ...]] = ((), ())
    # what readers have worked out of these kernels, whatever is made again
    known: dict[object, object] = field(default_factory=dict, compare=False, repr=False)


@once_inside
def block_work(block: Block, sizes: Sizes, matmul_dtype: str = "") -> BlockWork:
    """Reads a laid block. `matmul_dtype` is what linears compute in, where it is not their tensors'."""
    work, made = _own_work(block, sizes, matmul_dtype)
    names = {op.name for op in replayed(block)}
    if not names:
        return work
    again: list[Kernel] = []
    for group in _groups([op for op in block.ops() if op.name in names]):
        found = made.get(tuple(op.name for op in group))
        again += _kernels(group, block, sizes, matmul_dtype)[0] if found is None else found
    return replace(work, again=tuple(again))


@once_of_segments
def _own_work(
    block: Block, sizes: Sizes, matmul_dtype: str
) -> tuple[BlockWork, dict[tuple[str, ...], list[Kernel]]]:
    """A block's kernels but for what is replayed, and those of forward by the ops that they run."""
    made: dict[tuple[str, ...], list[Kernel]] = {}
    forward: list[Kernel] = []
    back: list[Kernel] = []
    weight: list[Kernel] = []
    experts: tuple[list[Kernel], list[Kernel]] = ([], [])
    for group in _groups(block.ops()):
        f, i, w = _kernels(group, block, sizes, matmul_dtype)
        made[tuple(op.name for op in group)] = f
        forward += f
        back += i
        weight += w
        if group[0].segment == "experts":
            experts[0].extend(f)
            experts[1].extend((*i, *w))
    beside = (tuple(experts[0]), tuple(experts[1]))
    return BlockWork(tuple(forward), tuple(back), tuple(weight), (), beside), made


def _groups(ops: Iterable[Op]) -> Iterable[list[Op]]:
    """Ops that are one kernel: elementwise neighbours, linears of one input."""
    held: list[Op] = []
    for op in ops:
        together = held and not op.is_region and not held[-1].is_region and _joins(held[-1], op)
        if held and not together:
            yield held
            held = []
        held.append(op)
    if held:
        yield held


def _joins(before: Op, op: Op) -> bool:
    if op.kind in ELEMENTWISE and before.kind in ELEMENTWISE:
        return True
    return op.kind == before.kind == "linear" and op.reads == before.reads


def _kernels(
    group: Sequence[Op], block: Block, sizes: Sizes, dtype: str
) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    """Forward, input half and weight half of ops that run as one."""
    first = group[0]
    if first.is_region or first.kind == "join":  # a view
        return [], [], []
    if first.kind in MATMULS:
        found = _linear(group, block, sizes, dtype)
    elif first.kind == "attention":
        found = _attention(first, block, sizes)
    elif first.kind in ELEMENTWISE:
        found = _elementwise(group, block, sizes)
    else:
        found = _passes(first, block, sizes)
    if first.segment not in ROUTED:
        return found
    f, i, w = ([k.serving(k.each, routed=True) for k in ks] for ks in found)
    return f, i, w


def _bytes(names: Iterable[str], block: Block, sizes: Sizes) -> float:
    each = bytes_of(block, sizes)
    return float(sum(each[n] for n in names))


def _linear(
    group: Sequence[Op], block: Block, sizes: Sizes, dtype: str
) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    n = trained = 0  # output columns, and those whose weights have a gradient
    first = group[0]
    x, w = block.tensors[first.reads[0]], block.tensors[first.weights[0]]
    out = {d.name for d in block.tensors[first.writes].dims}
    inputs, own = {d.name for d in x.dims}, {d.name for d in w.dims}
    space = {d.name: d.local(sizes) for d in first.space}
    count = prod(s for d, s in space.items() if d in own and d in inputs and d in out)
    each = prod(d.local(sizes) for d in w.dims if d.name not in space)  # experts: rows lie on them
    k = prod(s for d, s in space.items() if d in first.sums)
    m = prod(s for d, s in space.items() if d not in own)
    for op in group:
        local = {d.name: d.local(sizes) for d in op.space}
        rows = prod(local.values()) // (count * k * m)
        n, trained = n + rows, trained + (0 if op.frozen else rows)
    count, m = count * each, -(-m // each)
    size, kind = BYTES[w.dtype], dtype or w.dtype
    read = x.local(sizes) if first.kind == "conv" else count * m * k
    moved = float(size * (read + count * (k * n + m * n)))
    grown = size * (read + count * trained * (k + m)) + STATE_BYTES * count * k * trained
    name = "grouped" if "experts" in own else "linear"
    runs = [(name, 2.0 * m * n * k), (name + BACK, 2.0 * m * n * k)]
    runs += [(name + WEIGHT, 2.0 * m * trained * k)]
    even = is_aligned(*(LOW.get(kind, size) * row for row in (k, n)))
    if first.segment == "router":
        runs = [("route", 0.0)] * 3
    one, other, last = ((run,) if first.kind == "linear" else () for run in runs)
    forward = [Kernel("matmul", moved, m, n, k, count, dtype=kind, aligned=even, pieces=one)]
    back = [Kernel("matmul", moved, m, k, n, count, dtype=kind, aligned=even, pieces=other)]
    weight = Kernel(
        "matmul", grown, trained, k, m, count, dtype=kind, well=WEIGHT_WELL, aligned=even, adds=True,
        pieces=last,
    )  # fmt: skip
    if kind in LOW and size > LOW[kind]:
        forward.insert(0, _cast(read, w.dtype))
        back.insert(0, _cast(count * m * n, w.dtype))
    if "experts" in own:
        forward, back = ([k.serving(count) for k in ks] for ks in (forward, back))
        weight = weight.serving(count)
    halves = [weight] if trained else []
    for op in group:
        for there, again, own_half in _low_rank(op, block, sizes):
            forward.append(there)
            back.append(again)
            halves += own_half
    return forward, back, halves


def _cast(elements: int, dtype: str) -> Kernel:
    """A tensor becomes one of 8 bits or fewer: read once, written as the matmul reads it, and across for the
    weight gradient (TransformerEngine's cast_transpose). What programs move more is theirs (stage.py)."""
    return Kernel("cast", CAST_BYTES * float(elements), elements, dtype=dtype)


def _low_rank(op: Op, block: Block, sizes: Sizes) -> Iterable[tuple[Kernel, Kernel, list[Kernel]]]:
    """LoRA's matmuls by A and by B: forward, for their input, and in the weight half. There run the gradients
    of those that are trained, and what A made again, where B reads it."""
    if not op.extra:
        return
    trained = op.extra[0][1] - op.extra[1][1], op.extra[1][1] - 1
    for i, ((space, _), name) in enumerate(zip(op.extra, op.weights[1:], strict=True)):
        w = block.tensors[name]
        elements, dtype, size = w.local(sizes), w.dtype, BYTES[w.dtype]
        count = prod(d.local(sizes) for d in w.dims if d.name in GROUPS)
        each = prod(d.local(sizes) for d in w.dims if d.name == "experts")
        rank = next(d.local(sizes) for d in w.dims if d.name == "rank")
        rows, other = prod(d.local(sizes) for d in space) // elements, elements // count // rank
        n, k = (rank, other) if i == 0 else (other, rank)
        moved = float(size * (elements + count * rows * (n + k)))
        there = Kernel("matmul", moved, rows, n, k, count, dtype=dtype, each=each)
        grown = moved + (STATE_BYTES - size) * elements
        own = replace(there, bytes=grown, m=n, n=k, k=rows, well=WEIGHT_WELL, adds=True)
        again = [there] * int(trained[1]) if i == 0 else []
        yield there, replace(there, n=k, k=n), again + [own] * int(trained[i])


def _attention(
    op: Op, block: Block, sizes: Sizes
) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    local = {d.name: d.local(sizes) for d in op.space}
    points = prod(local.values())
    moved = _bytes((*op.reads, op.writes), block, sizes)
    dtype = block.tensors[op.reads[0]].dtype
    if len(op.reads) == 3:
        keys = local["keys"]
        square = points if op.causal else 2 * points  # that a causal mask halves: the same work
        square *= _seen_share(op, keys)
        flops = square * op.flops_per_point / 2
        handed = float(sum(block.tensors[n].local(sizes) for n in op.reads))
        there, back_ = _both((ATTENTION, square), ("split", handed))
        fused = Kernel("attention", moved, k=keys, flops=flops, dtype=dtype, pieces=there)
        flops *= FLASH_BACKWARD
        back = Kernel("attention", 2.5 * moved, k=keys, flops=flops, dtype=dtype, pieces=back_)
        return [fused], [back], []
    count = local["batch"] * local["heads"]
    m, n, k = local["seq"], local["keys"], local["head_dim"]
    if "keys" in op.sums:
        n, k = k, n
    product = Kernel("matmul", moved, m, n, k, count, dtype=dtype)
    back = [
        Kernel("matmul", moved, m, k, n, count, dtype=dtype),
        Kernel("matmul", moved, n, k, m, count, dtype=dtype),
    ]
    if "keys" in op.sums:
        tokens_first = Kernel("memory", 2 * _bytes((op.writes,), block, sizes), dtype=dtype)
        return [product, tokens_first], back, []
    scores = _bytes((op.writes,), block, sizes)
    q, key = (_bytes((name,), block, sizes) for name in op.reads)
    joined = Kernel("memory", 2 * (q + 2 * key), dtype=dtype)
    return (
        [product, Kernel("softmax", 2 * scores, m=count)],
        [Kernel("softmax", 3 * scores, m=count), *back, joined],
        [],
    )


def _seen_share(op: Op, keys: int) -> float:
    """Of a causal square's half what a window sees: w keys a query, fewer at the beginning."""
    w = min(op.window[0], keys) / keys if op.window else 1.0
    return w * (2 - w)


def _elementwise(
    group: Sequence[Op], block: Block, sizes: Sizes
) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    made = {op.writes for op in group}
    outside = {r for op in group for r in op.reads} - made
    needed = {n for op in group if op.kind == "mask" for n in (op.writes,)}
    end = group[-1].writes
    moved = _bytes({*outside, *needed, end}, block, sizes)
    trained = (op.writes for op in group if op.kind == "bias" and not op.frozen)
    biases = _bytes(trained, block, sizes)
    there, back = _both(*_pieces(group, block, sizes))
    dtype = block.tensors[end].dtype
    half = [Kernel("memory", biases, dtype=dtype, pieces=(("bias", 0.0),))] if biases else []
    return (
        [Kernel("memory", moved, dtype=dtype, pieces=there)],
        [Kernel("memory", moved, dtype=dtype, pieces=back)],
        half,
    )


def _both(*pieces: tuple[str, float]) -> tuple[Pieces, Pieces]:
    """Pieces forward, and backward."""
    return pieces, tuple((name + BACK, size) for name, size in pieces)


def _pieces(group: Sequence[Op], block: Block, sizes: Sizes) -> list[tuple[str, float]]:
    """What elementwise ops are of a layer's software; empty where one was not measured. Biases of linears
    side by side are added as one, queries and keys rotated as one."""
    found: list[tuple[str, float]] = []
    for op in group:
        own = _piece(op, block, sizes)
        if not own:
            return []
        name, size = own[0]
        if found and found[-1][0] == name and name in TOGETHER:
            own = [(name, found.pop()[1] + size)]
        found += own
    return found


def _piece(op: Op, block: Block, sizes: Sizes) -> list[tuple[str, float]]:
    """What an elementwise op is of a layer's software; empty where nothing like it is measured. A mask is
    drawn by what reads it."""
    size = float(block.tensors[op.writes].local(sizes))
    if op.kind == "mask":
        return [("drop", 0.0)]
    name = "bias" if op.kind == "bias" else PIECES.get(op.name.rpartition(".")[2])
    if name is None or op.kind == "relu":
        return []
    if op.segment == "combine":
        return [("route", 0.0)]
    read = [block.tensors[r] for r in op.reads]
    if name == "gelu" and any(d.name == "pair" for d in read[0].dims):
        name = "gate"
    drops = [("drop", size)] if any(t.role == "mask" for t in read) else []
    return [(name, size)] * bool(name) + drops


def _passes(op: Op, block: Block, sizes: Sizes) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    out = _bytes((op.writes,), block, sizes)
    there, back = _both(*_passing(op, block, sizes))
    of = block.tensors[op.writes if op.kind == "lookup" or not op.reads else op.reads[0]].dtype
    if op.kind in FULL_PASSES:
        f, b = FULL_PASSES[op.kind]
        forward = Kernel("memory", f * out, dtype=of, pieces=there)
        return [forward], [Kernel("memory", b * out, dtype=of, pieces=back)], []
    picks = any(block.tensors[r].role == "index" for r in op.reads)  # one element of many
    moved = _bytes([op.writes] if picks else [*op.reads, op.writes], block, sizes)
    is_loss = op.segment == "loss" and op.kind == "exp"
    kind, m = ("loss", block.tensors[op.writes].local(sizes)) if is_loss else ("memory", 0)
    forward = Kernel(kind, moved, m, dtype=of, pieces=there)
    return [forward], [Kernel(kind, moved, m, dtype=of, pieces=back)] if op.saves else [], []


def _passing(op: Op, block: Block, sizes: Sizes) -> list[tuple[str, float]]:
    """What an op that passes through memory is of a layer's software: the loss is that of its exponentials, a
    router, its linear and residual with it, that of its choice; rows go and come back with their dispatch."""
    size = float(block.tensors[op.writes].local(sizes))
    if op.kind == "norm":
        return [("layer_norm" if len(op.weights) > 1 else "norm", size)]
    if op.segment == "loss":
        return [("loss", size if op.kind == "exp" else 0.0)]
    known = {"lookup": "lookup", "choose": "route", "dispatch": "dispatch"}
    if op.kind in known:
        return [(known[op.kind], size)]
    return [("route", 0.0)] if op.segment in SPARSE else []

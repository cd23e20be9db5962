"""The kernels of a laid block, read off its ops: what runs forward, and in each half of backward.

    linear      a matmul; linears side by side that read one tensor are one. Backward: one for the input
                (I), one for the weight (W), which adds to the stored gradient. A convolution is one, its
                windows as rows; it reads each element of its input once
    attention   fused (three reads): half of its square, causal; backward 2.5 times. Explicit: batched
                matmuls over the whole square, and the probabilities pass through memory
    elementwise neighbours (bias, map, mask, relu) are one kernel: it reads what comes from outside,
                writes its end
    the rest    what it reads and writes passes through memory

Nothing here knows a room, an axis or a model. Each kernel also says which pieces of layers it is (PIECES),
for a machine whose pieces were measured: the host around many kernels is most of a small layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from partita.cost.kernels import Kernel
from partita.cost.pieces import ATTENTION, BACK, WEIGHT
from partita.parallel.read import BYTES, once, replayed, tensor_bytes
from partita.spec.program import Block, Op, Sizes

ELEMENTWISE = ("bias", "map", "mask", "relu")
MATMULS = ("linear", "conv")
FLASH_BACKWARD = 2.5  # five matmuls for two: the scores are made again
WEIGHT_WELL = (
    0.87  # [empirical] weight gradients read both operands across (Korthikanti et al., table 4)
)
STATE_BYTES = 8  # a weight's gradient is read and written as it grows
FULL_PASSES = {"norm": (2, 4), "lookup": (2, 3)}  # of the activation: forward, backward
# elementwise ops by the last part of their names; an act of (gate, up) is a gate
PIECES = {
    "rope_q": "rotate", "rope_k": "rotate", "act": "gelu", "residual": "add", "add_position": "add",
    "dropout": "",
}  # fmt: skip
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


@once
def block_work(block: Block, sizes: Sizes, matmul_dtype: str = "") -> BlockWork:
    """Reads a laid block. `matmul_dtype` is what linears compute in, where it is not their tensors'."""
    groups = list(_groups(block.ops()))
    forward: list[Kernel] = []
    back: list[Kernel] = []
    weight: list[Kernel] = []
    experts: tuple[list[Kernel], list[Kernel]] = ([], [])
    for group in groups:
        f, i, w = _kernels(group, block, sizes, matmul_dtype)
        forward += f
        back += i
        weight += w
        if group[0].segment == "experts":
            experts[0].extend(f)
            experts[1].extend((*i, *w))
    names = {op.name for op in replayed(block)}
    again = [
        kernel
        for group in _groups([op for op in block.ops() if op.name in names])
        for kernel in _kernels(group, block, sizes, matmul_dtype)[0]
    ]
    beside = (tuple(experts[0]), tuple(experts[1]))
    return BlockWork(tuple(forward), tuple(back), tuple(weight), tuple(again), beside)


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
        return _linear(group, block, sizes, dtype)
    if first.kind == "attention":
        return _attention(first, block, sizes)
    if first.kind in ELEMENTWISE:
        return _elementwise(group, block, sizes)
    return _passes(first, block, sizes)


def _bytes(names: Iterable[str], block: Block, sizes: Sizes) -> float:
    return float(sum(tensor_bytes(block.tensors[n], sizes) for n in names))


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
    runs = [("linear", 2.0 * m * n * k), ("linear" + BACK, 2.0 * m * n * k)]
    runs += [("linear" + WEIGHT, 2.0 * m * trained * k)]
    one, other, last = ((run,) if first.kind == "linear" else () for run in runs)
    forward = [Kernel("matmul", moved, m, n, k, count, dtype=kind, pieces=one)]
    back = [Kernel("matmul", moved, m, k, n, count, dtype=kind, pieces=other)]
    weight = Kernel(
        "matmul", grown, trained, k, m, count, dtype=kind, well=WEIGHT_WELL, pieces=last
    )
    low = [(kernel, w) for op in group for kernel, w in _low_rank(op, block, sizes)]
    forward += [kernel for kernel, _ in low]
    back += [kernel for kernel, _ in low]
    again = [kernel for kernel, times in low for _ in range(times)]
    return forward, back, ([weight] if trained else []) + again


def _low_rank(op: Op, block: Block, sizes: Sizes) -> Iterable[tuple[Kernel, int]]:
    """LoRA's matmuls, each with how often one like it runs in the weight half."""
    for (space, factor), name in zip(op.extra, op.weights[1:], strict=True):
        w = block.tensors[name]
        elements = w.local(sizes)
        m = prod(d.local(sizes) for d in space) // elements
        rank = next(d.local(sizes) for d in w.dims if d.name == "rank")
        moved = float(BYTES[w.dtype] * (elements + m * (rank + elements // rank)))
        yield Kernel("matmul", moved, m, rank, elements // rank, dtype=w.dtype), int(factor) - 1


def _attention(
    op: Op, block: Block, sizes: Sizes
) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    local = {d.name: d.local(sizes) for d in op.space}
    points = prod(local.values())
    moved = _bytes((*op.reads, op.writes), block, sizes)
    dtype = block.tensors[op.reads[0]].dtype
    if len(op.reads) == 3:
        flops, keys = points * op.flops_per_point / 2, local["keys"]
        handed = float(sum(block.tensors[n].local(sizes) for n in op.reads))
        there, back_ = _both((ATTENTION, points), ("split", handed))
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
        return [product], back, []
    scores = _bytes((op.writes,), block, sizes)
    return (
        [product, Kernel("softmax", 2 * scores, m=count)],
        [Kernel("softmax", 3 * scores, m=count), *back],
        [],
    )


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
    side by side are added as one."""
    found: list[tuple[str, float]] = []
    for op in group:
        own = _piece(op, block, sizes)
        if not own:
            return []
        if found and found[-1][0] == own[0][0] == "bias":
            own = [("bias", found.pop()[1] + own[0][1])]
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
    router that of its choice."""
    size = float(block.tensors[op.writes].local(sizes))
    if op.kind == "norm":
        return [("layer_norm" if len(op.weights) > 1 else "norm", size)]
    if op.segment == "loss":
        return [("loss", size if op.kind == "exp" else 0.0)]
    known = {"lookup": "lookup", "choose": "route", "dispatch": "dispatch", "combine": "combine"}
    if op.kind in known:
        return [(known[op.kind], size)]
    return [("route", 0.0)] if op.segment in ("router", "dispatch") else []

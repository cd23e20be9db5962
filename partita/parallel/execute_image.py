"""Ops of convolutional models on one rank in exact arithmetic, for execute_ops.py.

Windows go round the edges instead of over padding, and their stride is what spreads them evenly: which
channels and groups meet is that of the real ops, and no plan cuts height or width.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from partita.parallel.execute_algebra import (
    Found,
    Get,
    Local,
    P,
    Place,
    contract,
    inverse,
    times,
    total,
)
from partita.spec.image import POOL
from partita.spec.program import Op

PLANE = ("height", "width")
KERNEL = ("kernel_height", "kernel_width")
INSIDE = ("rows", "columns")


def renamed(x: Local, dims: tuple[str, ...]) -> Local:
    """The same numbers under other names."""
    return replace(x, dims=dims)


def windows(size: int, out: int, kernel: int) -> NDArray[np.int64]:
    """[out, kernel]: which of `size` places each window sees."""
    first = np.arange(out) * max(size // out, 1)
    return (first[:, None] + np.arange(kernel)) % size


def unfold(
    x: Local, at: tuple[NDArray[np.int64], NDArray[np.int64]], dims: tuple[str, ...]
) -> Local:
    """x [..., two places] as [..., rows, kernel height, columns, kernel width]; `dims` names the four."""
    rows, columns = at
    values = x.values[..., rows, :][..., columns]
    spans = [range(n) for n in (*rows.shape, *columns.shape)]
    return Local((*x.dims[:-2], *dims), (*x.spans[:-2], *spans), values)


def fold(x: Local, like: Local, at: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Local:
    """The gradient of what was unfolded: every element adds to the place it came from."""
    rows, columns = at
    half = np.zeros((*x.values.shape[:-2], like.values.shape[-1]), np.int64)
    np.add.at(half, (..., columns), x.values)  # type: ignore[arg-type]
    whole = np.zeros((*x.values.shape[:-4], *like.values.shape[-2:]), np.int64)
    np.add.at(whole, (..., rows, slice(None)), half % P)  # type: ignore[arg-type]
    return replace(like, values=whole % P)


def _windows(op: Op, at: Place, x: Local, kernel: str | int) -> tuple[NDArray[np.int64], ...]:
    out = at.dims(op.writes)
    sizes = [at.size(op.writes, d) for d in out[-2:]]
    held = [kernel if isinstance(kernel, int) else at.size(kernel, d) for d in KERNEL]
    return tuple(windows(n, o, k) for n, o, k in zip(x.values.shape[-2:], sizes, held, strict=True))


def _patches(op: Op, at: Place, x: Local) -> tuple[Local, Local, tuple[NDArray[np.int64], ...]]:
    where = _windows(op, at, x, op.weights[0])
    names = (INSIDE[0], KERNEL[0], INSIDE[1], KERNEL[1])
    return x, unfold(x, where, names), where  # type: ignore[arg-type]


def conv(op: Op, at: Place, get: Get) -> Found:
    """Needs its input for the kernels' gradient."""
    _, patches, _ = _patches(op, at, get(op.reads[0]))
    return {op.writes: contract(at.dims(op.writes), patches, get(op.weights[0]))}


def conv_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Two contractions, and windows folded; of a frozen one the input's gradient."""
    name, weight = op.reads[0], op.weights[0]
    x, patches, where = _patches(op, at, at.filled(name) if op.frozen else get(name))
    dx = fold(contract(patches.dims, g, get(weight)), x, where)  # type: ignore[arg-type]
    return {name: dx} if op.frozen else {name: dx, weight: contract(at.dims(weight), g, patches)}


def relu(op: Op, at: Place, get: Get) -> Found:
    """1/x: like ReLU its slope is known from its output."""
    x = get(op.reads[0])
    return {op.writes: renamed(replace(x, values=inverse(x.values)), at.dims(op.writes))}


def relu_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs its output."""
    y = get(op.writes).values
    return {op.reads[0]: renamed(times(g, -(y * y % P)), at.dims(op.reads[0]))}


def response(op: Op, at: Place, get: Get) -> Found:
    """x times the sum of its squares over a group's channels; of a whole x the share that it writes."""
    x, spans = get(op.reads[0]), at.share(at.tensors[op.writes])
    rows = tuple(d for d in x.dims if d != op.whole[0][1])
    y = contract(x.dims, x, contract(rows, x, x))
    own = tuple(
        slice(s.start - w.start, s.stop - w.start) for s, w in zip(spans, x.spans, strict=True)
    )
    return {op.writes: Local(at.dims(op.writes), spans, y.values[own])}


def response_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs its input; of what others write it knows no gradient."""
    x = get(op.reads[0])
    own = tuple(
        slice(s.start - w.start, s.stop - w.start) for s, w in zip(g.spans, x.spans, strict=True)
    )
    values = np.zeros_like(x.values)
    values[own] = g.values
    g, rows = replace(x, values=values), tuple(d for d in x.dims if d != op.whole[0][1])
    inner = times(contract(x.dims, x, contract(rows, g, x)), 2)
    return {op.reads[0]: total(x.dims, contract(x.dims, g, contract(rows, x, x)), inner)}


def _pooled(op: Op, at: Place, x: Local) -> tuple[Local, tuple[NDArray[np.int64], ...]]:
    where = _windows(op, at, x, POOL)
    out = at.dims(op.writes)[-2:]
    return unfold(x, where, (out[0], KERNEL[0], out[1], KERNEL[1])), where  # type: ignore[arg-type]


def _outer(x: Local, op: Op, at: Place) -> Local:
    """x under the names of what pooling writes, but for the places."""
    return renamed(x, (*at.dims(op.writes)[:-2], *x.dims[-2:]))


def pool(op: Op, at: Place, get: Get) -> Found:
    """The sum of a window's squares; which element it was has no values here."""
    patches, _ = _pooled(op, at, _outer(get(op.reads[0]), op, at))
    pick = op.saves[1]
    return {op.writes: contract(at.dims(op.writes), patches, patches), pick: at.filled(pick)}


def pool_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs its input, and which element it was."""
    x = get(op.reads[0])
    get(op.saves[1])
    outer = _outer(x, op, at)
    patches, where = _pooled(op, at, outer)
    dx = fold(times(contract(patches.dims, g, patches), 2), outer, where)  # type: ignore[arg-type]
    return {op.reads[0]: renamed(dx, x.dims)}


def join(op: Op, at: Place, get: Get) -> Found:
    """A view: groups by another name."""
    return {op.writes: renamed(get(op.reads[0]), at.dims(op.writes))}


def join_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """The same."""
    return {op.reads[0]: renamed(g, at.dims(op.reads[0]))}

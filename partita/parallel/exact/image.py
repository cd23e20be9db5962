"""Ops of convolutional models on one rank in exact arithmetic, for ops.py.

Windows lie as the real ones do: beyond the edge are zeros, and a row within it that is not there is an error.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from partita.parallel.cp.halo import window_of
from partita.parallel.exact.algebra import (
    ExecuteError,
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
from partita.parallel.exact.move import cut_to
from partita.spec.program import Op

KERNEL = ("kernel_height", "kernel_width")
INSIDE = ("rows", "columns")


def renamed(x: Local, dims: tuple[str, ...]) -> Local:
    """The same numbers under other names."""
    return replace(x, dims=dims)


def windows(size: int, held: range, out: range, window: tuple[int, ...]) -> NDArray[np.int64]:
    """[out, kernel]: which of the places `held`, of `size`, each window sees; one behind the last is a zero.
    Raises ExecuteError where it sees what is not held."""
    kernel, stride, padding = window
    seen = np.asarray(out, np.int64)[:, None] * stride - padding + np.arange(kernel)
    inside = (seen >= 0) & (seen < size)
    if (inside & ((seen < held.start) | (seen >= held.stop))).any():
        raise ExecuteError(f"windows see rows beyond {held}: a collective is missing")
    return np.where(inside, seen - held.start, len(held))


def unfold(
    x: Local, at: tuple[NDArray[np.int64], NDArray[np.int64]], dims: tuple[str, ...],
    made: tuple[range, range],
) -> Local:  # fmt: skip
    """x [..., two places] as [..., rows, kernel height, columns, kernel width]; `dims` names the four, `made`
    are the rows and columns."""
    rows, columns = at
    edge = [(0, 0)] * (x.values.ndim - 2)
    values = np.pad(x.values, [*edge, (0, 1), (0, 1)])[..., rows, :][..., columns]
    spans = (made[0], range(rows.shape[1]), made[1], range(columns.shape[1]))
    return Local((*x.dims[:-2], *dims), (*x.spans[:-2], *spans), values)


def fold(x: Local, like: Local, at: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Local:
    """The gradient of what was unfolded: every element adds to the place it came from."""
    rows, columns = at
    height, width = like.values.shape[-2:]
    half = np.zeros((*x.values.shape[:-2], width + 1), np.int64)
    np.add.at(half, (..., columns), x.values)  # type: ignore[arg-type]
    whole = np.zeros((*x.values.shape[:-4], height + 1, width + 1), np.int64)
    np.add.at(whole, (..., rows, slice(None)), half % P)  # type: ignore[arg-type]
    return replace(like, values=whole[..., :height, :width] % P)


def _windows(op: Op, at: Place) -> tuple[tuple[NDArray[np.int64], ...], tuple[range, range]]:
    """Of rows and columns; and those that are made here."""
    x, y = at.tensors[op.reads[0]], at.tensors[op.writes]
    held, made = at.share(x)[-2:], at.share(y)[-2:]
    rows = window_of(x.dims[-2].name, 1)
    sizes = rows.size if rows else x.dims[-2].size, x.dims[-1].size
    found = zip(sizes, held, made, strict=True)
    return tuple(windows(n, h, m, op.window) for n, h, m in found), (made[0], made[1])


def crop(op: Op, at: Place, get: Get) -> Found:
    """Rows of pixels."""
    x, spans = get(op.reads[0]), at.share(at.tensors[op.writes])
    return {op.writes: replace(cut_to(x, spans, op.name), dims=at.dims(op.writes))}


def crop_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Pixels have no gradient."""
    return {}


def _patches(op: Op, at: Place, x: Local) -> tuple[Local, tuple[NDArray[np.int64], ...]]:
    where, made = _windows(op, at)
    names = (INSIDE[0], KERNEL[0], INSIDE[1], KERNEL[1])
    return unfold(x, where, names, made), where  # type: ignore[arg-type]


def conv(op: Op, at: Place, get: Get) -> Found:
    """Needs its input for the kernels' gradient; LoRA's B A x is added."""
    x, out = get(op.reads[0]), at.dims(op.writes)
    y = contract(out, _patches(op, at, x)[0], get(op.weights[0]))
    if op.extra:
        patches, _ = _patches(op, at, _dropped(op, at, x))
        y = total(out, y, contract(out, patches, *map(get, op.weights[1:])))
    return {op.writes: y}


def _dropped(op: Op, at: Place, x: Local) -> Local:
    """x as an adapter reads it: times a mask, where it drops."""
    if not at.drops:
        return x
    return contract(x.dims, x, at.drawn(op.reads[0], f"{at.block} {op.name} lora"))


def conv_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Two contractions, and windows folded; of a frozen one the input's gradient."""
    name, weight = op.reads[0], op.weights[0]
    x = get(name) if name in op.saves else at.filled(name)
    patches, where = _patches(op, at, x)

    def folded(*weights: str) -> Local:
        return fold(contract(patches.dims, g, *map(get, weights)), x, where)  # type: ignore[arg-type]

    found: Found = {name: folded(weight)}
    if not op.frozen:
        found[weight] = contract(at.dims(weight), g, patches)
    if op.extra:
        a, b = op.weights[1:]
        found[name] = total(x.dims, found[name], _dropped(op, at, folded(a, b)))
        if op.saves:
            patches, _ = _patches(op, at, _dropped(op, at, x))
            found[a] = contract(at.dims(a), g, patches, get(b))
            found[b] = contract(at.dims(b), g, patches, get(a))
    return found


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
    where, made = _windows(op, at)
    out = at.dims(op.writes)[-2:]
    return unfold(x, where, (out[0], KERNEL[0], out[1], KERNEL[1]), made), where  # type: ignore[arg-type]


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

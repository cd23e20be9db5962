"""bf16 products of small matrices by oneDNN's small-matrix kernel, added up in fp32 and rounded once.

    out [rows, columns] (+)= left [rows, summed] right [summed, columns]    out in fp32, the others in bf16

The right lies by pairs, [summed / 2, columns, 2], as the CPU's bf16 instruction reads two neighbours of a sum
at once. x [columns, summed] is turned into that as if two elements were one of fp32; x [summed, columns] is
turned twice, first as it is. What is summed over is even: a last odd token has a column of zeros beside it.

As brgemm.py, of whose matrices and blocks of rows these are: a kernel for each size and thread, 16 kB, where
one of a linear of oneDNN's holds 580 kB. 48 rows of 128 by 88 take 6.6 us on Zen 4 (fp32 13, a linear 43), in
blocks of 128 rows what a linear of 512 takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partita.parallel.kernels.brgemm import BLOCK, FLAG, PLACE, SIZE, blocks, given, groups, in_rows
from partita.parallel.kernels.paired import Call, kernels

WIDTH = 2  # bytes of an element; of what is made twice as many


def _kernels() -> Sequence[Call]:
    found = kernels()
    assert found is not None, "is_there was not asked"
    return found[:3]


def _place(x: Tensor) -> tuple[int, int]:
    assert x.dtype == torch.bfloat16 and x.dim() == 2 and x.stride(1) == 1, (x.dtype, x.stride())
    return x.data_ptr(), max(x.stride(0), x.shape[1])


def _by_pairs(weights: Tensor, back: bool) -> Tensor:
    """weights [matrices, rows, columns] as the right of x W.T, [matrices, columns / 2, 2 rows], or `back` of
    x W, [matrices, rows / 2, 2 columns]."""
    matrices, rows, columns = weights.shape
    _, turn_16, turn_32 = _kernels()
    at = weights.data_ptr()
    if back:  # those of all matrices at once: a pair never is of two
        turned, out = (weights.new_empty(weights.numel()) for _ in range(2))
        every = matrices * rows
        turn_16(every, columns, at, columns, turned.data_ptr(), every)
        turn_32(columns, every // 2, turned.data_ptr(), every // 2, out.data_ptr(), columns)
        return out.view(matrices, rows // 2, 2 * columns)
    out = weights.new_empty(matrices, columns // 2, 2 * rows)
    to, step, half = out.data_ptr(), WIDTH * rows * columns, columns // 2
    n, k = SIZE(rows), SIZE(half)
    for _ in range(matrices):
        turn_32(n, k, at, k, to, n)
        at, to = at + step, to + step
    return out


def _multiply(out: Tensor, x: Tensor, rights: Tensor, counts: Sequence[int]) -> None:
    """out = x by each of rights [matrices, summed / 2, 2 columns] of its `counts` of rows."""
    columns, summed = out.shape[1], x.shape[1]
    (a, lda), b, multiply = _place(x), rights.data_ptr(), _kernels()[0]
    assert x.shape[0] == out.shape[0] and out.is_contiguous()
    c, step, stride, matrix = (
        out.data_ptr(),
        2 * WIDTH * columns,
        WIDTH * lda,
        WIDTH * summed * columns,
    )
    n, k, row, over, paired = SIZE(columns), SIZE(summed), SIZE(lda), FLAG(False), FLAG(True)
    follow = len(out)
    for count in counts:
        for rows, more in given(count):
            multiply(more if more <= follow else rows, n, k, row, n, n, over, a, b, c, paired)
            a, c, follow = a + rows * stride, c + rows * step, follow - rows
        b += matrix


def grouped(out: Tensor, x: Tensor, weights: Tensor, counts: Sequence[int], back: bool) -> None:
    """out = x W.T, or `back` x W, of each matrix W of weights [matrices, rows, columns] and its `counts` of
    the rows of x. Rows and columns are even."""
    x = in_rows(x)
    for some, rows in groups(counts, weights[0].numel()):
        into = out[rows]
        made = into.new_empty(into.shape, dtype=torch.float32)
        _multiply(made, x[rows], _by_pairs(weights[some].contiguous(), back), counts[some])
        into.copy_(made)


def add_grouped(gradients: Tensor, dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    """gradients [matrices, rows, columns], in fp32, += dy.T x of each one's `counts` of rows."""
    rows, columns = gradients.shape[1:]
    assert dy.shape == (sum(counts), rows) and x.shape == (sum(counts), columns)
    assert gradients.is_contiguous() and gradients.dtype == torch.float32
    dy, x = in_rows(dy), in_rows(x)
    multiply, turn_16, turn_32 = _kernels()
    left, turned, right = (dy.new_empty(n, BLOCK) for n in (rows, columns, columns))
    none = dy.new_zeros(max(rows, columns))
    (d, ldd), (e, lde), zeros = _place(dy), _place(x), PLACE(none.data_ptr())
    at, to, c, matrix = (
        left.data_ptr(),
        turned.data_ptr(),
        gradients.data_ptr(),
        2 * WIDTH * rows * columns,
    )
    m, n, dn, en, block, half, one = map(SIZE, (rows, columns, ldd, lde, BLOCK, BLOCK // 2, 1))
    a, t, b, more = PLACE(at), PLACE(to), PLACE(right.data_ptr()), FLAG(True)
    for count in counts:
        for some in blocks(count):
            turn_16(some, m, d, dn, a, block)
            turn_16(some, n, e, en, t, block)
            even = some + some % 2
            if even > some:
                turn_16(one, m, zeros, m, at + WIDTH * some, block)
                turn_16(one, n, zeros, n, to + WIDTH * some, block)
            turn_32(n, even // 2, t, half, b, n)
            multiply(m, n, even, block, n, n, more, a, b, c, more)
            d, e = d + WIDTH * some * ldd, e + WIDTH * some * lde
        c += matrix


def add(out: Tensor, dy: Tensor, x: Tensor) -> None:
    """out [rows, columns], in fp32, += dy.T x, of dy [tokens, rows] and x [tokens, columns]."""
    add_grouped(out.unsqueeze(0), dy, x, (dy.shape[0],))

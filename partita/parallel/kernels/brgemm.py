"""fp32 products of small matrices by oneDNN's small-matrix kernel, without a layer's way to it.

torch exports `at::native::cpublas::brgemm` (ATen/native/CPUBlas.h), for what its compiler writes in C++. Its
parameters are in its name: a torch that has it otherwise has nothing of this name, and products are made as
before. A call takes 1 us (torch.mm 4, a linear of oneDNN's 8); 48 rows of 128 by 88 take 6.5 us on Zen 5, by
MKL 12.8; a kernel, one for each (rows, columns, summed, strides) and thread, 16 to 78 kB and 50 us to make
where a linear's takes 580 kB and 400 us.

    out [rows, columns] (+)= left [rows, summed] right [summed, columns]

Rows of each lie side by side; what does not lie so is transposed first, by fbgemm's kernel. Matrices of the
right that fit a core's second cache are multiplied as they are, 128 rows of the left at a time: these are
meant. Of few tokens x W.T is made as (W x.T).T, which turns x and what is made instead of W. The kernel waits
for each line that is in no core's cache: what it is given from far (weights, gradients that are added to) is
read first, in one stream. On Zen 4 64 tokens by 384 of 128 take 67 us so, by MKL, which packs W, 96.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partita.spec.program import LITTLE_HELD, LITTLE_MATRIX, LITTLE_ROWS

BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
TRANSPOSE = "_ZN6fbgemm14transpose_simdIfEEvllPKT_lPS1_l"
FITS = LITTLE_MATRIX
BLOCK = LITTLE_ROWS  # rows at a time, of few sizes (`blocks`); `add` and few tokens want a kernel a number
EVEN = 16  # rows of which a block's are a multiple, where there are several
STEP, MOST_EXACT = (
    8,
    64,
)  # of fewer than a block's, and of fewer than so many each number has its kernel
SIZE, PLACE, FLAG = (
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_bool,
)  # made once for many calls: a third less
YES, NO = FLAG(True), FLAG(False)
WIDTH = 4  # bytes of an element


def library(names: Sequence[str]) -> list[Any] | None:
    """Functions of torch's library that return nothing; None where it lacks one."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        opened = ctypes.CDLL(str(path))
        found = [opened[name] for name in names]
    except (OSError, AttributeError):
        return None
    for function in found:
        function.restype = None
    return found


@cache
def kernels() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """(brgemm, transposition) of torch's library; None where it has no such names."""
    found = library((BRGEMM, TRANSPOSE))
    if found is None:
        return None
    multiply, transpose = found
    multiply.argtypes = [*[SIZE] * 6, FLAG, PLACE, PLACE, PLACE, FLAG]
    transpose.argtypes = [SIZE, SIZE, PLACE, SIZE, PLACE, SIZE]
    return multiply, transpose


@cache
def _read() -> Callable[..., Any]:
    """What reads memory: two places of so many bytes are compared."""
    read = ctypes.CDLL(None).memcmp
    read.argtypes, read.restype = [PLACE, PLACE, ctypes.c_size_t], ctypes.c_int
    return read


def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    found = kernels()
    assert found is not None, "is_little was not asked"
    return found


def _place(x: Tensor) -> tuple[int, int]:
    """(address, elements from row to row) of a matrix, which somebody must hold until it is used."""
    assert x.dtype == torch.float32 and x.dim() == 2 and x.stride(1) == 1, (x.dtype, x.stride())
    return x.data_ptr(), max(x.stride(0), x.shape[1])  # of one row torch may say anything


def in_rows(x: Tensor) -> Tensor:
    """x [rows, columns], of rows that lie side by side."""
    apart = x.stride(1) == 1 and x.stride(0) >= x.shape[1]  # an expanded row is not
    return x if apart else x.contiguous()


def turned(x: Tensor) -> Tensor:
    """x.t() [columns, rows], in rows."""
    rows, columns = x.shape
    if x.stride(0) == 1:
        return x.t()
    x, out = in_rows(x), x.new_empty(columns, rows)
    _kernels()[1](rows, columns, *_place(x), *_place(out))
    return out


def add(out: Tensor, dy: Tensor, x: Tensor) -> None:
    """out [rows, columns] += dy.T x, of dy [tokens, rows] and x [tokens, columns]."""
    (tokens, rows), columns = dy.shape, x.shape[1]
    (dy, lda), (x, ldb) = _apart(dy), _apart(x)
    if tokens > BLOCK:
        _add_grouped(out.unsqueeze(0), dy, x, (tokens,))
        return
    assert out.dtype == dy.dtype == x.dtype == torch.float32 and x.shape[0] == tokens
    assert out.shape == (rows, columns) and out.is_contiguous(), (out.shape, out.stride())
    (multiply, turn), read = _kernels(), _read()
    n, k, m, ldb, steps = _added(rows, columns, tokens, ldb)
    left = dy.new_empty(rows * tokens)
    a, b, c = left.data_ptr(), x.data_ptr(), out.data_ptr()
    turn(k, m, dy.data_ptr(), lda, a, k)
    for some, of_left, of_out in steps:
        read(c, c, of_out)
        multiply(some, n, k, k, ldb, n, YES, a, b, c, NO)
        a, c = a + of_left, c + of_out


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., columns] by weight [rows, columns], however it lies: x W.T."""
    (rows, columns), shape = weight.shape, x.shape
    out = x.new_empty((*shape[:-1], rows))
    x, lda = (x, columns) if x.is_contiguous() else _apart(x.reshape(-1, columns))
    assert x.dtype == weight.dtype == torch.float32
    tokens, (step, beside) = x.numel() // columns, weight.stride()
    if beside == 1 and tokens * (rows + columns) <= rows * columns:
        _times_few(out, x, lda, weight, (tokens, rows, columns, step))
        return out
    _times_many(out, x, lda, in_rows(weight.t() if step == 1 else turned(weight)))
    return out


def back(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [..., rows] by weight [rows, columns] as it lies: dy W."""
    (rows, columns), shape = weight.shape, dy.shape
    out = dy.new_empty((*shape[:-1], columns))
    assert dy.dtype == weight.dtype == torch.float32
    dy, lda = (dy, rows) if dy.is_contiguous() else _apart(dy.reshape(-1, rows))
    _times_many(out, dy, lda, in_rows(weight))
    return out


def _apart(x: Tensor) -> tuple[Tensor, int]:
    """x [rows, columns], of rows that lie side by side, and the elements from row to row."""
    step, beside = x.stride()
    if beside == 1 and step >= x.shape[1]:
        return x, step
    x = x.contiguous()
    return x, x.stride(0)


def _times_many(out: Tensor, x: Tensor, lda: int, right: Tensor) -> None:
    """out [..., columns] = x [..., summed] by right [summed, columns]. Rows of x are `lda` elements apart."""
    summed, columns = right.shape
    n, k, a_row, b_row, steps = _many(out.numel() // columns, columns, summed, lda, right.stride(0))
    multiply, a, b, c = _kernels()[0], x.data_ptr(), right.data_ptr(), out.data_ptr()
    _read()(b, b, WIDTH * summed * columns)
    for some, of_x, of_out in steps:
        multiply(some, n, k, a_row, b_row, n, NO, a, b, c, NO)
        a, c = a + of_x, c + of_out


def _times_few(
    out: Tensor, x: Tensor, lda: int, weight: Tensor, sizes: tuple[int, int, int, int]
) -> None:
    """out [..., rows] = (W x.T).T: no more is turned than W has elements. Rows of x are `lda` apart."""
    (multiply, turn), read = _kernels(), _read()
    held, place, n, k, a_row, m, steps = _few(*sizes)
    memory = x.new_empty(held)
    a, b, to = weight.data_ptr(), memory.data_ptr(), out.data_ptr()
    turn(n, k, x.data_ptr(), lda, b, n)
    c = b + place
    for some, much, of_weight, of_out in steps:
        read(a, a, much)
        multiply(some, n, k, a_row, n, n, NO, a, b, c, NO)
        turn(some, n, c, n, to, m)
        a, to = a + of_weight, to + of_out


# What calls of one size are given, made once: numbers and, for each block of rows, how many they are and how
# many bytes further the next one lies.


@lru_cache(4096)
def _added(rows: int, columns: int, tokens: int, ldb: int) -> tuple[Any, ...]:
    """Of `add`."""
    steps = [(SIZE(n), WIDTH * n * tokens, WIDTH * n * columns) for n in _blocks_of(rows, columns)]
    return SIZE(columns), SIZE(tokens), SIZE(rows), SIZE(ldb), steps


@lru_cache(4096)
def _many(tokens: int, rows: int, columns: int, lda: int, ldb: int) -> tuple[Any, ...]:
    """Of `_times_many`."""
    steps = [(SIZE(n), WIDTH * n * lda, WIDTH * n * rows) for n in blocks(tokens)]
    return SIZE(rows), SIZE(columns), SIZE(lda), SIZE(ldb), steps


@lru_cache(4096)
def _few(tokens: int, rows: int, columns: int, step: int) -> tuple[Any, ...]:
    """Of `_times_few`, before them the elements that are held and the byte at which what is made begins."""
    parts = _blocks_of(rows, tokens)
    steps = [
        (SIZE(n), WIDTH * (n * step - step + columns), WIDTH * n * step, WIDTH * n) for n in parts
    ]
    held, place = (columns + parts[0]) * tokens, WIDTH * columns * tokens
    return held, place, SIZE(tokens), SIZE(columns), SIZE(step), SIZE(rows), steps


@lru_cache(4096)
def _blocks_of(rows: int, columns: int) -> Sequence[int]:
    """Rows of each call, of `columns` elements each."""
    each = max(LITTLE_HELD // max(columns, 1) // EVEN, 1) * EVEN
    return tuple(min(each, rows - first) for first in range(0, rows, each))


def groups(counts: Sequence[int], matrix: int) -> Iterator[tuple[slice, slice]]:
    """(matrices, their rows): some at a time, that fit together."""
    each, first = max(FITS // matrix, 1), 0
    for at in range(0, len(counts), each):
        rows = sum(counts[at : at + each])
        yield slice(at, at + each), slice(first, first + rows)
        first += rows


def grouped(out: Tensor, x: Tensor, weights: Tensor, counts: Sequence[int], back: bool) -> None:
    """out = x W.T, or `back` x W, of each matrix W of weights [matrices, rows, columns] and its `counts` of
    the rows of x. Narrower operands are widened, and what is made is rounded once."""
    for some, rows in groups(counts, weights[0].numel()):
        wide = weights[some].to(torch.float32)
        if not back:
            wide = _each_turned(wide.contiguous())
        into = out[rows]
        made = into
        if out.dtype != torch.float32:
            made = into.new_empty(into.shape, dtype=torch.float32)
        _grouped(made, x[rows].to(torch.float32), wide, counts[some])
        if made is not into:
            into.copy_(made)


def _each_turned(weights: Tensor) -> Tensor:
    experts, rows, columns = weights.shape
    out, (_, turn) = weights.new_empty(experts, columns, rows), _kernels()
    a, b, step, m, n = (
        weights.data_ptr(),
        out.data_ptr(),
        WIDTH * rows * columns,
        SIZE(rows),
        SIZE(columns),
    )
    for _ in range(experts):
        turn(m, n, a, n, b, m)
        a, b = a + step, b + step
    return out


def _grouped(out: Tensor, x: Tensor, rights: Tensor, counts: Sequence[int]) -> None:
    summed, columns = rights.shape[1:]
    assert x.shape == (len(out), summed) and out.shape[1] == columns
    assert rights.dtype == torch.float32
    x, rights, (multiply, _) = in_rows(x), rights.contiguous(), _kernels()
    (a, lda), (c, ldc), b, follow = _place(x), _place(out), rights.data_ptr(), len(out)
    n, k, x_row, out_row, no = SIZE(columns), SIZE(summed), SIZE(lda), SIZE(ldc), FLAG(False)
    for count in counts:
        for rows, more in given(count):
            multiply(more if more <= follow else rows, n, k, x_row, n, out_row, no, a, b, c, no)
            a, c, follow = a + WIDTH * rows * lda, c + WIDTH * rows * ldc, follow - rows
        b += WIDTH * summed * columns


def add_grouped(gradients: Tensor, dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    """gradients [matrices, rows, columns] += dy.T x of each one's `counts` of rows; narrower ones widened."""
    for some, rows in groups(counts, gradients[0].numel()):
        d, wide = in_rows(dy[rows].to(torch.float32)), in_rows(x[rows].to(torch.float32))
        _add_grouped(gradients[some], d, wide, counts[some])


def _add_grouped(gradients: Tensor, dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    rows, columns = gradients.shape[1:]
    assert dy.shape == (sum(counts), rows) and x.shape == (sum(counts), columns)
    assert gradients.is_contiguous() and gradients.dtype == torch.float32
    (multiply, turn), left = _kernels(), dy.new_empty(rows, BLOCK)  # strides that come again
    (a, lda), (b, ldb), c = _place(dy), _place(x), gradients.data_ptr()
    m, n, dy_row, x_row, block = map(SIZE, (rows, columns, lda, ldb, BLOCK))
    at, yes, no = PLACE(left.data_ptr()), FLAG(True), FLAG(False)
    for count in counts:
        for some in blocks(count):
            turn(some, m, a, dy_row, at, block)
            multiply(m, n, some, block, x_row, n, yes, at, b, c, no)
            a, b = a + WIDTH * some * lda, b + WIDTH * some * ldb
        c += WIDTH * rows * columns


@lru_cache(4096)
def blocks(count: int) -> Sequence[int]:
    """Rows of each call, as few as can be: of more than a block's all but the last are multiples of EVEN, and
    that is nearly a block, so that there are few numbers, as each wants a kernel of its own."""
    last = count if count <= BLOCK else BLOCK - EVEN + count % EVEN if count % EVEN else 0
    whole, rest = divmod(count - last, BLOCK)
    return (*(BLOCK,) * whole, *(n for n in (rest, last) if n))


@lru_cache(4096)
def given(count: int) -> Sequence[tuple[int, int]]:
    """The same, and how many rows a call may be given where more follow, which are made again: fewer numbers
    still, for a thirtieth of the time."""
    if MOST_EXACT <= count < BLOCK:
        return ((count, -(-count // STEP) * STEP),)
    return tuple((rows, rows) for rows in blocks(count))

"""Weights' gradients of bf16 operands, added up in fp32 as they are made.

    gradient [rows, columns] += dy.T x, of dy [tokens, rows] and x [tokens, columns]

A 16-bit product writes a whole matrix, which then is read, widened and added. oneDNN's small-matrix kernel,
which torch exports (see brgemm.py), adds to fp32 what it makes: half's products of 128 tokens take 978 to
2160 us so, where product and addition take 1480 to 2760 (Zen 4, gradients not in caches), and a sum is never
rounded to 16 bits. The kernel wants dy turned and x with its tokens in pairs, which fbgemm's transpositions
make in 2 to 4 % of that time, as large as dy and twice x. It waits for each line of the gradient that it
adds to, so that some rows are read first, in one stream, and added to while they are in a core's cache.
Tokens go 128 at a time, so that any number of them is made by no more than sixteen kernels (of eight numbers
of tokens, for a block's rows and the last ones), 50 us to make each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from partita.comm.processes import limits_onednn
from partita.parallel.kernels.brgemm import FLAG, PLACE, SIZE, in_rows, library

BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
TURN_16 = "_ZN6fbgemm14transpose_simdItEEvllPKT_lPS1_l"
TURN_32 = "_ZN6fbgemm14transpose_simdIfEEvllPKT_lPS1_l"
BLOCK = 1 << 16  # elements of a gradient that are read and then added to: 256 kB
TOKENS = 128  # that a kernel is given at a time
STEP = 16  # rows of a block, and tokens of what remains, are multiples of so many: zeros lie behind
MOST = 512  # tokens of which something is gained
Call = Callable[..., Any]


@cache
def kernels() -> tuple[Call, Call, Call, Call] | None:
    """(brgemm, transposition of 16 bits, of 32 bits, what reads memory); None where there are none, or the
    CPU has no bf16 products, or has tiles, whose state the kernel would leave behind."""
    cpu: Any = torch.cpu
    try:
        if not cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported():
            return None
        if limits_onednn() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None  # without its instructions oneDNN would end the process
        found, read = library((BRGEMM, TURN_16, TURN_32)), ctypes.CDLL(None).memcmp
    except (OSError, AttributeError):
        return None
    if found is None:
        return None
    multiply, narrow, wide = found
    multiply.argtypes = [*[SIZE] * 6, FLAG, PLACE, PLACE, PLACE, FLAG]
    narrow.argtypes = wide.argtypes = [SIZE, SIZE, PLACE, SIZE, PLACE, SIZE]
    read.argtypes, read.restype = [PLACE, PLACE, ctypes.c_size_t], ctypes.c_int
    return multiply, narrow, wide, read


def is_there() -> bool:
    """Whether there are kernels, and nobody forbids oneDNN: then a call would not return."""
    return kernels() is not None and bool(torch.backends.mkldnn.enabled)


def holds_less(tokens: int, rows: int, columns: int) -> bool:
    """Whether what is turned is no larger than the 16-bit product."""
    return tokens * (columns + max(rows, columns)) <= rows * columns


def add(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """gradient [rows, columns] in fp32 += dy.T x of bf16 dy [tokens, rows] and x [tokens, columns]."""
    (multiply, _, _, read), (rows, columns) = _kernels(), gradient.shape
    assert gradient.dtype == torch.float32 and dy.dtype == x.dtype == torch.bfloat16
    assert dy.shape == (x.shape[0], rows) and x.shape[1] == columns
    assert gradient.stride() == (columns, 1) or rows == 1
    dy, x = in_rows(dy), in_rows(x)
    parts = [
        (_turned(d), _paired(part))
        for d, part in zip(dy.split(TOKENS), x.split(TOKENS), strict=True)
    ]
    places = [(d.shape[1], d.data_ptr(), part.data_ptr()) for d, part in parts]
    each, c = max(BLOCK // columns // STEP, 1) * STEP, gradient.data_ptr()
    for first in range(0, rows, each):
        some, into = min(each, rows - first), c + 4 * columns * first
        read(into, into, 4 * columns * some)
        for n, a, b in places:
            multiply(some, columns, n, n, columns, columns, True, a + 2 * n * first, b, into, True)


def _kernels() -> tuple[Call, Call, Call, Call]:
    found = kernels()
    assert found is not None, "is_there was not asked"
    return found


def _turned(x: Tensor) -> Tensor:
    """x.t() [columns, tokens], and zeros behind tokens."""
    tokens, columns = x.shape
    whole = -(-tokens // STEP) * STEP
    out = x.new_empty(columns, whole)
    if whole > tokens:
        out[:, tokens:].zero_()
    _kernels()[1](tokens, columns, x.data_ptr(), x.stride(0), out.data_ptr(), whole)
    return out


def _paired(x: Tensor) -> Tensor:
    """x [tokens, columns] as [tokens / 2, columns, 2]: turned by single elements, and back by pairs."""
    turned = _turned(x)
    columns, pairs = turned.shape[0], turned.shape[1] // 2
    out = x.new_empty(pairs, columns, 2)
    _kernels()[2](columns, pairs, turned.data_ptr(), pairs, out.data_ptr(), columns)
    return out

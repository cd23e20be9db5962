"""fp8.py's rounding by Triton kernels: the largest element is one read, the 8 bits one read and one write.

    maximum   largest element of a tensor, of each row or of each column: an atomic maximum of bits
    scaled    bits of x times its scale, saturated; laid so that the dim which the product adds up is
              contiguous, as `torch._scaled_mm` asks for both operands, so that nothing is copied for it
    in_blocks x rounded with one scale in 128 elements, or 128 x 128, wide again: no kernel multiplies these

The same 8 bits as torch's operators make: scales are powers of two, the cast rounds to even. Imported where
Triton is (comm/random/triton_kernels.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMATS = {  # name: (dtype, Triton's, largest, exponent of the largest power of two)
    "e4m3": (torch.float8_e4m3fn, tl.float8e4nv, 448.0, 8),
    "e5m2": (torch.float8_e5m2, tl.float8e5, 57344.0, 15),
}
WIDE = (torch.bfloat16, torch.float32)
TENSOR, ROWS, COLUMNS = 0, 1, 2
BLOCK = 128
TILES = {0: (BLOCK, 32), 1: (32, BLOCK), 2: (BLOCK, BLOCK)}  # of in_blocks, by the dim that is cut


SIZES = (
    "M",
    "N",
    "pitch",
)  # in UP (M) and ALONG (N, pitch): 16 where all are, so that 16 bytes are read at once


@triton.jit
def _tile(at, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Rows [BM, 1] and columns [1, BN] of tile `at`, int64, and which lie in [M, N]."""
    across = tl.cdiv(N, BN)
    rows = (at // across).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    columns = (at % across).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    return rows, columns, (rows < M) & (columns < N)


@triton.jit
def _bits_of(v):
    """|v| as an integer: in the order of sizes, NaN above all."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scales(bits, TOP: tl.constexpr):
    """The scale for a largest element of these bits, and what undoes it: powers of two, 2^126 at the most."""
    exponent = bits >> 23
    biased = tl.where(exponent == 255, TOP + 127, tl.minimum(TOP + 253 - exponent, 253))
    biased = tl.where((bits == 0) | (bits > 0x7F800000), 127, biased)
    undo = (254 - biased) << 23
    return (biased << 23).to(tl.float32, bitcast=True), undo.to(tl.float32, bitcast=True)


@triton.jit
def _rounded(v, LIMIT: tl.constexpr, FORM: tl.constexpr):
    low = tl.maximum(v, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(low, LIMIT, propagate_nan=tl.PropagateNan.ALL).to(FORM)


@triton.jit(do_not_specialize=SIZES)
def _maximum(
    x, found, M, N, pitch,
    UP: tl.constexpr, ALONG: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    M, N, pitch = M * UP, N * ALONG, pitch * ALONG
    last = tl.num_programs(0) - 1  # backwards: _scaled begins where this ends, in the L2 cache
    rows, columns, inside = _tile(last - tl.program_id(0), M, N, BM, BN)
    bits = _bits_of(tl.load(x + rows * pitch + columns, mask=inside, other=0).to(tl.float32))
    if PARTS == 0:
        tl.atomic_max(found, tl.max(tl.max(bits, 1), 0), sem="relaxed")
    elif PARTS == 1:
        tl.atomic_max(found + rows, tl.max(bits, 1)[:, None], mask=rows < M, sem="relaxed")
    else:
        tl.atomic_max(found + columns, tl.max(bits, 0)[None, :], mask=columns < N, sem="relaxed")


@triton.jit(do_not_specialize=SIZES)
def _scaled(
    x, largest, out, turned, scale, undo, M, N, pitch,
    UP: tl.constexpr, ALONG: tl.constexpr, PARTS: tl.constexpr, LIES: tl.constexpr,
    TURNED: tl.constexpr, LIMIT: tl.constexpr, TOP: tl.constexpr,
    FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [M, N] where LIES, turned [N, M] where TURNED; scale and undo by the first tiles' programs."""
    M, N, pitch = M * UP, N * ALONG, pitch * ALONG
    rows, columns, inside = _tile(tl.program_id(0), M, N, BM, BN)
    v = tl.load(x + rows * pitch + columns, mask=inside, other=0).to(tl.float32)
    if PARTS == 0:
        factor, back = _scales(_bits_of(tl.load(largest)), TOP)
        if tl.program_id(0) == 0:
            tl.store(scale, factor)
            tl.store(undo, back)
    elif PARTS == 1:
        factor, back = _scales(_bits_of(tl.load(largest + rows, mask=rows < M, other=0)), TOP)
        if tl.program_id(0) % tl.cdiv(N, BN) == 0:
            tl.store(scale + rows, factor, mask=rows < M)
            tl.store(undo + rows, back, mask=rows < M)
    else:
        factor, back = _scales(_bits_of(tl.load(largest + columns, mask=columns < N, other=0)), TOP)
        if tl.program_id(0) < tl.cdiv(N, BN):
            tl.store(scale + columns, factor, mask=columns < N)
            tl.store(undo + columns, back, mask=columns < N)
    small = _rounded(v * factor, LIMIT, FORM)
    if LIES:
        tl.store(out + rows * N + columns, small, mask=inside)
    if TURNED:
        tl.store(turned + columns * M + rows, small, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _in_blocks(
    x, out, M, N, pitch,
    UP: tl.constexpr, ALONG: tl.constexpr, DIM: tl.constexpr, LIMIT: tl.constexpr, TOP: tl.constexpr,
    FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    M, N, pitch = M * UP, N * ALONG, pitch * ALONG
    rows, columns, inside = _tile(tl.program_id(0), M, N, BM, BN)
    v = tl.load(x + rows * pitch + columns, mask=inside, other=0).to(tl.float32)
    bits = _bits_of(v)
    if DIM == 0:
        largest = tl.max(bits, 0)[None, :]
    elif DIM == 1:
        largest = tl.max(bits, 1)[:, None]
    else:
        largest = tl.max(tl.max(bits, 1), 0)
    factor, back = _scales(largest, TOP)
    wide = _rounded(v * factor, LIMIT, FORM).to(tl.float32) * back
    tl.store(out + rows * N + columns, wide.to(out.dtype.element_ty), mask=inside)


def _flat(x: Tensor) -> Tensor:
    """x [..., columns] as [rows, columns], columns contiguous."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _grid(sizes: tuple[int, ...], tile: tuple[int, int]) -> tuple[int]:
    return (triton.cdiv(sizes[0], tile[0]) * triton.cdiv(sizes[1], tile[1]),)


def _sizes(flat: Tensor, turned: bool = False) -> dict[str, int]:
    """What kernels call SIZES, in units; M's is 16 only where rows are written along it, `turned`."""
    (rows, columns), pitch = flat.shape, flat.stride(0)
    up = 16 if turned and rows % 16 == 0 else 1
    along = 16 if columns % 16 == 0 and pitch % 16 == 0 else 1
    return {
        "M": rows // up,
        "N": columns // along,
        "pitch": pitch // along,
        "UP": up,
        "ALONG": along,
    }


def maximum(x: Tensor, parts: int) -> Tensor | None:
    """The largest absolute element, fp32: of all (), of each row [..., 1] or of each column [1, N] (x a
    matrix then)."""
    if x.dtype not in WIDE:
        return None
    flat = _flat(x)
    shape = {TENSOR: (), ROWS: (*x.shape[:-1], 1), COLUMNS: (1, x.shape[-1])}[parts]
    found = torch.zeros(shape, dtype=torch.int32, device=x.device)
    tile = (32, 256)
    _maximum[_grid(flat.shape, tile)](
        flat, found, **_sizes(flat), PARTS=parts, BM=tile[0], BN=tile[1], num_warps=8
    )
    return found.view(torch.float32)


def scaled(
    x: Tensor, name: str, largest: Tensor, parts: int, turned: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(bits of x's shape, their scale, its inverse), the scales fp32 of largest's shape. `turned`: the
    matrix lies transposed, its columns contiguous."""
    if x.dtype not in WIDE:
        return None
    flat = _flat(x)
    out = torch.empty(
        flat.shape[::-1] if turned else flat.shape, dtype=FORMATS[name][0], device=x.device
    )
    scale, undo = _launch(flat, name, largest, parts, (None, out) if turned else (out, None))
    return (out.t() if turned else out).view(x.shape), scale, undo


def both(x: Tensor, name: str, largest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """With one scale for the tensor: (bits of x's shape, the same as a matrix with contiguous columns, their
    scale, its inverse)."""
    if x.dtype not in WIDE:
        return None
    flat, dtype = _flat(x), FORMATS[name][0]
    out = torch.empty(flat.shape, dtype=dtype, device=x.device)
    turned = torch.empty(flat.shape[::-1], dtype=dtype, device=x.device)
    scale, undo = _launch(flat, name, largest, TENSOR, (out, turned))
    return out.view(x.shape), turned.t(), scale, undo


def _launch(
    flat: Tensor, name: str, largest: Tensor, parts: int, outs: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Writes outs (as it lies, turned); their scale and its inverse."""
    (out, turned), (_, form, limit, top) = outs, FORMATS[name]
    largest = largest.float().contiguous()
    scale, undo = torch.empty_like(largest), torch.empty_like(largest)
    tile = (32, 256) if turned is None else (128, 64)
    _scaled[_grid(flat.shape, tile)](
        flat, largest, turned if out is None else out, out if turned is None else turned,
        scale, undo, **_sizes(flat, turned is not None),
        PARTS=parts, LIES=out is not None, TURNED=turned is not None, LIMIT=limit, TOP=top, FORM=form,
        BM=tile[0], BN=tile[1], num_warps=8,
    )  # fmt: skip
    return scale, undo


def in_blocks(x: Tensor, name: str, dim: int) -> Tensor | None:
    """x with each BLOCK along `dim` (0 or 1 of a matrix, -1 the last; 2: both dims) in 8 bits of its own
    scale, in x's dtype again."""
    if x.dtype not in WIDE:
        return None
    _, form, limit, top = FORMATS[name]
    flat, dim = _flat(x), 1 if dim == -1 else dim
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    tile = TILES[dim]
    _in_blocks[_grid(flat.shape, tile)](
        flat, out, **_sizes(flat), DIM=dim, LIMIT=limit, TOP=top, FORM=form,
        BM=tile[0], BN=tile[1], num_warps=8 if dim == 2 else 4,
    )  # fmt: skip
    return out.view(x.shape)

"""What a layer does between its products on a GPU in 16 bits, a row at a time, by one Triton kernel each: the
gate of an mlp and RMSNorm, forward and backward. torch's operators (model/mlp.py, parallel/sp/norm.py) pass
over memory for each of their steps, and over halves of rows at a third of its rate.

Each step is rounded where the operators round it, so that results are theirs but for the order of sums.
Imported where Triton is (comm/triton_kernels.py); annotations here are Triton's, not strings.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a row that a program takes of a gate
PROGRAMS = (
    1024  # programs of a norm's backward, at most: each adds up its rows' gradient of the weight
)
WIDEST = 16384  # a row that a program of a norm holds


@triton.jit
def _silu(g):
    return g / (1.0 + tl.exp(-g))


@triton.jit
def _gate(x, y, width, SIZE: tl.constexpr):
    """y = silu(gate) up of a row (gate, up)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    left = x + row * 2 * width + at
    kind = y.dtype.element_ty
    gate = tl.load(left, mask=inside, other=0).to(tl.float32)
    up = tl.load(left + width, mask=inside, other=0).to(tl.float32)
    s = _silu(gate).to(kind).to(tl.float32)
    tl.store(y + row * width + at, (s * up).to(kind), mask=inside)


@triton.jit
def _gate_back(x, dy, dx, width, SIZE: tl.constexpr):
    """dx = (d gate, d up) of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    left, kind = row * 2 * width + at, dx.dtype.element_ty
    gate = tl.load(x + left, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + left + width, mask=inside, other=0).to(tl.float32)
    d = tl.load(dy + row * width + at, mask=inside, other=0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    d_up = _silu(gate).to(kind).to(tl.float32) * d
    d_gate = (d * up).to(kind).to(tl.float32) * share * (1.0 + gate * (1.0 - share))
    tl.store(dx + left, d_gate.to(kind), mask=inside)
    tl.store(dx + left + width, d_up.to(kind), mask=inside)


@triton.jit
def _norm(x, weight, y, width, epsilon, SIZE: tl.constexpr):
    """y = cast(x / rms(x)) weight of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside, kind = at < width, y.dtype.element_ty
    wide = tl.load(x + row * width + at, mask=inside, other=0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + epsilon)
    unit = (wide * scale).to(kind).to(tl.float32)
    tl.store(y + row * width + at, (unit * w).to(kind), mask=inside)


@triton.jit
def _norm_back(
    x, weight, dy, dx, parts, rows, width, epsilon, EACH: tl.constexpr, SIZE: tl.constexpr
):
    """dx of EACH rows side by side, and the sum of their gradients of the weight."""
    at = tl.arange(0, SIZE)
    kind = dx.dtype.element_ty
    w = tl.load(weight + at, mask=at < width, other=0).to(tl.float32)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for i in range(EACH):
        row = tl.program_id(0).to(tl.int64) * EACH + i
        inside, first = (at < width) & (row < rows), row * width
        wide = tl.load(x + first + at, mask=inside, other=0).to(tl.float32)
        d = tl.load(dy + first + at, mask=inside, other=0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + epsilon)
        unit = wide * scale
        slope = d * unit.to(kind).to(tl.float32)
        total += slope
        along = tl.sum(slope * w, 0) / width
        found = ((d * w).to(kind).to(tl.float32) - unit * along) * scale
        tl.store(dx + first + at, found.to(kind), mask=inside)
    tl.store(parts + tl.program_id(0).to(tl.int64) * width + at, total, mask=at < width)


def gate(x: Tensor) -> Tensor | None:
    """silu(gate) up of x [..., (gate, up)]."""
    if not _takes(x):
        return None
    width = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], width))
    if y.numel():
        _gate[(y.numel() // width, triton.cdiv(width, BLOCK))](x, y, width, SIZE=BLOCK)
    return y


def gate_back(x: Tensor, dy: Tensor) -> Tensor | None:
    """The gradient of x."""
    if not _takes(x):
        return None
    dy, width, dx = dy.contiguous(), x.shape[-1] // 2, torch.empty_like(x)
    if dy.numel():
        grid = dy.numel() // width, triton.cdiv(width, BLOCK)
        _gate_back[grid](x, dy, dx, width, SIZE=BLOCK)
    return dx


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor | None:
    """cast(x / rms(x)) weight of x [..., hidden]."""
    width = x.shape[-1]
    if not _takes(x) or width > WIDEST:
        return None
    y = torch.empty_like(x)
    if x.numel():
        _norm[(x.numel() // width,)](x, weight, y, width, epsilon, **_of(width))
    return y


def norm_back(
    x: Tensor, weight: Tensor, dy: Tensor, epsilon: float
) -> tuple[Tensor, Tensor] | None:
    """Gradients of x, and of the weight in fp32 [hidden]."""
    width = x.shape[-1]
    if not _takes(x) or width > WIDEST or not x.numel():
        return None
    rows, dy, dx = x.numel() // width, dy.contiguous(), torch.empty_like(x)
    each = triton.cdiv(rows, PROGRAMS)
    parts = torch.empty(triton.cdiv(rows, each), width, dtype=torch.float32, device=x.device)
    _norm_back[(len(parts),)](
        x, weight, dy, dx, parts, rows, width, epsilon, EACH=each, **_of(width)
    )
    return dx, parts.sum(0)


def _takes(x: Tensor) -> bool:
    return x.element_size() == 2 and x.is_contiguous()


def _of(width: int) -> dict[str, int]:
    size = triton.next_power_of_2(width)
    return {"SIZE": size, "num_warps": min(max(size // 512, 1), 16)}

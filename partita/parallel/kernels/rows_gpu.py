"""What a layer does between its products on a GPU in 16 bits, a row at a time, by one Triton kernel each: the
gate of an mlp and RMSNorm, forward and backward. torch's operators (model/mlp.py, parallel/sp/norm.py) pass
over memory for each of their steps, and over halves of rows at a third of its rate.

Each step is rounded where the operators round it, so that results are theirs but for the order of sums. Each
kernel is tried where it runs before it is first used (`prove`). Imported where Triton is
(comm/random/triton_kernels.py); annotations here are Triton's, not strings. A dtype is no value of a
tuple in a kernel: it has a line of its own.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a row that a program takes of a gate
PROGRAMS = (
    1024  # programs of a norm's backward, at most: each adds up its rows' gradient of the weight
)
WIDEST = 16384  # a row that a program of a norm holds
EPSILON = 1e-5  # of the norms that are tried


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
    left = row * 2 * width + at
    kind = dx.dtype.element_ty
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
    inside = at < width
    kind = y.dtype.element_ty
    wide = tl.load(x + row * width + at, mask=inside, other=0).to(tl.float32)
    w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + epsilon)
    unit = (wide * scale).to(kind).to(tl.float32)
    tl.store(y + row * width + at, (unit * w).to(kind), mask=inside)


@triton.jit(do_not_specialize=("rows", "each"))
def _norm_back(x, weight, dy, dx, parts, rows, each, width, epsilon, SIZE: tl.constexpr):
    """dx of `each` rows side by side, and the sum of their gradients of the weight."""
    at = tl.arange(0, SIZE)
    kind = dx.dtype.element_ty
    w = tl.load(weight + at, mask=at < width, other=0).to(tl.float32)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for i in range(each):
        row = tl.program_id(0).to(tl.int64) * each + i
        inside = (at < width) & (row < rows)
        first = row * width
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
    x: Tensor, weight: Tensor, dy: Tensor, epsilon: float, programs: int = PROGRAMS
) -> tuple[Tensor, Tensor] | None:
    """Gradients of x, and of the weight in fp32 [hidden]."""
    width = x.shape[-1]
    if not _takes(x) or width > WIDEST or not x.numel():
        return None
    rows, dy, dx = x.numel() // width, dy.contiguous(), torch.empty_like(x)
    each = triton.cdiv(rows, programs)
    parts = torch.empty(triton.cdiv(rows, each), width, dtype=torch.float32, device=x.device)
    _norm_back[(len(parts),)](x, weight, dy, dx, parts, rows, each, width, epsilon, **_of(width))
    return dx, parts.sum(0)


def _takes(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and x.is_contiguous()


def _of(width: int) -> dict[str, int]:
    size = triton.next_power_of_2(width)
    return {"SIZE": size, "num_warps": min(max(size // 512, 1), 16)}


def prove(name: str, like: Tensor) -> None:
    """Raises ArithmeticError where kernel `name`, of the width and dtype of `like` on its device, makes
    other numbers than torch's operators; tried once a process, in which the host waits for it once."""
    if _takes(like):
        apart = _apart(name, like.device, like.dtype, like.shape[-1])
        if not apart <= 4 * torch.finfo(like.dtype).eps:
            raise ArithmeticError(f"{apart:.1e} of the largest element from torch's operators")


@cache
@torch.no_grad()
def _apart(name: str, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """The largest difference from the operators in fp64, in three rows, relative to the largest element or
    to 1. Rows as wide as a layer's run what the layer runs: nothing is compiled for them alone."""

    def wave(rows: int, across: int, phase: float) -> Tensor:
        angles = torch.arange(rows * across, device=device, dtype=torch.float64) + phase
        return angles.sin().to(dtype).view(rows, across)

    x, weight = wave(3, width, 1.0), wave(1, width, 2.0)[0]
    dy = wave(3, width // 2 if name.startswith("gate") else width, 3.0)
    found = {
        "gate": lambda: gate(x),
        "gate_back": lambda: gate_back(x, dy),
        "norm": lambda: norm(x, weight, EPSILON),
        "norm_back": lambda: norm_back(x, weight, dy, EPSILON, programs=2),
    }[name]()
    if found is None:
        return 0.0  # not taken either way
    pairs = zip(
        found if isinstance(found, tuple) else (found,),
        _by_operators(name, x.double(), weight.double(), dy.double()),
        strict=True,
    )
    apart = [(a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in pairs]
    return float(torch.stack(apart).max())


def _by_operators(name: str, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """What function `name` returns, unrounded."""
    if name.startswith("gate"):
        left, up = x.chunk(2, -1)
        share = left.sigmoid()
        if name == "gate":
            return (left * share * up,)
        d_left = dy * up * share * (1 + left * (1 - share))
        return (torch.cat((d_left, dy * left * share), -1),)
    scale = (x.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    unit = x * scale
    if name == "norm":
        return (unit * weight,)
    slope = dy * unit
    along = (slope * weight).mean(-1, keepdim=True)
    return (dy * weight - unit * along) * scale, slope.sum(0)

"""How a weight is multiplied: what precision changes in a matmul, and whose kernel makes an fp32 one.

MKL, which torch's fp32 products call, keeps to 256-bit vectors on CPUs of other makers than Intel, where
oneDNN fills AVX-512's: 105 against 220 GFLOP/s of a core of Zen 5. There dense layers' fp32 products go
through oneDNN, of operands as they lie. Which kernel makes a product follows from the CPU and from the
product's sizes alone, so that a run repeats itself bit for bit.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

LEAST = 1 << 20  # multiplications of a product: a call of oneDNN's takes longer to begin
LEAST_ADDED = 1 << 21  # of a weight's gradient, which is added up by a pass of its own
NARROW = 64  # rows or columns of a weight: fewer do not fill its kernels
PIECE = 1 << 20  # elements of a weight's gradient that are made at a time
STEP = 16  # tokens whose number varies are given to oneDNN by multiples of so many


class Product(Protocol):
    """How one weight [rows, columns] is multiplied, forward and backward."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., columns] -> [..., rows]."""
        ...

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy [..., rows] -> [..., columns]."""
        ...

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy [tokens, rows], x [tokens, columns] -> [rows, columns]."""
        ...


class Plain:
    """The matmul as it is. Not differentiable: layers' backwards call its halves."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W.T."""
        return times(x, weight)

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy W."""
        return times(dy, weight.t())

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dy.T x."""
        return dy.t() @ x


PLAIN = Plain()


@cache
def has_wider_kernels() -> bool:
    """Whether oneDNN's fp32 kernels use wider vectors than MKL's on this CPU."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (wide and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    with suppress(OSError):
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    return False


def is_wide(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, int, int], least: int
) -> bool:
    """Whether oneDNN makes a product of (tokens, rows, columns): of `least` multiplications or more."""
    tokens, rows, columns = sizes
    large = tokens * rows * columns >= least and min(rows, columns) >= NARROW
    return large and dtype == torch.float32 and device.type == "cpu" and has_wider_kernels()


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., columns] by weight [rows, columns]: x W.T."""
    rows, columns = weight.shape
    if is_wide(x.dtype, x.device, (x.numel() // columns, rows, columns), LEAST):
        return _onednn(x, weight)
    return x @ weight.t()


def add_steady(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """gradient [rows, columns] += dy.T x, all in one dtype, for numbers of tokens that come again: oneDNN
    makes a kernel for each. Some rows are made at a time, so that little memory is held."""
    rows, columns = gradient.shape
    if not is_wide(dy.dtype, dy.device, (dy.shape[0], rows, columns), LEAST_ADDED):
        gradient.addmm_(dy.t(), x)
        return
    right = x.contiguous().t()
    each = max(PIECE // columns, 1)
    for into, part in zip(gradient.split(each), dy.split(each, 1), strict=True):
        into.add_(_onednn(part.t(), right))


def known(x: Tensor, rows: int, least: int = LEAST) -> int:
    """How many of x's tokens [tokens, columns], whose number varies, oneDNN multiplies by a weight of `rows`,
    or for its gradient: a kernel for a number that it has not met takes 400 us to make."""
    tokens, columns = x.shape
    tokens -= tokens % STEP
    return tokens if is_wide(x.dtype, x.device, (tokens, rows, columns), least) else 0


def times_into(out: Tensor, x: Tensor, right: Tensor) -> None:
    """out [tokens, rows] = x [tokens, columns] by right [columns, rows], for tokens whose number varies."""
    whole = known(x, right.shape[1])
    if whole:
        out[:whole].copy_(_onednn(x[:whole], right.t()))
        x, out = x[whole:], out[whole:]
    torch.mm(x, right, out=out)


def add_varied(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """As add_steady, for tokens whose number varies."""
    whole = known(x, dy.shape[1], LEAST_ADDED)
    if whole:
        add_steady(gradient, dy[:whole], x[:whole])
        dy, x = dy[whole:], x[whole:]
    gradient.addmm_(dy.t(), x)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

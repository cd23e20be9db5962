"""How a weight is multiplied: what precision changes in a matmul, and whose kernel makes an fp32 one.

MKL, which torch's fp32 products call, keeps to 256-bit vectors on CPUs of other makers than Intel, where
oneDNN fills AVX-512's: 105 against 220 GFLOP/s of a core of Zen 5. There dense layers' fp32 products go
through oneDNN, of operands as they lie, and by small matrices through its kernel for these (brgemm.py), as
experts' do. Zen 4 executes 512 bits in two halves: there oneDNN makes large products 5 % faster (104 to 108
GFLOP/s for 97 to 101), gradients that are added up and smaller ones slower (54 for 99), which stay MKL's, but
for those of small matrices. Which kernel makes a product follows from the CPU and from the product's sizes
alone, so that a run repeats itself bit for bit.

Of 4 to 32 tokens MKL turns a large weight for each product, where it need not: as (W x.T).T, which turns x
and what is made, 8 tokens by 2816 of 512 take 1.1 ms for 1.8 on a core of Cascade Lake. These are steps of
decoding.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from partita.parallel.kernels import brgemm, brgemm16, paired

LEAST = 1 << 20  # multiplications of a product: a call of oneDNN's takes longer to begin
LEAST_ADDED = 1 << 21  # of a weight's gradient, which is added up by a pass of its own
LEAST_HALVED = 1 << 24  # of one where 512 bits are executed in halves
LITTLE = 1 << 16  # of one that oneDNN's small-matrix kernel makes
THIN = 16  # rows or columns that it takes at least
NARROW = 64  # rows or columns of a weight: fewer do not fill its kernels
PIECE = 1 << 20  # elements of a weight's gradient that are made at a time
WIDENED = 1 << 18  # elements of a narrower product that are added at a time
FEW = (
    3 << 19
)  # multiplications of a 16-bit gradient that fp32's kernel, its operands widened, is not slower at
SOME, LARGE = (
    range(4, 33),
    1 << 18,
)  # tokens, and elements of a weight, that MKL does not turn it for
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
        rows, columns = weight.shape
        if is_little(dy.dtype, dy.device, (dy.numel() // rows, columns, rows)):
            return brgemm.back(dy, weight)
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


@cache
def executes_whole() -> bool:
    """Whether this CPU's units are as wide as AVX-512's vectors: not those of Zen 4 (AMD's family 25), nor of
    Zen 5 for laptops (of family 26 the models 0x20 to 0x2f and 0x60 to 0x6f), which take them in halves."""
    with suppress(OSError):
        said = dict(re.findall(r"^([a-z_ ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
        if said.get("vendor_id") == "AuthenticAMD":
            family, model = int(said.get("cpu family", 0)), int(said.get("model", 0))
            return family != 25 and not (family == 26 and model >> 4 in (2, 6))
    return True


def is_turned(x: Tensor, weight: Tensor) -> bool:
    """Whether MKL would turn a weight where few tokens of x can be: large, in rows, fp32."""
    large = weight.numel() >= LARGE and weight.stride(1) == 1
    return large and x.dtype == torch.float32 and x.device.type == "cpu" and has_mkls_kernels()


@cache
def has_mkls_kernels() -> bool:
    """Whether MKL makes fp32's products, with AVX-512."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkl.is_available() and not has_wider_kernels()


def is_wide(
    dtype: torch.dtype,
    device: torch.device,
    sizes: tuple[int, int, int],
    least: int,
    is_added: bool = False,
) -> bool:
    """Whether oneDNN makes a product of (tokens, rows, columns): of `least` multiplications or more. One
    that `is_added` to a gradient takes a pass more."""
    if not executes_whole():
        if is_added:
            return False
        least = max(least, LEAST_HALVED)
    tokens, rows, columns = sizes
    large = tokens * rows * columns >= least and min(rows, columns) >= NARROW
    return large and dtype == torch.float32 and device.type == "cpu" and has_wider_kernels()


def is_little(dtype: torch.dtype, device: torch.device, sizes: tuple[int, int, int]) -> bool:
    """Whether oneDNN's small-matrix kernel makes a product of (tokens, rows, columns), on this thread
    alone: a rank has no others."""
    tokens, rows, columns = sizes
    if dtype != torch.float32 or not LITTLE <= tokens * rows * columns <= tokens * brgemm.FITS:
        return False
    if rows < THIN or columns < THIN or device.type != "cpu" or not has_wider_kernels():
        return False
    return brgemm.kernels() is not None and not _is_watched()


def _is_watched() -> bool:
    """Whether somebody sees this thread's operators (to count FLOPs, or to run them on nothing), who would
    not see a kernel that is not torch's. Who looks at storages alone sees them: a step that is measured
    computes as any other. torch's is_in_torch_dispatch_mode is one flag for all threads."""
    if not _len_torch_dispatch_stack():
        return False
    return not all(hasattr(m, "watches_storages") for m in _get_current_dispatch_mode_stack())


def is_little_16(x: Tensor, sizes: tuple[int, int, int]) -> bool:
    """Whether its 16-bit form makes one of bf16 x: experts', and gradients of more tokens than is_paired
    takes. What a dense layer rounds is as fast by a linear."""
    even = x.dtype == torch.bfloat16 and not (sizes[1] % 2 or sizes[2] % 2)
    return even and paired.is_there() and is_little(torch.float32, x.device, sizes)


def little_of(x: Tensor, sizes: tuple[int, int, int]) -> ModuleType | None:
    """Which kernel for small matrices makes experts' products: of 16 bits without such instructions fp32's,
    widened, where a call of a linear takes longer. None: neither. A call of torch's for each takes longer
    than halves do."""
    if is_little_16(x, sizes):
        return brgemm16
    few = x.element_size() == 2 and prod(sizes) < FEW
    fits = (few or x.dtype == torch.float32) and is_little(torch.float32, x.device, sizes)
    return brgemm if fits else None


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., columns] by weight [rows, columns]: x W.T."""
    rows, columns = weight.shape
    sizes = x.numel() // columns, rows, columns
    if is_little(x.dtype, x.device, sizes):
        return brgemm.times(x, weight)
    if is_wide(x.dtype, x.device, sizes, LEAST):
        return _onednn(x, weight)
    if sizes[0] in SOME and is_turned(x, weight):
        made = (weight @ x.reshape(-1, columns).t()).t().contiguous()
        return made.view(*x.shape[:-1], rows)
    return x @ weight.t()


def add_steady(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """gradient [rows, columns] += dy.T x, all in one dtype, for numbers of tokens that come again: oneDNN
    makes a kernel for each. Some rows are made at a time, so that little memory is held."""
    rows, columns = gradient.shape
    if is_little(dy.dtype, dy.device, (dy.shape[0], rows, columns)):
        brgemm.add(gradient, dy, x)
        return
    sizes = dy.shape[0], rows, columns
    if not is_wide(dy.dtype, dy.device, sizes, LEAST_ADDED, is_added=True):
        gradient.addmm_(dy.t(), x)
        return
    right = x.contiguous().t()
    each = max(PIECE // columns, 1)
    if rows <= each:
        gradient.add_(_onednn(dy.t(), right))
        return
    for into, part in zip(gradient.split(each), dy.split(each, 1), strict=True):
        into.add_(_onednn(part.t(), right))


def known(x: Tensor, rows: int, is_added: bool = False) -> int:
    """How many of x's tokens [tokens, columns], whose number varies, oneDNN multiplies by a weight of `rows`,
    or for its gradient: a kernel for a number that it has not met takes 400 us to make."""
    tokens, columns = x.shape
    tokens -= tokens % STEP
    sizes, least = (tokens, rows, columns), LEAST_ADDED if is_added else LEAST
    return tokens if is_wide(x.dtype, x.device, sizes, least, is_added=is_added) else 0


def times_into(out: Tensor, x: Tensor, right: Tensor) -> None:
    """out [tokens, rows] = x [tokens, columns] by right [columns, rows], for tokens whose number varies."""
    whole = known(x, right.shape[1])
    if whole:
        out[:whole].copy_(_onednn(x[:whole], right.t()))
        x, out = x[whole:], out[whole:]
    torch.mm(x, right, out=out)


def add_varied(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """As add_steady, for tokens whose number varies."""
    whole = known(x, dy.shape[1], is_added=True)
    if whole:
        add_steady(gradient, dy[:whole], x[:whole])
        dy, x = dy[whole:], x[whole:]
    gradient.addmm_(dy.t(), x)


def add_narrow(gradient: Tensor, made: Tensor) -> None:
    """gradient [rows, columns] += made, of a narrower dtype: on a CPU some rows at a time, as torch first
    copies all it is given in the wide one."""
    if made.device.type != "cpu" or made.numel() <= WIDENED:
        gradient.add_(made)
        return
    each = max(WIDENED // made.shape[1], 1)
    for into, part in zip(gradient.split(each), made.split(each), strict=True):
        into.add_(part)


def is_paired(dy: Tensor, x: Tensor, steady: bool) -> bool:
    """Whether a weight's gradient of bf16 dy [tokens, rows], x [tokens, columns] is added up in fp32 as it is
    made, on this thread alone. What is turned for it shall hold no more than the product would; experts',
    whose numbers of tokens vary (not `steady`), hold little beside all experts' weights."""
    if dy.dtype != torch.bfloat16 or x.dtype != dy.dtype or dy.device.type != "cpu":
        return False
    tokens, rows, columns = *dy.shape, x.shape[1]
    if min(tokens, rows, columns) < THIN or tokens > paired.MOST:
        return False
    fits = not steady or paired.holds_less(tokens, rows, columns)
    return fits and paired.is_there() and not _is_watched()


def is_small(dy: Tensor, x: Tensor) -> bool:
    """Whether a weight's gradient of 16-bit dy [tokens, rows], x [tokens, columns] is so small that a call of
    oneDNN's 16-bit kernel takes longer than widened operands do, which then are little too."""
    tokens, rows, columns = *dy.shape, x.shape[1]
    few = tokens * rows * columns < FEW and min(rows, columns) >= NARROW
    return few and dy.element_size() == 2 and dy.device.type == "cpu"


def add_small(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """gradient += dy.T x of narrower operands, multiplied and added up in the gradient's dtype."""
    gradient.addmm_(dy.to(gradient.dtype).t(), x.to(gradient.dtype))


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

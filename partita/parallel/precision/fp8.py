"""fp8 matmuls (Micikevicius et al. 2022, arXiv 2209.05433): inputs rounded to 8 bits, products added up wide.

    forward    y  = q(x) q(W).T       both e4m3: 4 exponent bits, 3 of mantissa, up to 448
    backward   dx = q(dy) q(W)        dy e5m2 (up to 57,344), or e4m3 too
               dW = q(dy).T q(x)

Before rounding a tensor is multiplied by a scale, after it divided, so that its largest element is near
the format's. Scales are powers of two: numbers in the format's normal range then round to the same value
whatever the scale, so a plan that cuts a tensor otherwise, and so sees another largest element, changes only
what lies 2^-14 and more below it. None exceeds 2^126, so that it and its inverse are normal numbers.
No scale is exchanged between ranks: nothing is sent, each looks back at what it saw itself.

    granularity  tensor  one scale a tensor
                 row     one a row along the dim that the product adds up
                 block   one in 128 along that dim (DeepSeek-V3, 2412.19437, sec. 3.3), 128 x 128 for weights
    scaling      current  from the tensor itself
                 delayed  from the largest of the last HISTORY, this one left out
                 static   from the first that is seen

What is there again in the next pass looks back: a tensor; a weight's row or block, and along the tokens a
feature's row. A token is another one then, and so are a block of tokens and one of a token's features: their
scales are `current` always. Each part remembers for itself.

A scale that looks back leaves ROOM above what was seen (Transformer Engine's `margin`), for the next tensor
may be larger; what outgrows it saturates. Tensors of zeros, or with an element that is not finite, are not
remembered; while nothing is, a tensor is scaled by its own largest.

Where the device multiplies fp8 (NVIDIA from compute capability 8.9 on), one scale a tensor or row goes to its
own kernel, `torch._scaled_mm`; rounding is by Triton's kernels there (fp8_gpu.py). Else this is an emulation:
rounded values are multiplied in bf16, which holds each of them exactly, and added up as wide as the device
does (fp32): the same numbers, but for the order of sums. Storage stays bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from partita.comm.random.triton_kernels import Kernels
from partita.parallel.kernels.product import PLAIN, Product
from partita.spec.plan import PrecisionPlan

FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
ROOM = {"e4m3": 2.0**3, "e5m2": 2.0**8}  # below what was seen 2^11, 2^21 stay normal
HISTORY = 16
BLOCK = 128
TOP_SCALE = 126  # log2 of the largest scale
LARGEST = torch.finfo(torch.float32).max
KERNELS = Kernels("partita.parallel.precision.fp8_gpu")


@dataclass
class Turned:
    """The last gradient in 8 bits as a weight's takes it, which its input's made in one pass: one of a rank,
    until it is taken or another is made. `source` says which memory, and of which version, it was made of."""

    made: Scaled | None = None
    source: tuple[Any, ...] = ()
    storage: StorageWeakRef | None = None  # while it is held, no other storage has its address

    def keep(self, dy: Tensor, made: Scaled) -> None:
        """`made` is of dy."""
        self.made, self.source = made, _source(dy)
        self.storage = StorageWeakRef(dy.untyped_storage())

    def take(self, dy: Tensor) -> Scaled | None:
        """What was made of dy, or of what it is a view of; it is kept no longer."""
        if self.made is None or self.source != _source(dy):
            return None
        made, self.made, self.storage = self.made, None, None
        return made


def _source(dy: Tensor) -> tuple[Any, ...]:
    """Equal for a contiguous tensor's views [..., columns] while nobody writes to it."""
    storage = dy.untyped_storage()._cdata
    return storage, dy.storage_offset(), dy.numel(), dy.shape[-1], dy.dtype, dy._version


@dataclass
class Eight:
    """The matmul of rounded inputs; `seen` holds by role the largest elements that scaling looks back at,
    last first: [HISTORY, parts] (static: [1, parts]), fp32, 0 where is none yet; replaced, never written."""

    plan: PrecisionPlan
    seen: dict[str, Tensor] = field(default_factory=dict)
    turned: Turned = field(default_factory=Turned)
    splits: bool = False  # a weight's gradient does not follow its input's

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """q(x) q(W).T."""
        return self._multiply(self._round(x, "x", -1), self._weight(weight, -1).t())

    def input_gradient(self, dy: Tensor, weight: Tensor) -> Tensor:
        """q(dy) q(W)."""
        return self._multiply(self._both(dy) or self._round(dy, "dy", -1), self._weight(weight, 0))

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """q(dy).T q(x)."""
        made = self.turned.take(dy) if dy.is_contiguous() and not dy.is_inference() else None
        self.splits |= made is None
        return self._multiply((made or self._round(dy, "dy.W", 0)).t(), self._round(x, "x.W", 0))

    def _both(self, dy: Tensor) -> Scaled | None:
        """dy rounded; what its weight's gradient takes is kept. None where that is not one pass."""
        alike = self.plan.fp8_granularity == "tensor" and self.plan.fp8_scaling == "current"
        if (
            self.splits
            or not alike
            or not dy.numel()
            or not dy.is_contiguous()
            or dy.is_inference()
        ):
            return None
        name = "e5m2" if self.plan.fp8_format == "hybrid" else "e4m3"
        largest = by_triton("maximum", dy, 0)
        made = None if largest is None else by_triton("both", dy, name, largest)
        if made is None:
            return None
        out, turned, scale, inverse = made
        self.turned.keep(dy, Scaled(turned, scale, dy.dtype, inverse))
        return Scaled(out, scale, dy.dtype, inverse)

    def _multiply(self, a: Scaled, b: Scaled) -> Tensor:
        blocks = self.plan.fp8_granularity == "block"
        return emulated(a, b) if blocks or not has_kernel(a, b) else by_kernel(a, b)

    def _weight(self, weight: Tensor, dim: int) -> Scaled:
        if self.plan.fp8_granularity != "block":
            return self._round(weight, f"w{dim}", dim)
        current = self.plan.fp8_scaling == "current"
        made = by_triton("in_blocks", weight, "e4m3", 2) if current else None
        if made is not None:
            return Scaled(made, weight.new_ones(()), weight.dtype)
        largest = block_maximum(block_maximum(weight.abs(), 0), 1)
        if not current:
            one_each = largest[::BLOCK, ::BLOCK]
            known = self._looked_back(f"w{dim}", one_each, ROOM["e4m3"])
            largest = known.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            largest = largest[: weight.shape[0], : weight.shape[1]]
        return scaled(weight, "e4m3", largest)

    def _round(self, x: Tensor, role: str, dim: int) -> Scaled:
        if not x.numel():  # rows of an expert that nobody chose
            return Scaled(x, x.new_ones(()), x.dtype)
        hybrid = role.startswith("dy") and self.plan.fp8_format == "hybrid"
        name, granularity = "e5m2" if hybrid else "e4m3", self.plan.fp8_granularity
        current, own = not self._looks_back(role, dim), by_triton
        if granularity == "block":
            made = own("in_blocks", x, name, dim)
            if made is not None:
                return Scaled(made, x.new_ones(()), x.dtype)
            own = no_kernel
        parts = 0 if granularity == "tensor" else 1 if dim == -1 else 2
        largest = own("maximum", x, parts)
        if largest is None:
            largest = maximum(x, granularity, dim)
        if not current:
            largest = self._looked_back(role, largest, ROOM[name])
        made = own("scaled", x, name, largest, parts, dim == 0)
        return scaled(x, name, largest) if made is None else Scaled(*made[:2], x.dtype, made[2])

    def _looks_back(self, role: str, dim: int) -> bool:
        """Whether parts of a tensor that share a scale are the same ones in the next pass."""
        stays = role.startswith("w") or (self.plan.fp8_granularity == "row" and dim == 0)
        return self.plan.fp8_scaling != "current" and (
            self.plan.fp8_granularity == "tensor" or stays
        )

    def _looked_back(self, role: str, largest: Tensor, room: float) -> Tensor:
        """What a tensor of this role is scaled for, fp32; the device is not waited for."""
        largest, static = largest.float(), self.plan.fp8_scaling == "static"
        before = self.seen.get(role)
        if before is None:
            before = largest.new_zeros(1 if static else HISTORY, *largest.shape)
        after = largest[None] if static else torch.cat([largest[None], before[:-1]])
        told = (largest > 0) & largest.isfinite()
        if static:
            told = told & (before == 0)
        self.seen[role] = torch.where(told, after, before)
        top = before.amax(0)
        return torch.where(top > 0, (top * room).clamp(max=LARGEST), largest)


@dataclass(frozen=True)
class Products:
    """The products of a rank's weights, with what their scales look back at."""

    precision: PrecisionPlan
    made: list[Eight] = field(default_factory=list)
    turned: Turned = field(default_factory=Turned)

    def of(self, weight: str) -> Product:
        """How a weight is multiplied, anew for each caller."""
        product = product_of(self.precision, weight)
        if isinstance(product, Eight):
            product.turned = self.turned
            self.made.append(product)
        return product

    def seen(self) -> list[dict[str, Tensor]]:
        """What was seen so far; empty where nothing looks back."""
        return [dict(e.seen) for e in self.made]

    def restore(self, before: list[dict[str, Tensor]]) -> None:
        """What was seen since has not been."""
        for eight, seen in zip(self.made, before, strict=True):
            eight.seen.clear()
            eight.seen.update(seen)


def product_of(precision: PrecisionPlan, weight: str) -> Product:
    """How a weight is multiplied under a plan: plainly, or of fp8 inputs; tables, the heads of images and
    of BERT and LoRA's stay as they are."""
    plain = weight.endswith((".table", "head.project", "head.transform", "_lora_a", "_lora_b"))
    eight = precision.dtype == "fp8" and not plain
    return Eight(precision) if eight else PLAIN


def by_triton(name: str, x: Tensor, *given: Any) -> Any:
    """What Triton's kernel makes of x; None where there is none (fp8_gpu.py)."""
    return KERNELS(x, name, x, *given) if multiplies_fp8(x.device) else None


def no_kernel(name: str, x: Tensor, *given: Any) -> None:
    """As by_triton, where there is none."""


def maximum(x: Tensor, granularity: str, dim: int) -> Tensor:
    """The largest absolute element of each part that shares a scale, of a shape that divides x."""
    if granularity == "tensor":
        return x.abs().amax()
    return x.abs().amax(dim, keepdim=True) if granularity == "row" else block_maximum(x.abs(), dim)


def block_maximum(x: Tensor, dim: int) -> Tensor:
    """Every element replaced by the largest of its BLOCK along dim."""
    size = x.shape[dim]
    parts = [
        part.amax(dim, keepdim=True).expand_as(part) for part in x.split(min(BLOCK, size), dim)
    ]
    return torch.cat(parts, dim)


@dataclass(frozen=True)
class Scaled:
    """A tensor in 8 bits (or wide again), times a power of two that divides it again; `dtype` is what it was,
    `inverse` 1 / scale in fp32 where it is known."""

    bits: Tensor
    scale: Tensor
    dtype: torch.dtype
    inverse: Tensor | None = None

    def t(self) -> Scaled:
        """A matrix transposed."""
        scale, inverse = (
            s if s is None or not s.dim() else s.t() for s in (self.scale, self.inverse)
        )
        return Scaled(self.bits.t(), scale, self.dtype, inverse)

    def wide(self) -> Tensor:
        """Its values, as wide as it was."""
        if self.bits.dtype == self.dtype:
            return self.bits
        return self.bits.to(self.dtype) / self.scale.to(self.dtype)


def scaled(x: Tensor, name: str, largest: Tensor) -> Scaled:
    """x as the format can say it: times a power of two that brings `largest` under the format's
    largest, rounded to even, saturated. Wide again, in x's dtype (bf16 or wider), its values are exact."""
    dtype, limit = FORMATS[name]
    _, exponent = torch.frexp(largest.float())  # largest < 2^exponent
    top = int(torch.frexp(torch.tensor(limit)).exponent) - 1  # 2^top <= limit
    scale = torch.ldexp(
        torch.ones_like(largest, dtype=torch.float32), (top - exponent).clamp(max=TOP_SCALE)
    )
    scale = torch.where(largest > 0, scale, torch.ones_like(scale)).to(x.dtype)
    return Scaled((x * scale).clamp(-limit, limit).to(dtype), scale, x.dtype)


def rounded(x: Tensor, name: str, largest: Tensor) -> Tensor:
    """What is left of x in 8 bits, in x's dtype."""
    return scaled(x, name, largest).wide()


def emulated(a: Scaled, b: Scaled) -> Tensor:
    """a [..., m, k] b [k, n], multiplied as wide as they were."""
    return a.wide() @ b.wide()


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has fp8 kernels: NVIDIA's Ada and Hopper, and what came after."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def has_kernel(a: Scaled, b: Scaled) -> bool:
    """Whether the device's kernel takes these: both of 8 bits, k and n in sixteens."""
    shapes = {size % 16 for size in b.bits.shape} == {0}
    return shapes and a.bits.dtype.itemsize == 1 and multiplies_fp8(a.bits.device)


def by_kernel(a: Scaled, b: Scaled) -> Tensor:
    """The same product by the device's own: a's rows and b's columns lie in a row, scales divide the sums."""
    rows, out = a.bits.shape[:-1], a.dtype
    left = a.bits.reshape(-1, a.bits.shape[-1]).contiguous()
    right = b.bits.t().contiguous().t()
    by_row, by_column = (
        (s.scale.reciprocal().float() if s.inverse is None else s.inverse)
        .reshape(shape if s.scale.dim() else ())
        .contiguous()
        for s, shape in ((a, (-1, 1)), (b, (1, -1)))
    )
    found = torch._scaled_mm(left, right, scale_a=by_row, scale_b=by_column, out_dtype=out)
    return found.view(*rows, found.shape[-1])

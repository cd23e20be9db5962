"""seeds.py's numbers of a box by one Triton kernel: the same words of Philox 4x32-10, one write, nothing
else in memory.

A program draws BLOCK neighbouring Philox blocks of one contiguous run of the box, four elements each. What
torch's operators take 171 ms for (16.8M normals on an H200), as they write every word of every round as
int64, is bound by arithmetic here. Normals are made in fp64 by the coefficients of Cephes' ndtri, which are
torch's too. Imported where Triton is
(triton_kernels.py); annotations here are Triton's, not strings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

KEEP, NORMAL, ROUND = 0, 1, 2
WIDE, NARROW, FEW = 256, 32, 512  # Philox blocks of a program; a run shorter than FEW takes NARROW
NORMALS = 128  # of one that makes normals, whose code is long
MASK = 0xFFFFFFFF


@triton.jit
def _ndtri(y):
    """The normal's inverse distribution, fp64, for y in (e^-32, 1) (Cephes ndtri.c)."""
    high = y > 1.0 - 0.13533528323661269189
    t = tl.where(high, 1.0 - y, y)
    h = t - 0.5
    s = h * h
    p = s * -5.99633501014107895267e1 + 9.80010754185999661536e1
    p = p * s + -5.66762857469070293439e1
    p = p * s + 1.39312609387279679503e1
    p = p * s + -1.23916583867381258016e0
    q = s + 1.95448858338141759834e0
    q = q * s + 4.67627912898881538453e0
    q = q * s + 8.63602421390890590575e1
    q = q * s + -2.25462687854119370527e2
    q = q * s + 2.00260212380060660359e2
    q = q * s + -8.20372256168333339912e1
    q = q * s + 1.59056225126211695515e1
    q = q * s + -1.18331621121330003142e0
    middle = (h + h * (s * p / q)) * 2.50662827463100050242e0
    x = tl.sqrt(-2.0 * tl.log(t))
    z = 1.0 / x
    p = z * 4.05544892305962419923e0 + 3.15251094599893866154e1
    p = p * z + 5.71628192246421288162e1
    p = p * z + 4.40805073893200834700e1
    p = p * z + 1.46849561928858024014e1
    p = p * z + 2.18663306850790267539e0
    p = p * z + -1.40256079171354495875e-1
    p = p * z + -3.50424626827848203418e-2
    p = p * z + -8.57456785154685413611e-4
    q = z + 1.57799883256466749731e1
    q = q * z + 4.53907635128879210584e1
    q = q * z + 4.13172038254672030440e1
    q = q * z + 1.50425385692907503408e1
    q = q * z + 2.50464946208309415979e0
    q = q * z + -1.42182922854787788574e-1
    q = q * z + -3.80806407691578277194e-2
    q = q * z + -9.33259480895457427372e-4
    tail = x - tl.log(x) / x - z * p / q
    return tl.where(t > 0.13533528323661269189, middle, tl.where(high, tail, -tail))


COUNTS = ("tiles", "runs", "each", "base", "n1", "n2", "s0", "s1", "s2")


@triton.jit(do_not_specialize=["threshold", "k0", "k1", "step", *COUNTS])
def _draw(
    out, samples, starts,
    threshold: "u32", std: "fp64", k0: "u32", k1: "u32", step: "u32",  # noqa: F821
    tiles, runs, each, width, base: "i64", n1: "i64", n2: "i64", s0: "i64", s1: "i64", s2: "i64",  # noqa: F821
    KIND: tl.constexpr, SAMPLED: tl.constexpr, GIVEN: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of the output is `width` elements of run row % runs, of sample row // each. KIND: KEEP, NORMAL,
    ROUND."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    run = row % runs
    if GIVEN:
        start = tl.load(starts + run)
    else:
        start = base + run // (n1 * n2) * s0 + run // n2 % n1 * s1 + run % n2 * s2
    block = (start >> 2) + tile * BLOCK + tl.arange(0, BLOCK)
    c0 = (block & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((block >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    if SAMPLED:
        c2 += (tl.load(samples + row // each) & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.zeros_like(c0) + step.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, c3, k0.to(tl.uint32), k1.to(tl.uint32))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    column = tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    if not ALIGNED:
        column -= start & 3
    at = out + row * width + column
    inside = (column >= 0) & (column < width)
    if KIND == 0:
        tl.store(at, (words >= threshold.to(tl.uint32)).to(tl.uint8), mask=inside)
    elif KIND == 1:
        value = _ndtri((words.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10) * std
        if out.dtype.element_ty == tl.float64:
            tl.store(at, value, mask=inside)
        else:  # by way of fp32, as torch's casts
            tl.store(at, value.to(tl.float32).to(out.dtype.element_ty), mask=inside)
    else:
        bits = tl.load(at, mask=inside, other=0) + (words >> 16).to(tl.int32)
        tl.store(at, bits & -65536, mask=inside)


@dataclass(frozen=True)
class Runs:
    """A box as equal contiguous runs, whose starts are base + i0 s0 + i1 s1 + i2 s2 (the last fastest)."""

    width: int
    base: int
    counts: tuple[int, int, int]
    strides: tuple[int, int, int]

    @property
    def number(self) -> int:
        """How many runs."""
        return prod(self.counts)


def runs_of(shape: Sequence[int], box: Sequence[tuple[int, int]]) -> Runs | None:
    """The runs of a box of a tensor of `shape`; None where they need more than three loops."""
    merged: list[tuple[int, int, int]] = []  # (size, begin, end), outermost first
    for size, (a, b) in zip(shape, box, strict=True):
        if merged and (a, b) == (0, size):  # whole: part of the dim before it
            n, first, end = merged[-1]
            merged[-1] = n * size, first * size, end * size
        else:
            merged.append((size, a, b))
    if not merged:
        return Runs(1, 0, (1, 1, 1), (0, 0, 0))
    *outer, (pitch, first, end) = merged
    base, loops = first, []
    for size, a, b in reversed(outer):
        base += a * pitch
        loops.insert(0, (b - a, pitch))
        pitch *= size
    loops = [loop for loop in loops if loop[0] != 1]
    if len(loops) > 3:
        return None
    loops = [(1, 0)] * (3 - len(loops)) + loops
    counts, strides = zip(*loops, strict=True)
    return Runs(end - first, base, counts, strides)


def _launch(
    out: Tensor,
    runs: Runs | tuple[Tensor, int],
    key: tuple[int, int],
    kind: int,
    samples: Tensor | None = None,
    step: int = 0,
    value: float = 0,
) -> None:
    """Writes `out`, contiguous. `runs`: of a box, or (the start of each row int64, its width); `value`: the
    threshold of a mask, the std of normals."""
    given = not isinstance(runs, Runs)
    if isinstance(runs, Runs):
        number, width, box = runs.number, runs.width, runs
        starts, each = out, number
        aligned = not any(n % 4 for n in (runs.base, *runs.strides)) and width % 16 == 0
    else:
        (starts, width), box = runs, Runs(0, 0, (1, 1, 1), (0, 0, 0))
        number, each, aligned = len(starts), 1, False
    if not out.numel():
        return
    block = NARROW if width < FEW else NORMALS if kind == NORMAL else WIDE
    tiles = triton.cdiv(width + (0 if aligned else 3), 4 * block)
    std, threshold = (1.0, int(value)) if kind == KEEP else (float(value), 0)
    _draw[(out.numel() // width * tiles,)](
        out, out if samples is None else samples, starts,
        threshold, std, *key, step & MASK,
        tiles, number, each, width, box.base, *box.counts[1:], *box.strides,
        KIND=kind, SAMPLED=samples is not None, GIVEN=given, ALIGNED=aligned,
        BLOCK=block, num_warps=1 if block == NARROW else 4,
    )  # fmt: skip


def normal(
    out: Tensor,
    key: tuple[int, int],
    shape: Sequence[int],
    box: Sequence[tuple[int, int]],
    std: float,
) -> Tensor | None:
    """`out` (of the box's shape) filled with normals."""
    runs = runs_of(shape, box)
    if runs is None:
        return None
    _launch(out, runs, key, NORMAL, value=std)
    return out


def rounded(
    bits: Tensor,
    key: tuple[int, int],
    shape: Sequence[int],
    box: Sequence[tuple[int, int]],
    step: int,
) -> Tensor | None:
    """`bits` (fp32's, int32, flat) with the upper half of a word added and the lower half cleared."""
    runs = runs_of(shape, box)
    if runs is None:
        return None
    _launch(bits, runs, key, ROUND, step=step)
    return bits


def kept(
    samples: Tensor,
    runs: Runs | tuple[Tensor, int],
    key: tuple[int, int],
    step: int,
    threshold: int,
) -> Tensor:
    """bool [samples, runs, width], or [rows, width] of given starts, a sample each: words of `threshold` and
    above."""
    size = (runs.number, runs.width) if isinstance(runs, Runs) else (runs[1],)
    out = torch.empty(len(samples), *size, dtype=torch.bool, device=samples.device)
    if threshold > MASK:
        return out.zero_()
    if not isinstance(runs, Runs):
        runs = runs[0].contiguous(), runs[1]
    _launch(out.view(torch.uint8), runs, key, KEEP, samples.contiguous(), step, threshold)
    return out


def dropout(
    samples: Tensor,
    key: tuple[int, int],
    step: int,
    shape: Sequence[int],
    box: Sequence[tuple[int, int]],
    threshold: int,
) -> Tensor | None:
    """bool [samples, *box]: True where kept."""
    runs = runs_of(shape, box)
    if runs is None:
        return None
    found = kept(samples.reshape(-1), runs, key, step, threshold)
    return found.view(len(found), *[b - a for a, b in box])

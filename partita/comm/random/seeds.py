"""Counter-based randomness: every value is a pure function of (seed, name, element index).

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), by NumPy where
tensors lie on the CPU, on a GPU by one kernel (seeds_gpu.py), else in int64 tensor operations; no default
generator is read or moved. Element i of a logical tensor is word i % 4 of Philox block i // 4, so any shard
of any plan draws the numbers of one device, at the cost of the shard.

    counter word    0           1            2         3
    values          block low   block high   0         0          key = xxh3(seed, "value", name)
    dropout         block low   block high   sample    step       key = xxh3(seed, "dropout", site)
    rounding        block low   block high   0         step       key = xxh3(seed, "round", name)

A word has 32 bits: uniforms lie on multiples of 2**-32, normals within +-6.4.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod, sqrt
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from partita.comm.random.triton_kernels import Kernels
from partita.spec.program import DRAWN_AT_ONCE

Box = Sequence[tuple[int, int]]

MASK = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Random123 philox.h, PHILOX_M4x32_0 and _1
WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, PHILOX_W32_0 and _1
CHUNK = DRAWN_AT_ONCE
HIGH = 1 if sys.byteorder == "little" else 0  # of a 64-bit number's two halves in memory
KERNELS = Kernels("partita.comm.random.seeds_gpu")
HALF = 65504.0  # fp16's largest number
RUN = 8  # shorter contiguous runs are drawn element by element

INIT_STD = 0.02  # GPT-2's; residual outputs are divided by sqrt(2 * layers), Radford et al. 2019
RESIDUAL_OUTPUTS = ("attention.wo", "mlp.down", "mlp.fc2")
BEFORE_RELU = (".kernel", "dense.linear")


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10: four words of output for each counter.

    `counter` is four int64 tensors of one shape holding 32-bit words (they broadcast); `key` two
    32-bit words. Returns four int64 tensors of 32-bit words. A product of two words wraps in int64,
    and its bits are right all the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (p1 >> 32 & MASK) ^ c1 ^ k0, (p0 >> 32 & MASK) ^ c3 ^ k1
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


@lru_cache(maxsize=256)  # a site's key is that of all its draws
def _round_keys(key: tuple[int, int]) -> Any:
    """[rounds, 2], uint32: both words of the key in every round."""
    words = np.arange(ROUNDS)[:, None] * np.array(WEYL) + np.array(key)
    return (words & MASK).astype(np.uint32)


def _philox_here(counter: Sequence[Any], key: tuple[int, int]) -> Tensor:
    """`philox` of NumPy arrays: int64 [..., 4]. Both products of a round are one call, and their halves
    views of it, which takes a half to a third of the time. All memory is torch's, 20 bytes a word, so that
    it is seen where memory is measured: words, which stay, and 12 for two rounds' products and a counter."""
    shape = np.broadcast(*counter).shape
    size, both = prod(shape), (2, *shape)
    space = torch.empty(6 * size, dtype=torch.int64).numpy()
    products = space[: 4 * size].view(np.uint64).reshape(2, *both)
    even, odd = space[4 * size :].view(np.uint32).reshape(2, *both)
    even[0], odd[0], even[1], odd[1] = counter
    across = (2, *[1] * len(shape))
    by = np.array(MULTIPLIERS, np.uint64).reshape(across)
    turns = [(p, p.view(np.uint32).reshape(*both, 2)[::-1]) for p in products]
    turns = [(p, halves[..., HIGH], halves[..., 1 - HIGH]) for p, halves in turns]
    for i, k in enumerate(_round_keys(key)):
        product, high, low = turns[i % 2]
        np.multiply(even, by, product)
        np.bitwise_xor(high, odd, even)
        odd = low
        even ^= k.reshape(across)
    found = torch.empty((*shape, 4), dtype=torch.int64)
    words = found.numpy()
    words[..., 0::2], words[..., 1::2] = np.moveaxis(even, 0, -1), np.moveaxis(odd, 0, -1)
    return found


def key_of(seed: int, kind: str, name: str) -> tuple[int, int]:
    """The Philox key of a named stream: two 32-bit words of xxh3 over (seed, kind, name)."""
    digest = xxhash.xxh3_64_intdigest(f"{seed}\0{kind}\0{name}".encode())
    return digest & MASK, digest >> 32


def uniform(seed: int, name: str, indices: Tensor) -> Tensor:
    """Uniform float64 in [0, 1), of the shape of `indices` (int64, elements of a tensor)."""
    return _words(key_of(seed, "value", name), indices).double() * 2.0**-32


def normal(seed: int, name: str, indices: Tensor) -> Tensor:
    """Standard normal float64, of the shape of `indices`; by the inverse of the distribution."""
    return _to_normal(_words(key_of(seed, "value", name), indices))


def normal_box(
    seed: int,
    name: str,
    shape: Sequence[int],
    box: Box,
    *,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The values of `box` of the logical normal tensor `name` of `shape`, shaped like the box.

    Equal to normal(...) at the box's element indices, times std, rounded to dtype. Costs time and
    memory of the box, whatever `shape` is.
    """
    out = torch.empty([b - a for a, b in box], dtype=dtype, device=device)
    flat, key = out.view(-1), key_of(seed, "value", name)
    if KERNELS(out, "normal", out, key, shape, box, std) is not None:
        return out
    for first, words in _box_words(key, shape, box, device):
        flat[first : first + words.numel()] = _to_normal(words).mul_(std).view(-1)
    return out


def initial_value(
    seed: int,
    name: str,
    shape: Sequence[int],
    box: Box,
    *,
    layers: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A new model's values of `box` of the weight `name` ('blocks.3.attention.wo') of `shape`.

    Norm scales 1, biases and LoRA's B 0, matrices normal with std 0.02; the outputs that are added to the
    residual stream (wo, down, fc2) with std 0.02 / sqrt(2 * layers). What a ReLU follows (kernels and
    linears of image models, [groups, outputs, inputs ...]) with std sqrt(2 / inputs) (He et al. 2015).
    """
    size = [b - a for a, b in box]
    if name.endswith(("_bias", "_lora_b")):
        return torch.zeros(size, dtype=dtype, device=device)
    if name.endswith("norm"):
        return torch.ones(size, dtype=dtype, device=device)
    std = INIT_STD / sqrt(2 * layers) if name.endswith(RESIDUAL_OUTPUTS) else INIT_STD
    if name.endswith(BEFORE_RELU):
        std = sqrt(2 / prod(shape[2:]))
    return normal_box(seed, name, shape, box, std=std, dtype=dtype, device=device)


def rounded_box(
    values: Tensor, seed: int, step: int, name: str, shape: Sequence[int], box: Box,
    half: bool = False,
) -> Tensor:  # fmt: skip
    """`values` (fp32; fp64's as fp32 has them) of `box` of the weight `name` of `shape`, each rounded to one
    of its two neighbours in bf16 (of `half` in fp16), in their own dtype still: up with the probability of
    its place between them, so that the mean is kept (Gupta et al. 2015, arXiv 1502.02551). A pure function of
    seed, step, name and element."""
    if half:
        return _rounded_half(values, key_of(seed, "round", name), step, shape, box)
    flat, key = values.reshape(-1).to(torch.float32, copy=True), key_of(seed, "round", name)
    bits = flat.view(torch.int32)
    if KERNELS(flat, "rounded", bits, key, shape, box, step) is not None:
        return flat.to(values.dtype).view(values.shape)
    for first, words in _box_words(key, shape, box, values.device, step=step):
        part = bits[first : first + words.numel()]
        part.add_((words.reshape(-1) >> 16).to(torch.int32))  # the 16 bits below bf16's last
    near = bits.bitwise_and_(-(1 << 16)).view(torch.float32)
    return near.to(values.dtype).view(values.shape)


def _rounded_half(
    values: Tensor, key: tuple[int, int], step: int, shape: Sequence[int], box: Box
) -> Tensor:
    """To fp16: 13 bits below its last one, of numbers below 2^-14 what is less than 2^-24; beyond the largest
    number there is none."""
    flat = values.reshape(-1).to(torch.float32, copy=True)
    for first, words in _box_words(key, shape, box, values.device, step=step):
        part = flat[first : first + words.numel()]
        dice = (words.reshape(-1) >> 19).to(torch.int32)  # 13 bits
        bits = part.view(torch.int32) + dice
        near = bits.bitwise_and_(-(1 << 13)).view(torch.float32)
        places = part.abs().double() * 2.0**24 + dice * 2.0**-13
        small = (places.floor() * 2.0**-24).float().copysign(part)
        part.copy_(torch.where(part.abs() < 2.0**-14, small, near).clamp(-HALF, HALF))
    return flat.to(values.dtype).view(values.shape)


def dropout_mask(
    seed: int, step: int, site: str, sample_indices: Tensor, element_indices: Tensor, p: float
) -> Tensor:
    """True where an element is kept, with probability 1 - p.

    `sample_indices` [b] are samples of the step's global batch, `element_indices` [...] elements of
    one sample's logical tensor; returns bool [b, ...]. A pure function of seed, step, site, sample
    and element: the same under every plan, microbatch and recompute.
    """
    samples = sample_indices.reshape(-1, *[1] * element_indices.dim())
    words = _words(key_of(seed, "dropout", site), element_indices, samples, step)
    return words >= _threshold(p)


def dropout_box(
    seed: int,
    step: int,
    site: str,
    sample_indices: Tensor,
    *,
    shape: Sequence[int],
    box: Box,
    p: float,
) -> Tensor:
    """dropout_mask over `box` of one sample's logical tensor of `shape`, at a quarter of the cost.

    Returns bool [b, *box]: True where kept.
    """
    size = [b - a for a, b in box]
    key, device = key_of(seed, "dropout", site), sample_indices.device
    drawn = KERNELS(sample_indices, "dropout", sample_indices, key, step, shape, box, _threshold(p))
    if drawn is not None:
        return drawn
    out = torch.empty(sample_indices.numel(), prod(size), dtype=torch.bool, device=device)
    samples = sample_indices.reshape(-1, 1, 1)
    for first, words in _box_words(key, shape, box, device, samples=samples, step=step):
        part = words.reshape(out.shape[0], -1)
        out[:, first : first + part.shape[1]] = part >= _threshold(p)
        del words, part  # before the next are drawn
    return out.view(len(out), *size)


def dropout_rows(
    seed: int, step: int, site: str, samples: Tensor, first: Tensor, width: int, p: float
) -> Tensor:
    """dropout_mask of rows of many samples: bool [rows, width], elements first .. first + width - 1 of the
    logical tensor of each row's sample. `samples` and `first` are int64 [rows]."""
    key, each = key_of(seed, "dropout", site), max(1, CHUNK // max(width, 1))
    drawn = KERNELS(samples, "kept", samples, (first, width), key, step, _threshold(p))
    if drawn is not None:
        return drawn
    found = [
        _run_words(key, at.unsqueeze(-1), width, of.unsqueeze(-1), step, None) >= _threshold(p)
        for at, of in zip(first.split(each), samples.split(each), strict=True)
    ]
    return torch.cat(found)


def _threshold(p: float) -> int:
    return round(p * 2**32)


def _to_normal(words: Tensor) -> Tensor:
    # The middle of each of 2**32 intervals: never 0 or 1, so never infinite.
    return torch.special.ndtri((words.double() + 0.5) * 2.0**-32)


def _blocks(
    key: tuple[int, int], block: Tensor, sample: Tensor | None = None, step: int = 0
) -> Tensor:
    """[..., 4]: the words of Philox blocks `block`, for `sample` (broadcast) and step."""
    zero = torch.zeros((), dtype=torch.int64, device=block.device)
    counter = (
        block & MASK,
        block >> 32,
        zero if sample is None else sample & MASK,
        zero + (step & MASK),
    )
    if block.device.type == "cpu":
        return _philox_here([x.numpy() for x in counter], key)
    return torch.stack(torch.broadcast_tensors(*philox(counter, key)), -1)


def _words(
    key: tuple[int, int], indices: Tensor, sample: Tensor | None = None, step: int = 0
) -> Tensor:
    """One 32-bit word for each element index (a block is drawn for each)."""
    words = _blocks(key, indices >> 2, sample, step)
    return words.gather(-1, (indices & 3).expand(words.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _box_words(
    key: tuple[int, int],
    shape: Sequence[int],
    box: Box,
    device: torch.device | str,
    *,
    samples: Tensor | None = None,
    step: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Chunks (first flat place in the box, words [..., rows, width]) that together are the box.

    A contiguous run draws each block once: a quarter of the work of element by element.
    """
    starts, width = _runs(shape, box)
    each = 1 if samples is None else max(1, samples.numel())
    if width == 0:
        return
    columns = min(width, max(1, CHUNK // each))
    rows = max(1, CHUNK // (columns * each))
    for r in range(0, len(starts), rows):
        for c in range(0, width, columns):
            run = min(columns, width - c)
            first = starts.slice(r, r + rows).unsqueeze(-1) + c
            offset = int(first[0, 0]) & 3 if len(first) == 1 else None  # read on the host
            yield r * width + c, _run_words(key, first.to(device), run, samples, step, offset)


def _run_words(
    key: tuple[int, int],
    first: Tensor,
    run: int,
    samples: Tensor | None,
    step: int,
    offset: int | None,
) -> Tensor:
    """Words [..., rows, run] of elements first .. first + run - 1 of each row.

    `offset` is first % 4 where there is one row: its words are then a slice, not a gather.
    """
    if run < RUN:
        return _words(key, first + torch.arange(run, device=first.device), samples, step)
    count = (run + 3) // 4 + 1
    block = (first >> 2) + torch.arange(count, device=first.device)
    words = _blocks(key, block, samples, step).flatten(-2)
    if offset is not None:
        return words[..., offset : offset + run]
    place = (first & 3) + torch.arange(run, device=first.device)
    return words.gather(-1, place.expand(*words.shape[:-1], run))


class _Starts:
    """The first element index of each contiguous run of a box, made a slice at a time."""

    def __init__(self, strides: Sequence[int], box: Box) -> None:
        self.strides, self.box = strides, box
        self.count = prod(b - a for a, b in box)

    def __len__(self) -> int:
        return self.count

    def slice(self, first: int, end: int) -> Tensor:
        """Starts of runs first .. end - 1, int64."""
        rest = torch.arange(first, min(end, self.count))
        out = torch.zeros_like(rest)
        for stride, (a, b) in zip(reversed(self.strides), reversed(list(self.box)), strict=True):
            out += (rest % (b - a) + a) * stride
            rest = rest // (b - a)
        return out


def _runs(shape: Sequence[int], box: Box) -> tuple[_Starts, int]:
    """The box as equal contiguous runs: (their starts, their length)."""
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    if not shape:
        return _Starts((), ()), 1
    d = len(shape) - 1  # trailing dims that the box takes whole are part of the run
    while d > 0 and tuple(box[d]) == (0, shape[d]):
        d -= 1
    a, b = box[d]
    return _Starts([*strides[:d], strides[d]], [*box[:d], (a, a + 1)]), (b - a) * strides[d]

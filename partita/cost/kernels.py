"""Seconds of one kernel on one device: matmuls by tiles and waves, fused attention, memory-bound work.

A matmul [m, k] @ [k, n] is cut into tiles of its output; each compute unit makes one tile at a time:

    tiles   = ceil(m / tm) * ceil(n / tn) * count
    waves   = ceil(tiles / units)                      the last wave may be nearly empty
    seconds = waves * 2 tm tn (k + RAMP) / (rate / units * how well such a tile does)

over the tile that is fastest, split along k or not. RAMP is what filling and draining a
tile costs, in elements of k. A kernel never takes less than moving its bytes does, and `launch_s` more.
Without counted units (CPU, systolic arrays) a matmul is its FLOPs over the rate, or over what products of
its size were measured to reach (seconds between two measured sizes lie on a line).

A machine that was measured knows the pieces of layers, host and all: a kernel then takes what its pieces do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from partita.cost.empirical import DIAGONAL, RAMP, TILE, UNALIGNED
from partita.cost.machine import Curve, Machine, Rates, Software
from partita.cost.pieces import on_curve

SHAPES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64))
# (rows, columns, how well: a smaller tile reads its operands more often, m n / (m + n) FLOPs an element)
TILES = tuple((m, n, (m * n / (m + n) * (1 / 256 + 1 / 128)) ** TILE) for m, n in SHAPES)
SPLITS = (1, 2, 4)
MOVED = ("memory", "softmax", "loss", "cast")  # kinds of kernels that move bytes and no more
COPIED = (
    4  # bytes: the least that an asynchronous copy to shared memory moves (cp.async: 4, 8 or 16)
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch: matmul (m, n, k, `count` of them), attention (`flops`), memory; the softmax of m matrices
    of scores, the exponentials of m logits, m elements that become ones of 8 bits, which are memory. `bytes`
    is what it must move; dtype that of its operands. `pieces` are what it is of a layer's software: names,
    and sizes of each of the `count`."""

    kind: str  # matmul | attention | memory | softmax | loss | cast
    bytes: float = 0.0
    m: int = 0
    n: int = 0
    k: int = 0
    count: int = 1
    flops: float = 0.0
    dtype: str = "bf16"
    well: float = 1.0  # of what such a matmul reaches elsewhere
    aligned: bool = True  # each row of its operands begins where an asynchronous copy may
    each: int = 1  # experts it serves: a program without grouped kernels starts one for each
    adds: bool = False  # to a gradient that is stored
    routed: bool = False  # from where rows go to experts to where they are added
    pieces: tuple[tuple[str, float], ...] = ()

    def serving(self, each: int, routed: bool = False) -> Kernel:
        """The same of so many experts; `routed`: from where rows go to them to where they are added."""
        return Kernel(  # `replace` takes thrice as long
            self.kind, self.bytes, self.m, self.n, self.k, self.count, self.flops, self.dtype, self.well,
            self.aligned, each, self.adds, routed or self.routed, self.pieces,
        )  # fmt: skip


def is_aligned(*rows: float) -> bool:
    """Whether rows of so many bytes all begin where an asynchronous copy may: of 50,304 or 12,564 numbers in
    16 bits they do, of 50,257 each number goes through a register."""
    return all(row % COPIED == 0 for row in rows)


def kernel_seconds(kernel: Kernel, machine: Machine) -> float:
    """Seconds on the device, launch included."""
    rates = machine.rates(kernel.dtype)
    if (measured := _measured(kernel, machine)) is not None:
        # of few rows a product is its weights' way through memory, which no measured one was
        least = kernel.bytes / rates.memory if kernel.kind in ("matmul", "attention") else 0.0
        return max(measured, least)
    moving = kernel.bytes / rates.memory
    seconds = moving if kernel.kind in MOVED else max(_seconds(kernel, rates), moving)
    return launches(kernel, machine.software) * machine.constants.launch_s + seconds


def launches(kernel: Kernel, era: Software) -> int:
    """How often it is started: for each of the experts that it serves, where the program has no grouped
    kernels."""
    return kernel.each if era.starts_each_expert else 1


def _measured(kernel: Kernel, machine: Machine) -> float | None:
    """Seconds of its pieces, where all of them were measured."""
    if not kernel.pieces or machine.cluster.piece_seconds is None:
        return None
    total = 0.0
    for name, size in kernel.pieces:
        seconds = machine.piece(name, kernel.dtype, kernel.k)
        if seconds is None:
            return None
        total += on_curve(size, seconds)
    return kernel.count * total


@lru_cache(maxsize=200_000)
def _seconds(k: Kernel, rates: Rates) -> float:
    """Of its FLOPs."""
    if k.kind == "attention":
        return k.flops / (rates.attention * k.k / (k.k + DIAGONAL)) if k.flops else 0.0
    return _matmul(k, rates.units, rates.flops, rates.reached)


def _matmul(k: Kernel, units: int, rate: float, reached: Curve) -> float:
    if not units:
        return _on_curve(2.0 * k.m * k.n * k.k, rate, reached) * k.count / k.well
    best, rate = float("inf"), rate if k.aligned else UNALIGNED * rate
    for tm, tn, well in TILES:
        tiles = ceil(k.m / tm) * ceil(k.n / tn) * k.count
        one = 2.0 * tm * tn / (rate / units * well * k.well)
        for split in SPLITS:
            waves = ceil(tiles * split / units)
            depth = k.k / split + RAMP * (1 if split == 1 else 2)
            best = min(best, waves * one * depth)
    return best


def _on_curve(flops: float, rate: float, reached: Curve) -> float:
    """Seconds of a matmul: those of the smallest and the largest that were measured reach beyond them."""
    if not reached:
        return flops / rate
    if flops <= reached[0][0]:
        return flops / reached[0][1]
    if flops >= reached[-1][0]:
        return flops / reached[-1][1]
    at = next(i for i, (size, _) in enumerate(reached) if size >= flops)
    (low, slow), (high, fast) = reached[at - 1], reached[at]
    first, last = low / slow, high / fast
    return first + (last - first) * (flops - low) / (high - low)

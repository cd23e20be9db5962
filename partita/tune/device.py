"""`partita calibrate` of a GPU: what its products, its memory, its link to the host and the pieces of layers
take on it, each alone, by events on the device; under a minute.

    piece_seconds           pieces as on a CPU (pieces.py), of a GPU's sizes; the device's time alone: what
                            the host takes to start kernels, `simulate` adds where it is longer
    host_link_bytes_per_s   pinned memory to the device and back, the slower way
    matmul_flops_per_s      products by precision and size
    memory_bytes_per_s      read and written by an element-wise operation; said, not taken

A device is kept behind its host while something is measured, by work ordered before it: no kernel waits to be
started. Peaks, memory, links between devices stay the base's; so do its rates where a piece was not measured,
with the constants that were fitted to them.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor

from partita.base.errors import UsageError
from partita.base.text import table
from partita.base.units import format_rate
from partita.spec.cluster import Cluster
from partita.train.clock import Event, timing_event
from partita.train.devices import use_gpu
from partita.tune.pieces import Made, On, Shape, measure_action, measure_shape, with_any_keys
from partita.tune.turns import ROUNDS, Piece, touch

Sizes = tuple[tuple[int, int, int], ...]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLUSH_BYTES = 128_000_000  # touched between two pieces: more than a GPU's caches
TOGETHER, INPUT_BYTES = 4, 1_000_000_000  # sets of what a piece is given: so many, of no more bytes
CLOCK_HZ = 2e9  # cycles a second of torch.cuda._sleep, at most


@dataclass(frozen=True)
class Setup:
    """What is measured, and for how long each."""

    shapes: tuple[Shape, ...] = (
        (1, 512, 512, 4096), (1, 2048, 1024, 16384), (1, 4096, 2048, 32768), (2, 4096, 4096, 32768),
    )  # fmt: skip
    products: Sizes = ((1024, 1024, 1024), (4096, 2048, 2048), (8192, 4096, 4096), (8192,) * 3)
    head: int = 128
    elements: int = 1 << 28  # fp32, of what is read, written and copied
    seconds_each: float = 0.02
    dtypes: tuple[str, ...] = ("bf16", "fp32")


@dataclass
class Timer:
    """Seconds of the device, as events say: `make` one, `wait` for all, `busy` the device for so long."""

    make: Callable[[], Event]
    wait: Callable[[], None]
    busy: Callable[[float], None]
    device: torch.device
    flush_bytes: int = FLUSH_BYTES
    _flush: Tensor | None = field(default=None, init=False)

    def one(self, call: Callable[[], object], at_least_s: float) -> float:
        """Median seconds of a call."""
        host_s = self._warm(call)
        times, end = [], time.perf_counter() + at_least_s
        while len(times) < ROUNDS or time.perf_counter() < end:
            self.busy(2 * host_s)
            start, stop = self.make(), self.make()
            start.record()
            call()
            stop.record()
            self.wait()
            times.append(start.elapsed_time(stop) / 1e3)
        return median(times)

    def both(
        self, pieces: Sequence[Piece], inputs: Sequence[Tensor], at_least_s: float
    ) -> tuple[float, float]:
        """Median seconds of a piece's forward and of its backward, less what two events in a row say."""
        there, back = self._both(pieces, inputs, at_least_s)
        none = self.one(lambda: None, 0.0)
        return max(there - none, 0.0), max(back - none, 0.0)

    def _both(
        self, pieces: Sequence[Piece], inputs: Sequence[Tensor], at_least_s: float
    ) -> tuple[float, float]:
        most = INPUT_BYTES // max(sum(x.nbytes for x in inputs), 1)
        sets = [
            [x.clone().requires_grad_() for x in inputs] for _ in range(max(2, min(TOGETHER, most)))
        ]
        there, back, host_s = [], [], 0.0
        end = time.perf_counter() + at_least_s
        while len(there) < ROUNDS * len(sets) or time.perf_counter() < end:
            began = time.perf_counter()
            self.busy(2 * host_s)
            forward, backward = self._round(pieces, sets)
            ordered_s = time.perf_counter() - began
            self.wait()
            if host_s:  # else it warmed up
                there += [a.elapsed_time(b) / 1e3 for a, b in forward]
                back += [a.elapsed_time(b) / 1e3 for a, b in backward]
            host_s = ordered_s
        return median(there), median(back)

    def _round(
        self, pieces: Sequence[Piece], sets: Sequence[Sequence[Tensor]]
    ) -> tuple[list[tuple[Event, Event]], list[tuple[Event, Event]]]:
        """Events around every forward, then every backward, ordered and not waited for."""
        made: list[Tensor] = []
        forward = [
            self._marked(lambda p=p, x=x: made.append(p(*x)), x)
            for p, x in zip(cycle(pieces), sets, strict=False)
        ]
        seed = torch.ones_like(made[0])
        backward = [
            self._marked(lambda y=y, x=x: torch.autograd.grad(y, x, seed), [seed])
            for y, x in zip(reversed(made), reversed(sets), strict=True)
        ]
        return forward, backward

    def _marked(self, call: Callable[[], object], near: Sequence[Tensor]) -> tuple[Event, Event]:
        """A call between two events, `near` in the caches and all else out of them."""
        if self._flush is None:
            self._flush = torch.zeros(self.flush_bytes // 4, device=self.device)
        touch(self._flush, *near)
        start, stop = self.make(), self.make()
        start.record()
        call()
        stop.record()
        return start, stop

    def _warm(self, call: Callable[[], object]) -> float:
        """Seconds of the host for a second call."""
        call()
        self.wait()
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        self.wait()
        return took


def gpu_timer(device: torch.device) -> Timer:
    """Of torch's events."""

    def busy(seconds: float) -> None:
        torch.cuda._sleep(int(min(seconds, 0.1) * CLOCK_HZ))

    return Timer(timing_event, lambda: torch.cuda.synchronize(device), busy, device)


@dataclass(frozen=True)
class DeviceCalibration:
    """The base with what was measured."""

    cluster: Cluster
    device: str
    matmul: Mapping[str, Mapping[str, float]]  # dtype -> size -> FLOP/s
    memory_bytes_per_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float

    def to_json(self) -> dict[str, Any]:
        """The document: "cluster" (a cluster file's fields) and "measured", what it was made from."""
        return {
            "cluster": self.cluster.to_toml(),
            "measured": {
                "device": self.device,
                "matmul_flops_per_s": self.matmul,
                "memory_bytes_per_s": self.memory_bytes_per_s,
                "to_device_bytes_per_s": self.up_bytes_per_s,
                "to_host_bytes_per_s": self.down_bytes_per_s,
            },
        }

    def __str__(self) -> str:
        sizes = list(dict.fromkeys(s for by_size in self.matmul.values() for s in by_size))
        rows = [
            [dtype, *(format_rate(by[s], "FLOP") if s in by else "" for s in sizes)]
            for dtype, by in self.matmul.items()
        ]
        rates = (
            f"{self.device}: memory {format_rate(self.memory_bytes_per_s)}, from the host "
            f"{format_rate(self.up_bytes_per_s)}, to it {format_rate(self.down_bytes_per_s)}"
        )
        return f"{self.cluster}\n{rates}\n\n" + table(rows, ["matmul", *sizes])


def calibrate_gpu(base: Cluster, tell: Callable[[str, int, int], None]) -> DeviceCalibration:
    """Measures the first GPU of this host for ranks of `base`. Raises UsageError where torch sees none."""
    if not torch.cuda.is_available():
        raise UsageError(
            f"calibrate measures this machine, {base.name} has {base.device} and torch {torch.__version__} "
            "sees no GPU here: its rates are published ones; name a CPU cluster, e.g. --cluster laptop",
            key="cluster",
        )
    device = use_gpu(0)
    name = torch.cuda.get_device_name(device)
    if base.device.split("-")[0].upper() not in name.upper():
        logging.warning(
            "this host's GPU is %s, the cluster's %s: its own peaks and memory stay",
            name,
            base.device,
        )
    return calibrate_on(base, Setup(), gpu_timer(device), name, tell)


def calibrate_on(
    base: Cluster, setup: Setup, timer: Timer, name: str, tell: Callable[[str, int, int], None]
) -> DeviceCalibration:
    """The same of any device that keeps time."""
    steps = len(setup.dtypes) * len(setup.shapes) + 2
    tell("products", 0, steps)
    matmul = {dtype: _products(setup, timer, DTYPES[dtype]) for dtype in setup.dtypes}
    tell("memory and host", 1, steps)
    memory, up, down = _moves(setup, timer)
    on = On(timer.device, setup.head, timer.both, timer.one)
    pieces: dict[str, Made] = {}
    for dtype in setup.dtypes:
        made = pieces.setdefault(dtype, {})
        for i, shape in enumerate(setup.shapes):
            done = 2 + (len(pieces) - 1) * len(setup.shapes) + i
            tell(f"pieces of layers {dtype} {shape[2]}", done, steps)
            measure_shape(dtype, shape, setup.seconds_each, made, on)
            gc.collect()  # models know themselves
        measure_action(made, setup.seconds_each)
        with_any_keys(made, setup.shapes[0][1])
    cluster = replace(
        base,
        name=base.name if base.name.endswith("-calibrated") else f"{base.name}-calibrated",
        matmul_flops_per_s=matmul,
        piece_seconds=pieces,
        host_link_bytes_per_s=min(up, down),
    )
    return DeviceCalibration(cluster, name, matmul, memory, up, down)


def _products(setup: Setup, timer: Timer, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of x[rows, inner] @ w[columns, inner].T, as a linear layer computes it."""
    found = {}
    for rows, inner, columns in setup.products:
        x = torch.randn(rows, inner, device=timer.device).to(dtype)
        w = torch.randn(columns, inner, device=timer.device).to(dtype)
        seconds = timer.one(lambda x=x, w=w: x @ w.T, setup.seconds_each)
        found[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / max(seconds, 1e-9)
    return found


def _moves(setup: Setup, timer: Timer) -> tuple[float, float, float]:
    """Bytes a second read and written on the device, copied to it, copied from it."""
    x = torch.ones(setup.elements, device=timer.device)
    host = torch.ones(setup.elements, pin_memory=timer.device.type == "cuda")
    calls = (
        lambda: x.add_(1.0),
        lambda: x.copy_(host, non_blocking=True),
        lambda: host.copy_(x, non_blocking=True),
    )
    there, up, down = (max(timer.one(call, setup.seconds_each), 1e-9) for call in calls)
    return 2 * x.nbytes / there, x.nbytes / up, x.nbytes / down

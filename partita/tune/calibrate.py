"""`partita calibrate`: measures this machine in half a minute, and says so as a Cluster.

    matmul_flops_per_s   what a rank sustains on matrix products of a model's sizes, by precision and size,
                         while as many ranks compute as there are units for them
    peak_flops           the most of them
    piece_seconds        norms, rotations, linears, ... of layers, forward and backward, by precision and size
    collective_seconds   collectives of the fastest backend, by ranks and size
    memory_bytes_per_s   read and written by an element-wise operation too big for the caches
    links                alpha and beta of the fastest backend, fitted over all collectives (Hockney 1994)
    crowding             how many times longer layers take by the ranks that are busy, their turns aside;
                         ranks that outnumber the units meet after each
    cores_shared         how many ranks' worth of work the machine does at a time, when all are busy

Devices, memory and its limit are not measured: they are the base cluster's, a promise of the user's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from partita.base.errors import PeerError
from partita.base.text import table
from partita.base.units import format_bytes, format_rate, format_seconds
from partita.comm.processes import start_ranks
from partita.cost.comm import AlphaBeta, steps_and_bytes
from partita.spec.cluster import Cluster, Link
from partita.tune.device import DeviceCalibration, calibrate_gpu
from partita.tune.pieces import Made
from partita.tune.probes import COLLECTIVES, MATMUL_SIZES, Call, Found, Setup, phase_names, probe

TIMEOUT_S = 120.0
Tell = Callable[[str, int, int], None]  # phase, which, of how many


@dataclass(frozen=True)
class Calibration:
    """The machine as a Cluster, and what that was made from."""

    cluster: Cluster
    has_bf16: bool
    matmul: Mapping[str, Mapping[str, float]]  # dtype -> size -> FLOP/s of a rank
    busy_flops: Mapping[int, float]  # ranks busy -> FLOP/s of one
    optimizer_bytes_per_s: float
    fits: Mapping[str, AlphaBeta]  # backend -> its link
    calls: tuple[Call, ...]

    def to_json(self) -> dict[str, Any]:
        """The document: "cluster" (a cluster file's fields) and "measured", what it was made from."""
        return {
            "cluster": self.cluster.to_toml(),
            "measured": {
                "bf16_instructions": self.has_bf16,
                "matmul_flops_per_s": self.matmul,
                "busy_ranks_flops_per_s": self.busy_flops,
                "optimizer_bytes_per_s": self.optimizer_bytes_per_s,
                "links": {name: asdict(link) for name, link in self.fits.items()},
                "collectives": [asdict(call) for call in self.calls],
            },
        }

    def __str__(self) -> str:
        sizes = [f"{r}x{i}x{c}" for r, i, c in MATMUL_SIZES]
        rates = [
            [dtype, *(format_rate(by_size[s], "FLOP") for s in sizes)]
            for dtype, by_size in self.matmul.items()
        ]
        alone = self.busy_flops[min(self.busy_flops)]
        busy = [
            [n, format_rate(rate, "FLOP"), f"{alone / rate:.2f}"]
            for n, rate in sorted(self.busy_flops.items())
        ]
        bf16 = "the CPU has bf16 instructions" if self.has_bf16 else "no bf16 instructions here"
        return "\n\n".join(
            [
                f"{self.cluster}\n{self.cluster.cores_shared} compute units; {bf16}; memory "
                f"{format_rate(self.cluster.memory_bytes_per_s)}, optimizer "
                f"{format_rate(self.optimizer_bytes_per_s)}\n{self._crowding()}",
                table(rates, ["matmul", *sizes]),
                table(busy, ["busy ranks", "each", "slow-down"]),
                _calls_table(self.calls),
                table(
                    [
                        [name, format_seconds(x.latency_s), format_rate(x.bytes_per_s)]
                        for name, x in self.fits.items()
                    ],
                    ["fit", "latency", "rate"],
                ),
            ]
        )

    def _crowding(self) -> str:
        each = [f"{x:.2f} with {n} ranks" for n, x in (self.cluster.crowding or {}).items()]
        return f"layers take {', '.join(each)} of what they take alone, turns aside"


def _calls_table(calls: Sequence[Call]) -> str:
    by: dict[tuple[str, str, int], dict[int, float]] = {}
    for c in calls:
        by.setdefault((c.backend, c.op, c.ranks), {})[c.bytes] = c.seconds
    sizes = sorted({c.bytes for c in calls})
    rows = [[*key, *(format_seconds(found[s]) for s in sizes)] for key, found in by.items()]
    return table(rows, ["backend", "collective", "ranks", *map(format_bytes, sizes)])


def calibrate(
    base: Cluster, tell: Tell = lambda phase, done, of: None
) -> Calibration | DeviceCalibration:
    """Measures this machine for ranks of `base`, which keeps devices, memory and limit; its GPU where that
    is the base's device (device.py).

    Starts two to four processes; takes 10 to 30 seconds. Raises UsageError for a cluster of GPUs where
    torch sees none, PeerError when a rank is lost on the way.
    """
    if base.device != "CPU":
        return calibrate_gpu(base, tell)
    found = _measure(_setup(base), tell)
    return summarise(base, found, _has_bf16())


def _setup(base: Cluster) -> Setup:
    from partita.comm.shm import shm

    ranks = min(max(base.devices, 2), 4)
    counts = tuple(n for n in (1, 2, 4) if n <= ranks)
    units = min(ranks, psutil.cpu_count(logical=False) or psutil.cpu_count() or 1)
    backends = ("shm", "gloo") if shm.available() else ("gloo",)
    return Setup(ranks, units, counts, counts[1:], backends, Path())


def _has_bf16() -> bool:
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _measure(setup: Setup, tell: Tell) -> list[Found]:
    names = phase_names(setup)
    tell("starting ranks", 0, len(names))
    with tempfile.TemporaryDirectory(prefix="partita-calibrate-") as scratch:
        setup = replace(setup, scratch=Path(scratch))
        barrier = get_context("forkserver").Barrier(setup.num_ranks, timeout=TIMEOUT_S)
        ranks = start_ranks(setup.num_ranks, probe, (setup, barrier))
        try:
            return _listen(ranks, lambda name: tell(name, names.index(name), len(names)))
        finally:
            for process, _ in ranks:
                process.kill()
                process.join(5)


def _listen(
    ranks: Sequence[tuple[BaseProcess, Connection]], began: Callable[[str], None]
) -> list[Found]:
    """Takes phase names from rank 0 and what each rank found. Raises PeerError."""
    found: dict[int, Found] = {}
    waiting = {reader: rank for rank, (_, reader) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout=TIMEOUT_S)
        if not ready:
            raise PeerError(f"no rank has spoken for {TIMEOUT_S:g} s; waiting for {len(waiting)}")
        for reader in ready:
            rank = waiting[reader]
            try:
                message = reader.recv()
            except EOFError:
                ranks[rank][0].join(5)
                code = ranks[rank][0].exitcode
                raise PeerError(
                    f"rank {rank} ended with code {code} while it measured; its reason is above"
                ) from None
            if isinstance(message, Found):
                found[rank] = message
                del waiting[reader]
            elif rank == 0:
                began(message)
    return [found[r] for r in sorted(found)]


def summarise(base: Cluster, found: Sequence[Found], has_bf16: bool) -> Calibration:
    """Joins what the ranks found: rates are means over the ranks that were busy."""
    busy = {
        n: fmean(f.busy_flops[n] for f in found if n in f.busy_flops)
        for n in sorted({n for f in found for n in f.busy_flops})
    }
    layers = {n: fmean(f.crowded[n] for f in found if n in f.crowded) for n in busy}
    units = compute_units(busy)
    matmul = {
        dtype: {
            size: fmean(f.matmul[dtype][size] for f in found if dtype in f.matmul)
            for size in found[0].matmul[dtype]
        }
        for dtype in found[0].matmul
    }
    memory = [f.memory_bytes_per_s for f in found if f.memory_bytes_per_s]
    optimizer = [f.optimizer_bytes_per_s for f in found if f.optimizer_bytes_per_s]
    calls = slowest_calls(found)
    backends = list(dict.fromkeys(c.backend for c in calls))
    fits = {b: fit([c for c in calls if c.backend == b]) for b in backends}
    peaks = {dtype: max(rates.values()) for dtype, rates in matmul.items()}
    peaks["fp64"] = peaks["fp32"] / 2
    used = backends[0] if backends else ""
    cluster = replace(
        base,
        name=f"{base.name}-calibrated" if not base.name.endswith("-calibrated") else base.name,
        peak_flops=peaks,
        memory_bytes_per_s=fmean(memory),
        cores_shared=units,
        crowding=crowding(layers, units),
        matmul_flops_per_s=matmul,
        piece_seconds=_pieces([f.pieces for f in found if f.pieces]) or None,
        collective_seconds=_by_size([c for c in calls if c.backend == used]) or None,
        links=_links(base, used, fits),
    )
    rate = fmean(optimizer)
    return Calibration(cluster, has_bf16, matmul, busy, rate, fits, tuple(calls))


def _pieces(found: Sequence[Mapping[str, Made]]) -> dict[str, Made]:
    """Each piece as ranks see it in the mean, each the median of its own: all of them take their time, not
    the quickest alone."""
    return {
        dtype: {
            name: {size: fmean(f[dtype][name][size] for f in found) for size in by_size}
            for name, by_size in by_name.items()
        }
        for dtype, by_name in (found[0].items() if found else ())
    }


def _by_size(calls: Sequence[Call]) -> dict[str, dict[str, dict[str, float]]]:
    made: dict[str, dict[str, dict[str, float]]] = {}
    for c in calls:
        made.setdefault(c.op, {}).setdefault(str(c.ranks), {})[str(c.bytes)] = c.seconds
    return made


def _links(base: Cluster, used: str, fits: Mapping[str, AlphaBeta]) -> tuple[Link, ...]:
    if base.devices == 1 or used not in fits:
        return base.links
    link, name = fits[used], {"shm": "shared memory"}.get(used, used)
    return (Link(name, base.devices, link.bytes_per_s, link.latency_s),)


def compute_units(busy: Mapping[int, float]) -> int:
    """Ranks' worth of work at a time: n ranks each at rate r(n) do n r(n) / r(1). Where the most ranks
    tried did not slow each other down, all of the machine's processors count."""
    most = max(busy)
    ways = most * busy[most] / busy[min(busy)]
    if ways > 0.85 * most:
        return max(most, psutil.cpu_count() or 1)
    return max(1, round(ways))


def crowding(layers: Mapping[int, float], units: int) -> dict[str, float]:
    """Ranks busy -> how many times longer a layer takes than alone, where they take turns on so many units:
    they evict each other's caches and share the memory's bandwidth."""
    alone = layers[min(layers)]
    return {
        str(n): max(1.0, alone / rate / max(1.0, n / units)) for n, rate in sorted(layers.items())
    }


def slowest_calls(found: Sequence[Found]) -> list[Call]:
    """A collective has ended when its last rank has."""
    slowest: dict[tuple[str, str, int, int], Call] = {}
    for call in (c for f in found for c in f.calls):
        key = (call.backend, call.op, call.ranks, call.bytes)
        if key not in slowest or slowest[key].seconds < call.seconds:
            slowest[key] = call
    return list(slowest.values())


def fit(calls: Sequence[Call]) -> AlphaBeta:
    """Alpha and beta, both at least 0, with the least squared relative error over the calls.

    Each call says messages * alpha + bytes through the link * beta = seconds, by the ring formulas of
    cost/comm.py. A send over more than two ranks is the same as over two, and counts once.
    """
    import numpy as np
    from scipy.optimize import nnls

    used = [c for c in calls if c.op in COLLECTIVES and not (c.op == "send" and c.ranks > 2)]
    rows = []
    for c in used:
        messages, through = steps_and_bytes(c.op, c.ranks, c.bytes)
        rows.append([messages / c.seconds, through / c.seconds])
    matrix = np.array(rows)
    scale = matrix.max(axis=0)  # so that seconds and seconds a byte are of one order
    (alpha, beta), _ = nnls(matrix / scale, np.ones(len(used)))
    return AlphaBeta(float(alpha / scale[0]), float(scale[1] / beta) if beta else 1e18)

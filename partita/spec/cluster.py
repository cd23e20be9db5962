"""A cluster as numbers: devices, memory, peak rates by precision, link tiers, shared compute units.

Ranks lie on devices in order; the devices of one node are neighbours. A link tier joins groups of
neighbouring devices; of two ranks the innermost tier that joins them is the link between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from partita.base.config import encode, load_toml
from partita.base.errors import UsageError, raise_all
from partita.base.text import did_you_mean
from partita.base.units import format_bytes, format_rate
from partita.spec.hardware import ALIASES, Hardware, find_hardware, hardware_rows, host_link
from partita.spec.prices import Prices
from partita.spec.reliability import Jitter, Reliability

PRESETS = Path(__file__).parent / "presets" / "clusters"
MAX_DEVICES = 10_000_000
AWAY = ("host_memory_bytes", "host_link_bytes_per_s", "disk_bytes", "disk_bytes_per_s")
Wrong = Iterator[tuple[str, str]]  # key and text of what is wrong
DTYPES = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4")


@dataclass(frozen=True, slots=True)
class Link:
    """A tier: groups of `devices` neighbours, each device with `bytes_per_s` in each direction. Its switches
    may add what passes through them (`reduces`: NVLink SHARP, SHARP)."""

    name: str
    devices: int
    bytes_per_s: float
    latency_s: float
    reduces: bool = False

    def __post_init__(self) -> None:
        raise_all(
            [
                *_outside("devices", self.devices, 1, MAX_DEVICES),
                *_outside("bytes_per_s", self.bytes_per_s, 1, 1e18),
                *_outside("latency_s", self.latency_s, 0, 3600),
            ]
        )


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """`count` nodes with `devices` devices each, where nodes differ."""

    count: int
    device: str
    devices: int
    memory_bytes: int
    memory_bytes_per_s: float
    peak_flops: Mapping[str, float] = field(hash=False)

    def __post_init__(self) -> None:
        raise_all(
            [
                *_outside("count", self.count, 1, MAX_DEVICES),
                *_outside("devices", self.devices, 1, MAX_DEVICES),
                *_wrong_rates(self.memory_bytes, self.memory_bytes_per_s, self.peak_flops),
            ]
        )


class Wiring:
    """A cluster by its links alone, for a cache: its hash is worked out once."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        kinds = tuple((n.count, n.devices) for n in cluster.nodes)
        self._key = (cluster.devices_per_node, cluster.links, cluster.device, kinds)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Wiring) and self._key == other._key


@dataclass(frozen=True)
class Cluster:
    """Devices and links. Where `nodes` differ, memory and rates are those of the weakest device, which
    is what a plan that treats ranks alike must fit (unequal.py: those of some of the nodes). Where they were
    measured: `matmul_flops_per_s`, what products of a stated size reach, by dtype; `piece_seconds` of pieces
    of layers by dtype, name and size; `collective_seconds` by name, ranks and bytes handed in; `crowding`,
    how many times longer layers take by the ranks of a node that are busy, their turns aside. Raises
    UsageError for what cannot be."""

    name: str
    devices: int
    devices_per_node: int
    device: str
    memory_bytes: int
    peak_flops: Mapping[str, float] = field(hash=False)
    memory_bytes_per_s: float
    links: tuple[Link, ...]
    memory_limit_fraction: float = 0.94
    cores_shared: int | None = None
    host_memory_bytes: int | None = None
    host_link_bytes_per_s: float | None = None  # of a device, each way
    disk_bytes: int | None = None  # of a node, for offload:nvme
    disk_bytes_per_s: float | None = None
    disk_folder: str | None = None  # where its files go
    nodes: tuple[NodeGroup, ...] = ()
    reliability: Reliability | None = None
    jitter: Jitter | None = None
    prices: Prices | None = None
    matmul_flops_per_s: Mapping[str, Mapping[str, float]] | None = field(default=None, hash=False)
    piece_seconds: Mapping[str, Mapping[str, Mapping[str, float]]] | None = field(
        default=None, hash=False
    )
    collective_seconds: Mapping[str, Mapping[str, Mapping[str, float]]] | None = field(
        default=None, hash=False
    )
    crowding: Mapping[str, float] | None = field(default=None, hash=False)
    slower: float = 1.0  # so many times what its rates say plans took here (plan --measure)

    def __post_init__(self) -> None:
        raise_all([*self._wrong(), *_wrong_measured(self)])

    def _wrong(self) -> Wrong:
        """Key and text of all that cannot be of its devices and links."""
        yield from _outside("devices", self.devices, 1, MAX_DEVICES)
        yield from _outside("devices_per_node", self.devices_per_node, 1, MAX_DEVICES)
        yield from _wrong_rates(self.memory_bytes, self.memory_bytes_per_s, self.peak_flops)
        yield from _outside("memory_limit_fraction", self.memory_limit_fraction, 0.01, 1)
        if self.cores_shared is not None:
            yield from _outside("cores_shared", self.cores_shared, 1, 100_000)
        for name in AWAY:
            if (value := getattr(self, name)) is not None:
                yield from _outside(name, value, 1, 1e18)
        sizes = [link.devices for link in self.links]
        if sizes != sorted(sizes):
            yield "links", f"inner tiers come first, these join {sizes} devices"
        elif 1 < self.devices <= MAX_DEVICES and (not sizes or sizes[-1] < self.devices):
            joined = sizes[-1] if sizes else 1
            text = f"the outermost tier joins {joined} of {self.devices} devices; add a tier"
            yield "links", f"{text} that joins all"

    @cached_property
    def wiring(self) -> Wiring:
        """Its links, for a cache."""
        return Wiring(self)

    def crowded(self, ranks: int) -> float:
        """How many times longer layers take where so many ranks of a node are busy, on a line between numbers
        that were measured; 1 where none was."""
        known = sorted((int(n), factor) for n, factor in (self.crowding or {}).items())
        if not known or ranks <= known[0][0]:
            return known[0][1] if known else 1.0
        for (few, low), (many, high) in pairwise(known):
            if ranks <= many:
                return low + (high - low) * (ranks - few) / (many - few)
        return known[-1][1]

    @property
    def memory_limit_bytes(self) -> int:
        """What a rank may hold on its device: memory_bytes * memory_limit_fraction."""
        return int(self.memory_bytes * self.memory_limit_fraction)

    @property
    def host_link(self) -> float:
        """Bytes a second between a device and its host, each way: as stated, or its bus."""
        return self.host_link_bytes_per_s or host_link(self.device)

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return self.node_of(self.devices - 1) + 1

    def node_of(self, rank: int) -> int:
        """The node on which a rank lies."""
        if not self.nodes:
            return rank // self.devices_per_node
        before = 0
        for group in self.nodes:
            if rank < group.count * group.devices:
                return before + rank // group.devices
            rank, before = rank - group.count * group.devices, before + group.count
        return before

    def link_for(self, ranks: Sequence[int]) -> Link:
        """The innermost tier one of whose groups holds all these ranks. A rank alone meets itself at
        the speed of its memory."""
        low, high = min(ranks), max(ranks)
        if low == high:
            return Link("self", 1, self.memory_bytes_per_s, 0.0)
        for link in self.links:
            whole_node = link.devices == self.devices_per_node
            group = self.node_of if whole_node else link.devices.__rfloordiv__
            if group(low) == group(high):
                return link
        return self.links[-1]

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products. A precision that the device lacks runs at the next wider
        one it has; fp64, and fp32 where none is published, at half the next."""
        order = ("fp8", "fp16", "bf16", "fp32") if dtype == "fp8" else ("bf16", "fp16", "fp32")
        chain = {"fp16": ("fp16", "bf16", "fp32"), "fp32": ("fp32",), "fp64": ("fp64",)}
        for name in chain.get(dtype, order):
            if name in self.peak_flops:
                return self.peak_flops[name]
        wider = {"fp64": "fp32", "fp32": "tf32"}.get(dtype, "")
        return self.peak_flops.get(wider, min(self.peak_flops.values())) / 2

    def units(self, ranks: int) -> int:
        """Compute units that do the work of so many ranks: devices, or the cores that CPU ranks share."""
        return min(ranks, self.cores_shared or ranks)

    @staticmethod
    def preset_names() -> list[str]:
        """Names that from_preset knows besides '<n>x<device>'."""
        return sorted(p.stem for p in PRESETS.glob("*.toml"))

    @staticmethod
    def from_preset(name: str) -> Cluster:
        """'laptop', '64xa100-80gb', '16384xh100'. Raises UsageError with the nearest name."""
        return Cluster.from_toml({"preset": name})

    @staticmethod
    def from_toml(
        table: Mapping[str, Any],
        *,
        file: str | None = None,
        prefix: str = "cluster",
        folder: str | Path = ".",
    ) -> Cluster:
        """A cluster file or a [cluster] table: `preset` or `path` (relative to `folder`), which the
        other fields override, or all fields. Raises UsageError."""
        from partita.spec.cluster_read import read_cluster

        return read_cluster(table, file=file, prefix=prefix, folder=Path(folder))

    @staticmethod
    def load(what: str | Path | Mapping[str, Any]) -> Cluster:
        """A cluster from a preset's name, '<n>x<device>', a TOML file or a table."""
        if isinstance(what, Mapping):
            return Cluster.from_toml(what)
        path = Path(what)
        if path.suffix != ".toml":
            return Cluster.from_preset(str(what))
        table = load_toml(path)
        return Cluster.from_toml(table, file=str(path), prefix="", folder=path.parent)

    def to_toml(self) -> dict[str, Any]:
        """The cluster file with every field stated."""
        table = encode(self)
        if self.slower == 1.0:
            del table["slower"]
        if self.nodes:
            for key in ("devices", "device"):
                del table[key]
        else:
            del table["nodes"]
        return table

    def __str__(self) -> str:
        peak = self.peak("bf16")
        return (
            f"{self.name}: {self.devices} x {self.device}, {format_bytes(self.memory_bytes)}, "
            f"{format_rate(peak, 'FLOP')} bf16; "
            + ", ".join(
                f"{x.name} {format_rate(x.bytes_per_s)} over {x.devices}" for x in self.links
            )
        )


def _outside(key: str, value: float, low: float, high: float) -> list[tuple[str, str]]:
    holds = low <= value <= high
    return [] if holds else [(key, f"{value} is not within {low:g}..{high:g}")]


def _wrong_rates(memory_bytes: int, memory_bytes_per_s: float, peaks: Mapping[str, float]) -> Wrong:
    yield from _outside("memory_bytes", memory_bytes, 1_000, 10**16)
    yield from _outside("memory_bytes_per_s", memory_bytes_per_s, 1, 1e18)
    if not peaks:
        yield "peak_flops", "at least one precision is wanted, e.g. {fp32 = 50e9}"
    for name, peak in peaks.items():
        if name not in DTYPES:
            yield "peak_flops", f"no precision '{name}'{did_you_mean(name, DTYPES)}"
        yield from _outside(f"peak_flops.{name}", peak, 1, 1e21)


def _wrong_measured(cluster: Cluster) -> Wrong:
    """What was measured, and cannot have been."""
    yield from _outside("slower", cluster.slower, 0.01, 100)
    for ranks, factor in (cluster.crowding or {}).items():
        if not ranks.isdecimal() or int(ranks) < 1:
            yield "crowding", f"{ranks!r} is no number of ranks"
        yield from _outside("crowding", factor, 1, 100)
    yield from _wrong_matmuls(cluster.matmul_flops_per_s or {})
    yield from _wrong_seconds("piece_seconds", cluster.piece_seconds or {})
    yield from _wrong_seconds("collective_seconds", cluster.collective_seconds or {})


def _wrong_matmuls(measured: Mapping[str, Mapping[str, float]]) -> Wrong:
    for dtype, rates in measured.items():
        for size, rate in rates.items():
            if not re.fullmatch(r"[1-9]\d{0,8}x[1-9]\d{0,8}x[1-9]\d{0,8}", size):
                text = (
                    f"'{size}' is no size of a product: rows x inner x columns, e.g. '256x192x512'"
                )
                yield f"matmul_flops_per_s.{dtype}", text
            yield from _outside(f"matmul_flops_per_s.{dtype}.{size}", rate, 1, 1e21)


def _wrong_seconds(field: str, measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Wrong:
    for outer, by_name in measured.items():
        for name, by_size in by_name.items():
            if not by_size:
                yield f"{field}.{outer}.{name}", "no size was measured"
            for size, seconds in by_size.items():
                if not re.fullmatch(r"[1-9]\d{0,17}", size):
                    yield f"{field}.{outer}.{name}", f"'{size}' is no size"
                yield from _outside(f"{field}.{outer}.{name}.{size}", seconds, 0, 3600)


def _known() -> list[str]:
    return [*Cluster.preset_names(), *(f"8x{d.lower()}" for d in (*ALIASES, *hardware_rows()))]


def split_preset(name: str) -> tuple[int, Hardware]:
    """'<n>x<device>' as its parts. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9})x(.+)", name)
    if not match:
        text = f"no cluster preset '{name}'{did_you_mean(name, _known())}"
        raise UsageError(f"{text} (or '<n>x<device>', or a .toml file)", key="preset")
    return int(match[1]), find_hardware(match[2])

"""A cluster file or a [cluster] table as a Cluster: what it leaves out comes from hardware.csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from partita.base.config import decode, load_toml
from partita.base.errors import UsageError, all_of, raise_all
from partita.spec.cluster import MAX_DEVICES, PRESETS, Cluster, Link, NodeGroup, split_preset
from partita.spec.hardware import Hardware, find_hardware
from partita.spec.prices import Prices
from partita.spec.reliability import Jitter, Reliability
from partita.spec.unequal import weakest_peaks

T = TypeVar("T")


@dataclass(frozen=True)
class _Link:
    """As written: `devices` left out is all."""

    bytes_per_s: float
    name: str = ""
    devices: int | None = None
    latency_s: float = 0.0
    reduces: bool = False


@dataclass(frozen=True)
class _Node:
    """As written; what follows `device` overrides its row."""

    devices: int
    device: str
    count: int = 1
    memory_bytes: int | None = None
    memory_bytes_per_s: float | None = None
    peak_flops: dict[str, float] | None = None


@dataclass(frozen=True)
class _File:
    """A cluster file as written."""

    name: str = ""
    devices: int | None = None
    devices_per_node: int | None = None
    device: str | None = None
    memory_bytes: int | None = None
    memory_limit_fraction: float | None = None
    peak_flops: dict[str, float] | None = None
    memory_bytes_per_s: float | None = None
    cores_shared: int | None = None
    host_memory_bytes: int | None = None
    host_link_bytes_per_s: float | None = None
    disk_bytes: int | None = None
    disk_bytes_per_s: float | None = None
    disk_folder: str | None = None
    links: tuple[_Link, ...] = ()
    nodes: tuple[_Node, ...] = ()
    reliability: Reliability | None = None
    jitter: Jitter | None = None
    prices: Prices | None = None
    matmul_flops_per_s: dict[str, dict[str, float]] | None = None
    piece_seconds: dict[str, dict[str, dict[str, float]]] | None = None
    collective_seconds: dict[str, dict[str, dict[str, float]]] | None = None
    crowding: dict[str, float] | None = None
    slower: float | None = None


def read_cluster(
    table: Mapping[str, Any], *, file: str | None, prefix: str, folder: Path
) -> Cluster:
    """The cluster of a table. Raises UsageError that names file and key."""
    try:
        rest = _with_base(table, folder)
    except UsageError as error:
        if error.file is not None:
            raise
        raise _placed(error, file, prefix) from None
    told, out, found = list[UsageError](), set[str](), None
    try:
        stated = decode(_File, rest, file=file, prefix=prefix)
    except UsageError as error:  # what is wrong with the other fields is told beside it
        told.append(error)
        out = {_top(key.removeprefix(f"{prefix}.")) for key in error.keys}
        stated = decode(_File, {k: v for k, v in rest.items() if k not in out})
    try:
        found = _resolve(stated)
    except UsageError as error:
        more = [(key, text) for key, text in error.all if _top(key) not in out]
        told += [_placed(all_of(more), file, prefix)] if more else []
    if found is not None and not told:
        return found
    placed = UsageError("\n".join(x.message for x in told), file=told[0].file, key=told[0].key)
    placed.keys = tuple(key for x in told for key in x.keys)
    raise _of_path(table, folder, prefix, placed) or placed


def _of_path(
    table: Mapping[str, Any], folder: Path, prefix: str, wrong: UsageError
) -> UsageError | None:
    """The same, told of the file that `path` names, where it lies in that file."""
    if "path" not in table:
        return None
    try:
        Cluster.load(folder / table["path"])
    except UsageError as error:
        keys = {key.removeprefix(f"{prefix}.") for key in wrong.keys}
        return error if keys == set(error.keys) else None
    return None


def _top(key: str) -> str:
    """The field that a key lies in."""
    return key.partition(".")[0].partition("[")[0]


def _placed(error: UsageError, file: str | None, prefix: str) -> UsageError:
    """The error with the file and the whole key."""
    if error.key is None or (prefix and error.key.startswith(f"{prefix}.")):
        return error
    key = f"{prefix}.{error.key}" if prefix else error.key
    where = f"{file}: " if file else ""
    before = f"{where}{prefix}." if prefix else where
    told = [f"{before}{k}: {text}" for k, text in error.all]
    placed = UsageError("\n".join(told), file=file, key=key)
    placed.keys = tuple(key for key, _ in error.all)
    return placed


def _with_base(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of `preset` or `path`, and over them the table's own."""
    rest = {k: v for k, v in table.items() if k not in ("preset", "path")}
    if "preset" in table and "path" in table:
        raise UsageError("preset or path, not both", key="path")
    for key in ("preset", "path"):
        if not isinstance(table.get(key, ""), str):
            raise UsageError("a string is wanted", key=key)
    base: dict[str, Any] = {}
    if "preset" in table:
        name = table["preset"].lower()
        if name in Cluster.preset_names():
            base = load_toml(PRESETS / f"{name}.toml")
        else:
            devices, row = split_preset(name)
            base = {"name": name, "devices": devices, "device": row.name}
    elif "path" in table:
        path = folder / table["path"]
        try:
            stated = load_toml(path)
        except UsageError as error:
            error.key = "cluster.path"
            raise
        base = _with_base(stated, path.parent)
    if isinstance(rest.get("peak_flops"), Mapping) and isinstance(base.get("peak_flops"), Mapping):
        rest["peak_flops"] = {**base["peak_flops"], **rest["peak_flops"]}
    if "nodes" in rest:
        base = {k: v for k, v in base.items() if k not in ("device", "devices")}
    return {**base, **rest}


def _row(name: str) -> Hardware:
    """A row of the table; a CPU, which has nothing published, with what the laptop preset states."""
    row = find_hardware(name)
    if row.memory_bytes:
        return row
    if row.name != "CPU":
        raise UsageError(f"nothing is published about '{name}'", key="device")
    laptop = decode(_File, load_toml(PRESETS / "laptop.toml"))
    link = laptop.links[0]
    return Hardware(
        name="CPU",
        memory_bytes=laptop.memory_bytes or 0,
        peak_flops=laptop.peak_flops or {},
        memory_bytes_per_s=laptop.memory_bytes_per_s or 0.0,
        intra_name=link.name,
        intra_bytes_per_s=link.bytes_per_s,
        intra_latency_s=link.latency_s,
        inter_bytes_per_s=0.0,
        inter_latency_s=0.0,
        domain_devices=0,
        node_devices=0,
        source=row.source,
    )


def _resolve(stated: _File) -> Cluster:
    """The cluster, or all that is wrong: of nodes, links and the devices, as far as each can be told."""
    wrong: list[tuple[str, str]] = []

    def tried(make: Callable[[], T], instead: T) -> T:
        try:
            return make()
        except UsageError as error:
            wrong.extend(error.all)
            return instead

    if stated.nodes and (stated.devices is not None or stated.device is not None):
        wrong.append(("nodes", "nodes replace devices and device"))
    if stated.devices is None and not stated.nodes:
        wrong.append(("devices", "missing: how many devices?"))
    if stated.device is None and not stated.nodes:
        text = "missing: a row of hardware.csv, e.g. 'h100', 'a100' or 'laptop'"
        wrong.append(("device", text))
    made = [tried(partial(_node, i, n), None) for i, n in enumerate(stated.nodes)]
    nodes = tuple(n for n in made if n is not None)
    weakest = min(nodes, key=lambda n: max(n.peak_flops.values())) if nodes else None
    named = weakest.device if weakest else stated.device or "laptop"
    row = tried(lambda: _row(named), _row("laptop"))
    devices = sum(n.count * n.devices for n in nodes) or _or(stated.devices, 0)
    if wrong:  # the rest is held to one device of which nothing can be wrong
        nodes, devices = (), 1
    joined = min(max(devices, 1), MAX_DEVICES)
    on_node = max((n.devices for n in nodes), default=stated.devices_per_node)
    on_node = on_node if on_node is not None else min(row.node_devices or joined, joined)
    links = tried(lambda: _links(stated, row, joined, on_node), (Link("all", joined, 1.0, 0.0),))
    cluster = tried(lambda: _made(stated, row, devices, on_node, nodes, links), None)
    raise_all(wrong)
    assert cluster is not None
    return cluster


def _made(
    stated: _File,
    row: Hardware,
    devices: int,
    on_node: int,
    nodes: tuple[NodeGroup, ...],
    links: tuple[Link, ...],
) -> Cluster:
    peaks = {**row.peak_flops, **(stated.peak_flops or {})}
    memory = min((n.memory_bytes for n in nodes), default=row.memory_bytes)
    speed = min((n.memory_bytes_per_s for n in nodes), default=row.memory_bytes_per_s)
    is_cpu = row.name == "CPU"
    return Cluster(
        name=stated.name or f"{devices}x{row.name.lower()}",
        devices=devices,
        devices_per_node=on_node,
        device=row.name,
        memory_bytes=_or(stated.memory_bytes, memory),
        peak_flops={**weakest_peaks(nodes), **(stated.peak_flops or {})} if nodes else peaks,
        memory_bytes_per_s=_or(stated.memory_bytes_per_s, speed),
        links=links,
        memory_limit_fraction=_or(stated.memory_limit_fraction, 1.0 if is_cpu else 0.94),
        cores_shared=_or(stated.cores_shared, 2 if is_cpu else None),
        host_memory_bytes=stated.host_memory_bytes,
        host_link_bytes_per_s=stated.host_link_bytes_per_s,
        disk_bytes=stated.disk_bytes,
        disk_bytes_per_s=stated.disk_bytes_per_s,
        disk_folder=stated.disk_folder,
        nodes=nodes,
        reliability=stated.reliability,
        prices=stated.prices,
        jitter=stated.jitter,
        matmul_flops_per_s=stated.matmul_flops_per_s,
        piece_seconds=stated.piece_seconds,
        collective_seconds=stated.collective_seconds,
        crowding=stated.crowding,
        slower=_or(stated.slower, 1.0),
    )


def _or(stated: Any, default: Any) -> Any:
    return default if stated is None else stated


def _node(index: int, stated: _Node) -> NodeGroup:
    try:
        row = _row(stated.device)
        own, speed = stated.memory_bytes, stated.memory_bytes_per_s
        return NodeGroup(
            count=stated.count,
            device=row.name,
            devices=stated.devices,
            memory_bytes=row.memory_bytes if own is None else own,
            memory_bytes_per_s=row.memory_bytes_per_s if speed is None else speed,
            peak_flops={**row.peak_flops, **(stated.peak_flops or {})},
        )
    except UsageError as error:
        raise_all([(f"nodes[{index}].{key}", text) for key, text in error.all])
        raise


def _links(stated: _File, row: Hardware, devices: int, on_node: int) -> tuple[Link, ...]:
    """The tiers as stated, else those of the device: inside its domain, then between domains."""
    if stated.links:
        return _stated_links(stated.links, devices)
    if devices == 1:
        return ()
    rack = row.domain_devices > row.node_devices  # the inner link leaves the node
    domain = min(row.domain_devices if rack else on_node, devices)
    tiers: list[Link] = []
    if domain > 1 and not row.intra_bytes_per_s:
        text = f"no link inside a node is published for {row.name}: state [[links]]"
        raise UsageError(text, key="links")
    if domain > 1:
        tiers.append(Link(row.intra_name, domain, row.intra_bytes_per_s, row.intra_latency_s))
    if domain < devices:
        if not row.inter_bytes_per_s:
            text = f"no link between nodes is published for {row.name}: state [[links]]"
            raise UsageError(text, key="links")
        tiers.append(Link("inter-node", devices, row.inter_bytes_per_s, row.inter_latency_s))
    return tuple(tiers)


def _stated_links(stated: tuple[_Link, ...], devices: int) -> tuple[Link, ...]:
    """The tiers as stated; what is wrong with any is told at once."""
    made: list[Link] = []
    wrong: list[tuple[str, str]] = []
    for i, x in enumerate(stated):
        try:
            made.append(
                Link(
                    name=x.name or f"tier {i}",
                    devices=devices if x.devices is None else x.devices,
                    bytes_per_s=x.bytes_per_s,
                    latency_s=x.latency_s,
                    reduces=x.reduces,
                )
            )
        except UsageError as error:
            wrong += [(f"links[{i}].{key}", text) for key, text in error.all]
    raise_all(wrong)
    return tuple(made)

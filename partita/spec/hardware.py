"""Published devices: the rows of presets/hardware.csv, which states a source for each."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from partita.base.errors import UsageError
from partita.base.text import did_you_mean

FILE = Path(__file__).parent / "presets" / "hardware.csv"
ALIASES = {
    "h100": "H100-80GB-SXM",
    "a100": "A100-80GB",
    "h200": "H200-SXM",
    "h800": "H800-SXM",
    "a800": "A800-80GB",
    "b200": "B200-SXM",
    "b300": "B300-SXM",
    "gh200": "GH200-141GB",
    "v100": "V100-32GB",
    "laptop": "CPU",
}
SHARED_CHUNK_BYTES = 1 << 20  # that a CPU rank hands over at once through the memory of its host
_PEAKS = ("fp32", "tf32", "bf16", "fp16", "fp8", "fp4")
# [assumed] where the table leaves a latency blank: NVLink's and InfiniBand's order of magnitude
INTRA_LATENCY_S, INTER_LATENCY_S = 10e-6, 20e-6

# Bytes a second between a device and its host, each way: 16 lanes of PCIe 3, 4 or 5 less its framing, or
# NVLink-C2C as hardware.csv notes it. By the beginning of the device's name; others [assumed] PCIe 4.
HOST_LINKS = {
    "V100": 15.75e9, "A100": 31.5e9, "A800": 31.5e9, "H": 63e9, "B": 63e9, "MI300": 63e9,
    "GH": 450e9, "GB": 450e9,
}  # fmt: skip

# MiB that nvidia-smi shows of a device, where the table's hbm_GB is its name's round number; by the beginning
# of the device's name
SHOWN_MIB = {
    "V100-32": 32768, "A100-80": 81920, "H100-80": 81559, "H800": 81559, "H200": 143771, "B200": 183359,
    "GB200": 189471, "B300": 275040, "GB300": 284208,
}  # fmt: skip


# Of its peaks, which are those of an H100 of 700 W: hardware.csv notes 0.75 to 0.85
SUSTAINED = {"H100-96GB-HBM2e-500W": 0.8}

# Devices of a node that no switch joins: how many of its inner link's lanes a device has to each other one. A
# DGX-1's hybrid cube mesh (p3.16xlarge): two quads, each device with one of the other.
CUBE_MESH = (
    (0, 1, 1, 2, 2, 0, 0, 0), (1, 0, 2, 1, 0, 2, 0, 0), (1, 2, 0, 2, 0, 0, 1, 0), (2, 1, 2, 0, 0, 0, 0, 1),
    (2, 0, 0, 0, 0, 1, 1, 2), (0, 2, 0, 0, 1, 0, 2, 1), (0, 0, 1, 0, 1, 2, 0, 2), (0, 0, 0, 1, 2, 1, 2, 0),
)  # fmt: skip
MESHES = {"V100-16GB": CUBE_MESH}


def share_of_links(device: str, places: tuple[int, ...]) -> float:
    """Of a device's inner link, what a collective over those places of a node can use: the least of any of
    them to the others, where no switch joins them (what cuts it from the rest: Edmonds 1973, Wang et al.'s
    Blink 2020); what has no link goes over the host's bus."""
    mesh = MESHES.get(device, ())
    if len(places) < 2 or max(places) >= len(mesh):
        return 1.0
    inner = find_hardware(device).intra_bytes_per_s
    least = min(sum(mesh[a][b] for b in places) / sum(mesh[a]) for a in places)
    return max(least, host_link(device) / inner)


def shown_bytes(device: str, stated: int) -> int:
    """Bytes that a device shows of its memory, of which `stated` are in its name."""
    return next((mib * 2**20 for name, mib in SHOWN_MIB.items() if device.startswith(name)), stated)


def sustained(device: str) -> float:
    """Of its published peaks, what a device's power lets it hold."""
    return SUSTAINED.get(device, 1.0)


def host_link(device: str) -> float:
    """Bytes a second of the bus between a device and its host."""
    return next((rate for name, rate in HOST_LINKS.items() if device.startswith(name)), 31.5e9)


@dataclass(frozen=True)
class Hardware:
    """One device as published; 0 where nothing is published. Rates are per second and direction."""

    name: str
    memory_bytes: int
    peak_flops: Mapping[str, float]
    memory_bytes_per_s: float
    intra_name: str
    intra_bytes_per_s: float
    intra_latency_s: float
    inter_bytes_per_s: float
    inter_latency_s: float
    domain_devices: int  # joined by the inner link
    node_devices: int
    source: str


@cache
def hardware_rows() -> dict[str, Hardware]:
    """All rows by name."""
    with FILE.open(encoding="utf-8", newline="") as lines:
        return {row["device"]: _read(row) for row in csv.DictReader(lines)}


def _read(row: Mapping[str, str]) -> Hardware:
    def number(column: str, scale: float = 1.0) -> float:
        return float(row[column]) * scale if row[column] else 0.0

    peaks = {name: number(f"peak_{name}_tflops", 1e12) for name in _PEAKS}
    node = int(number("gpus_per_node")) or 1
    return Hardware(
        name=row["device"],
        memory_bytes=round(number("hbm_GB", 1e9)),
        peak_flops={name: peak for name, peak in peaks.items() if peak},
        memory_bytes_per_s=number("hbm_GBps", 1e9),
        intra_name=row["intra_link"].split(" ")[0].split(",")[0].lower() or "intra",
        intra_bytes_per_s=number("intra_GBps_per_dir_per_gpu", 1e9),
        intra_latency_s=number("intra_latency_us") / 1e6 or INTRA_LATENCY_S,
        inter_bytes_per_s=number("inter_GBps_per_dir_per_gpu", 1e9),
        inter_latency_s=number("inter_latency_us") / 1e6 or INTER_LATENCY_S,
        domain_devices=int(number("scaleup_domain_gpus")) or node,
        node_devices=node,
        source=row["source"] or row["verified"],
    )


def find_hardware(name: str) -> Hardware:
    """The row of a device, case-blind, or of its short name. Raises UsageError with the nearest."""
    rows = {known.casefold(): row for known, row in hardware_rows().items()}
    key = ALIASES.get(name.casefold(), name).casefold()
    if key not in rows:
        known = [*ALIASES, *hardware_rows()]
        raise UsageError(
            f"no device '{name}'{did_you_mean(name, known)}; one that is no row takes the nearest row's "
            "name, and memory_bytes, peak_flops, memory_bytes_per_s and links of its own beside it",
            key="device",
        )
    return rows[key]

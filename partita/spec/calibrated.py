"""Rates of this machine in the place of the laptop preset's: what `partita calibrate` measured.

The verbs that read a job use them by one rule: a cluster whose rates are the laptop preset's, so that
nobody has stated others, takes the rates this host was last measured at. Devices, memory and limits stay
the job's. A job file travels; the rates of one machine do not.
"""

from __future__ import annotations

import hashlib
import os
import platform
from dataclasses import replace
from pathlib import Path

from partita.base.config import to_toml
from partita.spec.cluster import Cluster
from partita.spec.corrected import corrected

FOLDER = Path("~/.cache/partita/clusters")
PRESET = "laptop"
MEASURED = "pieces 2"  # what a calibration holds: another word where one of before would be misread


def calibration_path(base: Cluster, folder: Path = FOLDER) -> Path:
    """The calibrated cluster file of this host for a base cluster."""
    return folder.expanduser() / f"{host_digest(base)}.toml"


def host_digest(base: Cluster) -> str:
    """Names what a calibration is of: the host, its processors and torch, the cluster it is for, and what is
    measured."""
    from importlib.metadata import version

    import psutil  # here: most clusters are not this host

    facts = (
        platform.node(), platform.machine(), _processor(), str(psutil.cpu_count()),
        str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
        version("torch"), to_toml(base.to_toml()), MEASURED,
    )  # fmt: skip
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    lines = info.read_text(errors="replace").splitlines()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")


def calibrated(cluster: Cluster, folder: Path = FOLDER) -> Cluster:
    """The cluster with this host's measured rates, where it has the preset's and the host was measured; and
    with what plans took here at its rates (corrected.py), where any was run and it does not say itself."""
    base = Cluster.load(PRESET)
    if cluster.slower != 1.0:
        return cluster
    if _rates(cluster) == _rates(base) and (path := calibration_path(base, folder)).exists():
        cluster = adopt(cluster, Cluster.load(path))
    return corrected(cluster, folder)


def _rates(cluster: Cluster) -> tuple[object, ...]:
    links = [(x.bytes_per_s, x.latency_s) for x in cluster.links]
    rates = cluster.memory_bytes_per_s, cluster.cores_shared, links
    return cluster.device, dict(cluster.peak_flops), *rates


def adopt(base: Cluster, measured: Cluster) -> Cluster:
    """The base's devices, memory and limit with a calibrated cluster's rates."""
    links = tuple(replace(x, devices=base.devices) for x in measured.links[-1:])
    return replace(
        base,
        name=measured.name,
        peak_flops=measured.peak_flops,
        memory_bytes_per_s=measured.memory_bytes_per_s,
        cores_shared=measured.cores_shared,
        matmul_flops_per_s=measured.matmul_flops_per_s,
        piece_seconds=measured.piece_seconds,
        collective_seconds=measured.collective_seconds,
        crowding=measured.crowding,
        links=links if base.devices > 1 and links else base.links,
    )

"""What plans took on this machine beside what was predicted of them: `partita plan --measure` feeds it.

`partita calibrate` measures pieces of layers, collectives and memory alone. What it cannot see (a
system that wakes ranks late, other programs) makes all steps longer by much the
same factor. Plans that were run are kept in a file beside the calibration, never in it:

    slower = the factor on steps at the calibration's rates with the least mean |predicted / measured - 1|

over the plans that were run: their weighted median. Every time of a machine is then so many times longer
(`slowed`), so a predicted step is, and no choice between two plans changes. Rates measured anew have a file
of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from partita.base.config import decode, encode, load_json
from partita.base.errors import UsageError, WriteError
from partita.spec.cluster import Cluster

KEPT = 50  # plans, the last run of each
LEAST, MOST = 0.01, 100.0
RATES = (
    "device", "peak_flops", "memory_bytes_per_s", "cores_shared", "matmul_flops_per_s", "piece_seconds",
    "collective_seconds", "crowding",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanRun:
    """A plan that was run: seconds of a step at the calibration's rates, and as measured."""

    model: str
    plan: str
    seq_len: int
    global_batch_size: int
    predicted_s: float
    measured_s: float

    @property
    def what(self) -> tuple[object, ...]:
        """What was run."""
        return self.model, self.plan, self.seq_len, self.global_batch_size


@dataclass(frozen=True)
class _File:
    runs: tuple[PlanRun, ...] = ()


def runs_path(cluster: Cluster, folder: Path) -> Path:
    """The file of plans that were run at these rates, whatever the number of devices and their memory."""
    links = [(x.bytes_per_s, x.latency_s) for x in cluster.links[-1:]]
    stated = [(name, encode(getattr(cluster, name))) for name in RATES]
    digest = hashlib.sha256(str([*stated, links]).encode()).hexdigest()[:16]
    return folder.expanduser() / f"{digest}.runs.json"


def read_runs(path: Path) -> tuple[PlanRun, ...]:
    """The plans of a file; none where there is no file, or not one of ours."""
    try:
        return decode(_File, load_json(path)).runs if path.exists() else ()
    except UsageError:
        return ()


def slower_of(runs: Sequence[PlanRun]) -> float:
    """How many times longer than predicted plans took; 1 where none was run.

    >>> slower_of([PlanRun("m", str(i), 1, 1, 1.0, s) for i, s in enumerate((1.1, 1.2, 3.0))])
    1.2
    """
    ratios = sorted(
        r.measured_s / r.predicted_s for r in runs if min(r.predicted_s, r.measured_s) > 0
    )
    half, sum_ = sum(1 / r for r in ratios) / 2, 0.0
    for ratio in ratios:
        sum_ += 1 / ratio
        if sum_ >= half:
            return min(max(ratio, LEAST), MOST)
    return 1.0


def corrected(cluster: Cluster, folder: Path) -> Cluster:
    """The cluster with what plans took here, where any was run at its rates."""
    runs = read_runs(runs_path(cluster, folder)) if cluster.device == "CPU" else ()
    return replace(cluster, slower=slower_of(runs)) if runs else cluster


def learn(cluster: Cluster, runs: Sequence[PlanRun], folder: Path) -> tuple[Path, float]:
    """Keeps runs, the last one of each plan; the file, and what is `slower` now. Raises WriteError."""
    path = runs_path(cluster, folder)
    kept = {r.what: r for r in (*read_runs(path), *runs)}
    last = tuple(kept.values())[-KEPT:]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, {"runs": [encode(r) for r in last]})
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}", file=str(path)) from None
    return path, slower_of(last)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    import msgspec

    path.write_bytes(msgspec.json.format(msgspec.json.encode(document)))


def slowed(cluster: Cluster) -> Cluster:
    """The cluster whose every time is `slower` times longer."""
    by = cluster.slower
    if by == 1.0:
        return cluster

    def rates(known: Mapping[str, float]) -> dict[str, float]:
        return {name: rate / by for name, rate in known.items()}

    def seconds(
        known: Mapping[str, Mapping[str, Mapping[str, float]]],
    ) -> dict[str, dict[str, dict[str, float]]]:
        return {
            outer: {name: {size: s * by for size, s in sizes.items()} for name, sizes in x.items()}
            for outer, x in known.items()
        }

    pieces, collectives = cluster.piece_seconds, cluster.collective_seconds
    matmuls, host, disk = (
        cluster.matmul_flops_per_s,
        cluster.host_link_bytes_per_s,
        cluster.disk_bytes_per_s,
    )
    links = (
        replace(x, bytes_per_s=x.bytes_per_s / by, latency_s=x.latency_s * by)
        for x in cluster.links
    )
    return replace(
        cluster,
        slower=1.0,
        peak_flops=rates(cluster.peak_flops),
        memory_bytes_per_s=cluster.memory_bytes_per_s / by,
        matmul_flops_per_s=matmuls and {dtype: rates(x) for dtype, x in matmuls.items()},
        piece_seconds=pieces and seconds(pieces),
        collective_seconds=collectives and seconds(collectives),
        links=tuple(links),
        host_link_bytes_per_s=host and host / by,
        disk_bytes_per_s=disk and disk / by,
    )

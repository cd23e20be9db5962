"""What larger runs take longer: series of published rows that differ in devices and batch alone, measured
and predicted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import log, log2
from pathlib import Path
from statistics import fmean, median

from partita.simulate.published.validate import CONFIGURATION, read_rows

GROWING = ("n_gpus", "global_batch", "dp", "zero_or_fsdp")
LEAST = 3  # rows that are a series
Point = tuple[
    float, float, float
]  # log2 of the devices, log of what was measured, of what was predicted


def series(
    table: Path, found: Mapping[str, tuple[float, float]]
) -> dict[tuple[str, ...], list[Point]]:
    """Group and what stays equal -> its rows. `found`: seconds predicted and measured, by id."""
    known: dict[tuple[str, ...], list[Point]] = defaultdict(list)
    for row in read_rows(table):
        if row["id"] not in found:
            continue
        devices = int(row["n_gpus"])
        share = f"{float(row['global_batch'] or 0) / devices:.6g}"
        same = (row[c] for c in CONFIGURATION if c not in GROWING)
        predicted, measured = found[row["id"]]
        known[(row["group"], *same, share)].append((log2(devices), log(measured), log(predicted)))
    return {k: v for k, v in known.items() if len({x for x, *_ in v}) >= LEAST}


def slope(points: list[Point], which: int) -> float:
    """Of what stands at `which`, a doubling of the devices (least squares)."""
    mid, level = fmean(p[0] for p in points), fmean(p[which] for p in points)
    over = sum((p[0] - mid) * (p[which] - level) for p in points)
    return over / sum((p[0] - mid) ** 2 for p in points)


def scaling_lines(table: Path, found: Mapping[str, tuple[float, float]]) -> list[str]:
    """A line a group with such series: how many, from and to how many devices, and the middle slope of what
    was measured and of what was predicted."""
    by_group: dict[str, list[list[Point]]] = defaultdict(list)
    for (group, *_), points in series(table, found).items():
        by_group[group].append(points)
    lines = [
        "| group | series | devices | measured, a doubling | predicted |",
        "|---|--:|--:|--:|--:|",
    ]
    for group, own in sorted(by_group.items()):
        ends = [round(2 ** f(x for points in own for x, *_ in points)) for f in (min, max)]
        middle = [f"{median(slope(p, i) for p in own):+.1%}" for i in (1, 2)]
        lines.append(f"| {group} | {len(own)} | {ends[0]} to {ends[1]} | {' | '.join(middle)} |")
    every = [p for own in by_group.values() for p in own]
    middle = [f"{median(slope(p, i) for p in every):+.1%}" for i in (1, 2)]
    lines.append(f"| all | {len(every)} | | {' | '.join(middle)} |")
    return lines

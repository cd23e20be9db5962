"""The collective model beside nccl-tests: lines of a table by device and number of ranks."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from partita.cost.comm import AlphaBeta, Group, group_seconds
from partita.cost.machine import constants_of, device_class
from partita.spec.hardware import find_hardware

DEVICES = {"V100": "V100-32GB"}


def predicted_seconds(row: dict[str, str]) -> float:
    """Seconds of one measured all-reduce inside a node."""
    device = DEVICES.get(row["device"], row["device"])
    hardware = find_hardware(device)
    fraction = constants_of(device_class(device)).inner
    link = AlphaBeta(hardware.intra_latency_s, hardware.intra_bytes_per_s * fraction)
    group = Group(int(row["n_gpus"]), 1, link, link)
    return group_seconds("all_reduce", group, float(row["message_bytes"]))


def errors(path: Path) -> dict[tuple[str, int], list[float]]:
    """Relative errors by device and ranks, of the rows that are times."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["quantity"] == "time_us":
                seconds = float(row["value"]) * 1e-6
                key = row["device"], int(row["n_gpus"])
                found[key].append(predicted_seconds(row) / seconds - 1)
    return found


def collective_lines(path: Path) -> list[str]:
    """A table: mean absolute and signed error of all-reduces of 1 MB to 1 GB."""
    lines = ["| device | ranks | n | mean error | mean signed |", "|---|--:|--:|--:|--:|"]
    for (device, ranks), own in sorted(errors(path).items()):
        mean = sum(map(abs, own)) / len(own)
        signed = sum(own) / len(own)
        lines.append(f"| {device} | {ranks} | {len(own)} | {mean:.1%} | {signed:+.1%} |")
    return [
        "All-reduces inside one node (nccl-tests, 1 MB to 1 GB). V100 nodes of this source are a hybrid cube "
        "mesh, where odd numbers of ranks share links: the model knows switched nodes only.", "", *lines,
    ]  # fmt: skip

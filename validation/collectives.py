"""The collective model beside nccl-tests: lines of a table by device and number of ranks."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from partita.cost.comm import AlphaBeta, Group, group_seconds
from partita.cost.machine import constants_of, device_class
from partita.spec.hardware import find_hardware, share_of_links

SAYS = """All-reduces inside one node (nccl-tests, 1 MiB to 1 GiB). The constant of the inner link
is fitted on step times, not here; FILL, BASE and HOP on the A100's rows. A device of the V100 nodes
(a DGX-1's hybrid cube mesh) can use its lanes to the other ranks alone (`share_of_links` of
partita/spec/hardware.py): that says why 2 ranks reach a sixth of what 8 do; what is left is the
fraction (these links reach 0.9 of their rate, a ring of two as much as one of eight) and 6 ranks,
which two rings serve where the lanes would let three."""
SIZES = {"to 8 MiB": (0, 2**23 + 1), "16 MiB and more": (2**23 + 1, 2**40)}
DEVICES = {"V100": "V100-16GB"}  # of a DGX-1: no switch (vTrain's nodes; hardware.csv)


def predicted_seconds(row: dict[str, str]) -> float:
    """Seconds of one measured all-reduce inside a node."""
    device = DEVICES.get(row["device"], row["device"])
    hardware = find_hardware(device)
    fraction = constants_of(device_class(device)).inner
    ranks = int(row["n_gpus"])
    rate = hardware.intra_bytes_per_s * share_of_links(device, tuple(range(ranks))) * fraction
    link = AlphaBeta(hardware.intra_latency_s, rate)
    group = Group(ranks, 1, link, link)
    return group_seconds("all_reduce", group, float(row["message_bytes"]))


def errors(path: Path) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """Sizes and relative errors by device and ranks, of the rows that are times."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["quantity"] == "time_us":
                error = predicted_seconds(row) / (float(row["value"]) * 1e-6) - 1
                key = row["device"], int(row["n_gpus"])
                found[key].append((int(row["message_bytes"]), error))
    return found


def collective_lines(path: Path) -> list[str]:
    """A table: mean absolute and signed error of all-reduces of 1 MB to 1 GB, small and large ones apart."""
    head = [
        "device",
        "ranks",
        "n",
        "mean error",
        *(f"signed, {name}" for name in SIZES),
        "largest at",
    ]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    every: dict[str, list[float]] = defaultdict(list)
    for (device, ranks), own in sorted(errors(path).items()):
        every[device] += [abs(e) for _, e in own]
        worst = max(own, key=lambda x: abs(x[1]))
        signed = [fmean(e for size, e in own if low <= size < high) for low, high in SIZES.values()]
        shown = [f"{ranks}", f"{len(own)}", f"{fmean(abs(e) for _, e in own):.1%}"]
        shown += [f"{x:+.1%}" for x in signed]
        lines.append(
            f"| {device} | {' | '.join(shown)} | {worst[0] / 2**20:.0f} MiB {worst[1]:+.1%} |"
        )
    means = ", ".join(f"{device} {fmean(e):.1%}" for device, e in every.items())
    return [f"{SAYS} Mean error: {means}.", "", *lines]

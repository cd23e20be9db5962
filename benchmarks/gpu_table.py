"""The lines of `benchmarks.gpu`."""

from __future__ import annotations

from typing import Any

HEADER = (
    "row",
    "side",
    "step ms",
    "quartiles",
    "n",
    "peak GB",
    "tok/s",
    "MFU",
    "of matmul",
    "note",
)
Found = dict[str, Any]


def lines_of(found: Found) -> list[list[str]]:
    """The table's."""
    made = []
    for name, row in found["rows"].items():
        if "failed" in row:
            made.append([name, *[""] * 8, row["failed"]])
        for side, one in row.get("sides", {}).items():
            made.append([name, side, *_figures(one)])
        for side, one in row.get("traces", {}).items():
            made.append([name, side, *_traced(one)])
        for pair, one in row.get("candidates", {}).items():
            made.append([name, pair, *_candidate(one)])
        for plan, by in row.get("predicted", {}).items():
            made += [[name, f"{plan}, {which}", *_predicted(one)] for which, one in by.items()]
        if "calibration_failed" in row:
            made.append([name, "calibrate", *[""] * 7, row["calibration_failed"]])
        if "bf16_flops_per_s" in row:
            made.append([name, "", *[""] * 7, _rates(row)])
    return made


def _figures(one: Found) -> list[str]:
    if "failed" in one:
        return [""] * 7 + [one["failed"]]
    low, high = one["quartiles_s"]
    notes = {"update_s": "update {:.3f} s", "of_pinned_copy": "{:.2f} of a pinned copy"}
    return [
        f"{1e3 * one['step_s']:.1f}", f"{1e3 * low:.1f}-{1e3 * high:.1f}", str(one["steps"]),
        f"{one['peak_bytes'] / 1e9:.1f}", f"{one['tokens_per_s']:.0f}", f"{one['mfu']:.3f}",
        f"{one['of_matmul']:.3f}" if "of_matmul" in one else "",
        ", ".join(text.format(one[key]) for key, text in notes.items() if key in one),
    ]  # fmt: skip


def _traced(one: Found) -> list[str]:
    if "failed" in one:
        return [""] * 7 + [one["failed"]]
    kinds = " ".join(f"{kind} {1e3 * s:.1f}" for kind, s in one["kinds_s"].items())
    waits = sum(one["waits"].values())
    note = f"idle {one['idle_share']:.1%}; {one['launches']} kernels, {waits} waits; ms: {kinds}"
    return [f"{1e3 * one['step_s']:.1f}", *[""] * 6, note]


def _candidate(one: Found) -> list[str]:
    if "failed" in one:
        return [""] * 7 + [one["failed"]]
    note = f"now; {1e3 * one['then_s']:.3f} ms the other, {one['apart']:.1e} apart"
    return [f"{1e3 * one['now_s']:.3f}", *[""] * 6, note]


def _predicted(one: Found) -> list[str]:
    if "failed" in one:
        return [""] * 7 + [one["failed"]]
    peak = "" if one["peak_ratio"] is None else f", memory {one['peak_ratio']:.2f}"
    said = f"predicted / measured: step {one['step_ratio']:.2f}{peak}"
    return [
        f"{1e3 * one['step_s']:.1f}",
        "",
        "",
        f"{one['peak_bytes'] / 1e9:.1f}",
        "",
        "",
        "",
        said,
    ]


def _rates(row: Found) -> str:
    fp8 = f"{row['fp8_flops_per_s'] / 1e12:.0f}" if "fp8_flops_per_s" in row else row["fp8_failed"]
    return (
        f"TFLOP/s bf16 {row['bf16_flops_per_s'] / 1e12:.0f}, fp8 {fp8}; GB/s memory "
        f"{row['memory_bytes_per_s'] / 1e9:.0f}, up {row['to_device_bytes_per_s'] / 1e9:.1f}, down "
        f"{row['to_host_bytes_per_s'] / 1e9:.1f}"
    )


def markdown(found: Found) -> str:
    """Device and table, for docs/benchmarks.md."""
    rows = [list(HEADER), ["---"] * len(HEADER), *lines_of(found)]
    return "\n".join([str(found["device"]), "", *(f"| {' | '.join(r)} |" for r in rows), ""])

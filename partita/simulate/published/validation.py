"""What `partita validate` answers: lines by group and metric, rows, reasons, constants."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from partita.cost import empirical, machine
from partita.cost.machine import constants_of, device_class, facts, software_of, table
from partita.simulate.published.cells import Row
from partita.simulate.published.memory import BUBBLE, other_lines, other_rows
from partita.simulate.published.validate import (
    SAME,
    Scored,
    Skip,
    mape,
    read_rows,
    reasons,
    score,
    summary,
)

LEFT_OUT = machine.FILE.parent / "constants_left_out.toml"


@dataclass(frozen=True)
class Validation:
    """Everything found about a table."""

    groups: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    skipped: dict[str, int]
    not_predicted: dict[str, list[str]]  # by reason the ids; not of those that another row tells
    calibration: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The document of `validate --json`."""
        return {
            "groups": self.groups,
            "skipped": self.skipped,
            "not_predicted": self.not_predicted,
            "calibration": self.calibration,
        }


def validation(path: Path) -> Validation:
    """Predicts the rows of a table. Raises UsageError for a file that is none."""
    rows = read_rows(path)
    scored, skipped = score(rows)
    others, without = other_rows(rows)
    lines = summary(scored, _left_out(rows, scored))
    for line in lines:
        line["source_left_out_mape"] = _source_left_out(rows, line["group"])
    lines += other_lines(others, _bubbles_left_out(rows, others))
    out = [
        {"id": s.row["id"], "predicted": s.predicted_s, "measured": s.measured_s, "error": s.error}
        for s in scored
    ] + [{k: row[k] for k in ("id", "predicted", "measured", "error")} for row in others]
    skipped_rows = [*skipped, *(Skip(row, reason) for row, reason in without)]
    ids: dict[str, list[str]] = {}
    for skip in skipped_rows:
        if skip.reason != SAME:
            ids.setdefault(skip.reason, []).append(skip.row["id"])
    return Validation(lines, out, reasons(skipped_rows), ids, _calibration(scored, skipped))


@cache
def left_out_constants() -> dict[str, Any]:
    """group -> the constants that a fit without it changes."""
    return tomllib.loads(LEFT_OUT.read_text(encoding="utf-8")) if LEFT_OUT.is_file() else {}


def merged(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constants with some changed."""
    base = table()
    return {
        kind: {n: {**base[kind].get(n, {}), **changes.get(kind, {}).get(n, {})} for n in base[kind]}
        for kind in ("device", "software")
    }


def _left_out(rows: list[dict[str, str]], scored: list[Scored]) -> dict[str, float | None]:
    """Errors of each group with the constants that were fitted without it. A group that no fit saw has
    one error, in and out."""
    known, found = left_out_constants(), {}
    for group in {s.row["group"] for s in scored}:
        own: list[Row] = [r for r in rows if r["group"] == group]
        if group in known:
            found[group] = mape(score(own, merged(known[group]))[0])
        else:
            found[group] = mape([s for s in scored if s.row["group"] == group])
    return found


def _source_left_out(rows: list[dict[str, str]], group: str) -> float | None:
    """The error of a group with constants that were fitted without all groups of its source; None where it is
    alone, or no fit saw it."""
    source = f"{group.partition('-')[0]}-*"
    known = left_out_constants()
    if source not in known or group not in known:
        return None
    own = [r for r in rows if r["group"] == group]
    return mape(score(own, merged(known[source]))[0])


def _bubbles_left_out(rows: list[dict[str, str]], others: list[dict[str, Any]]) -> dict[str, float]:
    """Errors of bubbles as `_left_out` has those of step times."""
    known, found = left_out_constants(), {}
    for group in {row["group"] for row in others if row["metric"] == BUBBLE}:
        own = [row for row in others if (row["group"], row["metric"]) == (group, BUBBLE)]
        if group in known:
            mine = [r for r in rows if (r["group"], r["metric"]) == (group, BUBBLE)]
            own, _ = other_rows(mine, merged(known[group]))
        found[group] = sum(abs(row["error"]) for row in own) / len(own)
    return found


def _calibration(scored: list[Scored], skipped: list[Skip]) -> dict[str, Any]:
    """Every constant that took part: of devices, of software eras with their facts, and of all."""
    classes = sorted({device_class(s.case.cluster.device) for s in scored})
    eras = sorted({s.case.software for s in scored})
    names = constants_of("GPU").__dataclass_fields__
    return {
        "device": {c: {n: getattr(constants_of(c), n) for n in names} for c in classes},
        "software": {e: _era(e) for e in eras},
        "common": {name: value for name, (value, *_) in empirical.told().items()},
        "fitted_on": table().get("fitted_on", {}),
        "not_predicted_step_time_rows": sum(s.reason != SAME for s in skipped),
    }


def _era(name: str) -> dict[str, Any]:
    """An era's numbers, two at most that are its own, and its facts."""
    era = software_of(name)
    found = {**facts()[name], "flash": era.flash, "host_s": era.host_s, "experts": era.experts}
    return {**found, "restart": era.restart} if era.syncs_host else found

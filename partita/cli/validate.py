"""`partita validate`: holds the simulator against published measurements."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.base.text import table
from partita.cli.jobs import Json
from partita.cli.out import hold_place, waiting, write_file, write_json, write_text

Validated = Annotated[Path, typer.Argument(metavar="FILE.csv", help="A table of published runs.")]
Rows = Annotated[
    Path | None, typer.Option("--rows", help="Write a CSV: id, predicted, measured, error.")
]


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("validate", help=validate.__doc__)(validate)


def validate(file: Validated, rows: Rows = None, json: Json = False) -> None:
    """Errors of predicted step times, memory and bubbles by group, with every fitted constant."""
    hold_place(rows)
    from partita.simulate.published.validation import validation

    with waiting(f"validate  predicting the rows of {file}", quiet=json):
        found = validation(file)
    if rows is not None:
        write_file(rows, _csv(found.rows))
    if json:
        write_json(found.to_json())
    else:
        write_text(_text(found.to_json()))


def _csv(rows: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "predicted", "measured", "error"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _text(document: dict[str, Any]) -> str:
    columns = ("mape", "median", "max", "baseline_mape", "left_out_mape")
    lines = [["group", "metric", "n", *columns]]
    for g in document["groups"]:
        shown = ["" if g[c] is None else f"{g[c]:.1%}" for c in columns]
        lines.append([g["group"], g["metric"], str(g["n"]), *shown])
    skipped = [
        [f"{n}", reason, _few(document["not_predicted"].get(reason, []))]
        for reason, n in document["skipped"].items()
    ]
    parts = [table(lines), "not predicted\n" + table(skipped) if skipped else ""]
    for kind, members in document["calibration"].items():
        if isinstance(members, dict):
            rows = [[name, _values(v)] for name, v in members.items()]
            parts.append(f"{kind}\n" + table(rows))
    return "\n\n".join(p for p in parts if p)


def _few(ids: list[str]) -> str:
    """The first of some rows."""
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def _values(v: Any) -> str:
    if not isinstance(v, dict):
        return str(v)
    return " ".join(f"{k}={x:.4g}" if isinstance(x, float) else f"{k}={x}" for k, x in v.items())

"""`partita report`: one page of what was predicted beside what happened."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partita.cli.out import write_json, write_text


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("report", help=report.__doc__)(report)


def report(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A run's folder: runs/<name>.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; RUN_DIR/report.html unless stated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Predicted beside measured: timeline, memory, traffic, loss."""
    from partita.report.make import write_report
    from partita.report.summary import read_run

    run = read_run(run_dir)
    path = write_report(run, out or run_dir / "report.html")
    if json:
        write_json({**run.to_json(), "report": str(path)})
    else:
        write_text(f"wrote {path}")

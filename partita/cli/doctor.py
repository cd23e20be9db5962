"""`partita doctor`: preflight on the real ranks."""

from __future__ import annotations

from typing import Annotated

import typer

from partita.cli.jobs import Json, Overrides, PlanLine, load
from partita.cli.out import note, write_json, write_text
from partita.comm.processes import torchrun_rank


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("doctor", help=doctor.__doc__)(doctor)


def doctor(
    job: Annotated[
        str | None,
        typer.Argument(metavar="[JOB.toml]", help="The job; without one, ranks of this machine."),
    ] = None,
    overrides: Overrides = None,
    plan: PlanLine = None,
    json: Json = False,
) -> None:
    """Preflight on the real ranks: versions, clocks, disk, memory, compute, links, collectives."""
    from partita.tune.doctor import doctor as examine
    from partita.tune.doctor import this_machine

    found = examine(this_machine() if job is None else load(job, overrides, plan, json))
    rank = torchrun_rank()
    if rank is None or rank[0] == 0:
        if json:
            write_json(found.to_json())
        else:
            write_text(str(found))
        if not found.ok:
            first = next(c for c in found.checks if not c.ok)
            where = "" if first.rank is None else f" (rank {first.rank})"
            note(f"partita: {first.name}{where}: {first.message}")
    if not found.ok:
        raise typer.Exit(1)

"""`partita verify`: proves a job's plan equal to one device."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from partita.cli.jobs import JobFile, Json, Overrides, PlanLine, load
from partita.cli.out import note, waiting, write_json, write_text


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("verify", help=verify.__doc__)(verify)


def verify(
    job: JobFile,
    overrides: Overrides = None,
    plan: PlanLine = None,
    backend: Annotated[
        Literal["local", "shm", "gloo", "nccl"],
        typer.Option(help="Threads, shared memory, sockets, or GPUs."),
    ] = "local",
    json: Json = False,
) -> None:
    """Proves a job's plan equal to one device."""
    loaded = load(job, overrides, plan, json)
    from partita.verify.parity import verify as prove

    with waiting(f"verify  {loaded.plan}", quiet=json) as tell:
        found = prove(loaded, backend=backend, tell=tell)
    if json:
        write_json(found.to_json())
    else:
        write_text(str(found))
    if not found.equal:
        note(f"partita: {str(found).splitlines()[-1]}")
        raise typer.Exit(1)

"""`partita launch slurm|kubernetes|ray JOB.toml`: writes what starts the job there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from partita.base.errors import PlanError
from partita.cli.jobs import JobFile, Json, Overrides, PlanLine, load
from partita.cli.out import note, write_json, write_text

Where = Annotated[str, typer.Argument(metavar="slurm|kubernetes|ray", help="What starts it.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A setting (python, port, restarts, grace_s; time and any option of sbatch; image, claim, "
        "mount, memory, ...; address), as often as wanted.",
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("launch", help=launch.__doc__)(launch)


def launch(
    where: Where,
    job: JobFile,
    overrides: Overrides = None,
    plan: PlanLine = None,
    settings: Set = None,
    out: Annotated[Path | None, typer.Option(help="A file, instead of stdout.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write a plan that is predicted not to fit.")
    ] = False,
    json: Json = False,
) -> None:
    """Writes what starts a job on Slurm, Kubernetes or Ray."""
    from partita.launch.launch import Launch, text
    from partita.planner.answers.judge import fit_error, judged

    loaded = load(job, overrides, plan, json)
    prediction = judged(loaded)
    if any(p.severity == "error" for p in prediction.problems):
        raise PlanError(f"{loaded.plan} cannot run {loaded.name}", prediction.problems)
    if not prediction.fits and not force:
        raise fit_error(loaded, prediction)
    made = Launch.of(loaded, job, overrides or ())
    written = text(made, where, settings or (), Path.cwd())
    if out is not None:
        out.write_text(written)
        note(f"{out}: {made.hosts} hosts of {made.ranks} ranks, {loaded.plan}")
    if json:
        document = {"text": written, "hosts": made.hosts, "ranks_per_host": made.ranks}
        write_json({**document, "plan": str(loaded.plan)})
    elif out is None:
        write_text(written)

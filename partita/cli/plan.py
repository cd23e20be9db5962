"""`partita plan`: judges a plan for a model on a cluster, and says what close by would fit."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from partita.base.errors import UsageError
from partita.cli.jobs import Json, PlanLine, from_words
from partita.cli.out import write_json, write_text
from partita.planner.judge import fit_error
from partita.simulate.predict import Prediction, simulate


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("plan", help=plan.__doc__)(plan)


def plan(
    words: Annotated[list[str], typer.Argument(metavar="JOB.toml | MODEL CLUSTER")],
    line: PlanLine = None,
    global_batch_size: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Sequences a microbatch and rank.")
    ] = None,
    json: Json = False,
) -> None:
    """Judges a plan for a model on a cluster."""
    if line is None and not words[0].endswith(".toml"):
        raise UsageError(
            'which plan? e.g. --plan "pp4:1f1b/8mb tp8+sp bf16" (a search is not available in this version)'
        )
    start = time.perf_counter()
    batch = {
        "global_batch_size": global_batch_size,
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
    }
    job = from_words(words, line, batch)
    found = simulate(job)
    illegal = any(p.severity == "error" for p in found.problems)
    why = [] if found.fits else _why(job, found, illegal)
    if json:
        write_json(_document(found, why, time.perf_counter() - start))
    else:
        write_text("\n".join([str(found), *why]))
    if not found.fits:
        raise typer.Exit(1)


def _why(job: Any, found: Prediction, illegal: bool) -> list[str]:
    if not illegal:
        return str(fit_error(job, found)).splitlines()
    return [
        f"{p.room} {p.rule}: {p.message}" + (f"; e.g. {p.nearest}" if p.nearest else "")
        for p in found.problems
    ]


def _document(found: Prediction, why: list[str], seconds: float) -> dict[str, Any]:
    return {
        "plans": [{**found.to_json(), "why": why}],
        "considered": 1,
        "rejected": {}
        if found.fits
        else {found.problems[0].rule if found.problems else "memory": 1},
        "bounded": 0,
        "complete": True,
        "seconds": seconds,
    }

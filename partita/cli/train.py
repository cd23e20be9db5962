"""`partita train`: trains a job over its ranks; resumes by itself."""

from __future__ import annotations

from typing import Annotated

import typer

from partita.base.text import printable
from partita.cli.jobs import JobFile, Json, Overrides, PlanLine, load
from partita.cli.out import note, write_json, write_text


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("train", help=train.__doc__)(train)


def train(
    context: typer.Context,
    job: JobFile,
    overrides: Overrides = None,
    plan: PlanLine = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run a plan that is predicted not to fit.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new run folder.")] = False,
    allow_fallback: Annotated[
        bool,
        typer.Option(
            "--allow-fallback", help="Resume from an older checkpoint if the newest is bad."
        ),
    ] = False,
    no_preflight: Annotated[
        bool, typer.Option("--no-preflight", help="Do not look at the ranks as they begin.")
    ] = False,
    json: Json = False,
) -> None:
    """Trains a job over its ranks."""
    loaded = load(job, overrides, plan, json)
    from partita.train.launch.launcher import train as run

    metrics = run(
        loaded, force=force, fresh=fresh, allow_fallback=allow_fallback, preflight=not no_preflight,
        line=context.obj,
    )  # fmt: skip
    if not metrics:  # one of torchrun's ranks: rank 0 speaks for all
        return
    if metrics.get("already_done"):
        plan = metrics["plan"]
        note(
            f"{metrics['run']} is finished: step {metrics['step']}, trained under {plan}; --fresh starts anew"
        )
    if json:
        write_json(metrics)
        return
    write_text(_summary(metrics))


def _summary(metrics: dict[str, object]) -> str:
    lines = [f"trained  {metrics['run']}  plan {metrics['plan']}  step {metrics['step']}"]
    if metrics.get("loss") is not None:
        lines.append(f"loss     {metrics['loss']:.4f}")
    held, unigram = metrics.get("eval_loss"), metrics.get("unigram_entropy")
    if isinstance(held, float) and isinstance(unigram, float):
        side = "below" if held < unigram else "above"
        lines.append(
            f"held out {held:.4f} nats a token, {abs(unigram - held):.4f} {side} the unigram entropy "
            f"({unigram:.4f})"
        )
    if metrics.get("sample"):
        lines += ["", "what it writes:", printable(str(metrics["sample"]))]
    return "\n".join(lines)

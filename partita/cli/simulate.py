"""`partita simulate`: predicted time, memory and traffic, before anything runs."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated

import typer

from partita.cli.jobs import Json, PlanLine, from_words, with_auto
from partita.cli.out import note, write_file, write_json, write_text


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("simulate", help=simulate.__doc__)(simulate)


def simulate(
    words: Annotated[list[str], typer.Argument(metavar="JOB.toml | MODEL CLUSTER")],
    plan: PlanLine = None,
    global_batch_size: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Sequences a microbatch and rank.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the timeline as one page.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto/Chrome trace.")] = None,
    json: Json = False,
) -> None:
    """Predicted time, memory and traffic of a job."""
    from partita.planner.judge import judged, would_be_legal

    batch = {
        "global_batch_size": global_batch_size,
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
    }
    prediction = judged(with_auto(from_words(words, plan, batch)))
    if html is not None:
        from partita.plots import timeline

        write_file(
            html, timeline.html({prediction.plan: list(prediction.spans)}, title=prediction.plan)
        )
    if trace is not None:
        from partita.plots.trace import chrome_trace

        write_file(trace, json_text.dumps(chrome_trace(prediction.spans)))
    if json:
        write_json(prediction.to_json())
    else:
        write_text("\n".join([str(prediction), *would_be_legal(prediction)]))
    if not prediction.fits:
        note(f"partita: {prediction.verdict}")
        raise typer.Exit(1)

"""`partita simulate`: predicted time, memory and traffic, before anything runs."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from partita.cli.jobs import (
    GlobalBatchSize,
    Json,
    MicroBatchSize,
    PlanLine,
    SeqLen,
    Words,
    from_words,
    with_auto,
)
from partita.cli.out import note, write_file, write_json, write_text

if TYPE_CHECKING:
    from partita.record.run import RankRecord
    from partita.simulate.predict import Prediction


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("simulate", help=simulate.__doc__)(simulate)


def simulate(
    words: Words,
    plan: PlanLine = None,
    global_batch_size: GlobalBatchSize = None,
    seq_len: SeqLen = None,
    micro_batch_size: MicroBatchSize = None,
    routing: Annotated[
        str | None,
        typer.Option(help="What experts get: balanced, zipf:EXPONENT or counts:FILE (JSON list)."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write timeline and memory as one page.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto/Chrome trace.")] = None,
    json: Json = False,
) -> None:
    """Predicted time, memory and traffic of a job."""
    from partita.planner.answers.judge import judged, would_be_legal
    from partita.simulate.imbalance import Load

    batch = {
        "global_batch_size": global_batch_size,
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
    }
    job = with_auto(from_words(words, plan, batch), json)
    load = Load.parse(routing, job.model.experts) if routing else None
    prediction = judged(job, load)
    if html is not None:
        from partita.plots import timeline

        spans = {prediction.plan: list(prediction.spans)}
        curves = [[(t, b / 1e9) for t, b in r.held] for r in _records(prediction)]
        page = timeline.html(spans, prediction.plan, {prediction.plan: curves}, " GB", True)
        write_file(html, page)
    if trace is not None:
        from partita.record.run import chrome_trace

        write_file(trace, json_text.dumps(chrome_trace(_records(prediction), ())))
    if json:
        write_json(prediction.to_json())
    else:
        write_text("\n".join([str(prediction), *would_be_legal(prediction)]))
    if not prediction.fits:
        note(f"partita: {prediction.verdict}")
        raise typer.Exit(1)


def _records(prediction: Prediction) -> tuple[RankRecord, ...]:
    """One rank of each place of pp; none of an illegal plan."""
    from partita.simulate.forecast import first_ranks, forecast

    ranks = first_ranks(prediction)
    return forecast(prediction, ranks).ranks if ranks else ()

"""`partita plan`: searches for the best plan of a model on a cluster, or judges one."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from partita.cli.jobs import Json, PlanLine, Words, from_words
from partita.cli.out import hold_place, note, write_file, write_json, write_text
from partita.planner.judge import fit_error, judged, would_be_legal
from partita.simulate.predict import Prediction
from partita.spec.job import Job

if TYPE_CHECKING:
    from partita.planner.ask import Answer


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("plan", help=plan.__doc__)(plan)


def plan(
    words: Words,
    line: PlanLine = None,
    global_batch_size: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens a sequence; 1 of images.")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Sequences a microbatch and replica.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Plans in the answer.")] = 5,
    goal: Annotated[str, typer.Option(help="time, memory, devices, cost.")] = "time",
    fix: Annotated[list[str] | None, typer.Option(help="What the plan must have: tp8.")] = None,
    forbid: Annotated[list[str] | None, typer.Option(help="What it must not: cp.")] = None,
    precision: Annotated[str, typer.Option(help="To choose from: bf16,fp8.")] = "",
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds the search may take.")] = 60.0,
    pareto: Annotated[str | None, typer.Option(help="A front of two goals: time,memory.")] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            help="Smallest or biggest that fits: devices, seq_len, global_batch_size, layers."
        ),
    ] = None,
    measure: Annotated[
        int, typer.Option(min=0, help="Run so many of the best plans on this machine.")
    ] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the plans as one page.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the job with its plan.")] = None,
    json: Json = False,
) -> None:
    """Searches for the best plan of a model on a cluster; with --plan judges that one."""
    batch = {
        "global_batch_size": global_batch_size,
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
    }
    job = from_words(words, line, batch)
    if line is not None:
        _judge(job, json)
        return
    hold_place(html)
    hold_place(save)
    from partita.planner.ask import (
        Question,
        ask,
    )  # a plan of the user's is judged without the search

    words_of = (tuple(fix or ()), tuple(forbid or ()))
    dtypes = tuple(filter(None, precision.split(",")))
    question = Question(goal, top, *words_of, budget, pareto or "", solve or "", dtypes)
    answer = ask(job, question)
    if measure and answer.plans:
        answer = _measured(job, answer, measure)
    if save is not None and answer.plans and not solve:
        write_file(save, job.with_plan(answer.plans[0].plan).to_toml())
    if html is not None and answer.plans:
        write_file(html, _page(job, answer))
    _tell(answer, json)
    if not answer.plans:
        note(f"partita: {next(iter(answer.texts), 'no plan fits')}")
        raise typer.Exit(1)


def _measured(job: Job, answer: Answer, count: int) -> Answer:
    """The best plans run, and the fastest of them first; the others follow as they were."""
    from partita.tune.measure import compared, feed, measure, others
    from partita.tune.others import busy_machine

    found = measure(job, answer.plans[:count])
    note(compared(found))
    note(feed(job, found))
    ran = {m.prediction.plan: (m.step_time_s, m.peak_bytes) for m in found}
    plans = (*(m.prediction for m in found), *answer.plans[count:])
    taken = others(found)
    texts = [text] if (text := busy_machine(taken or 0.0)) else []
    return replace(answer, plans=plans, measured=ran, others=taken, texts=(*answer.texts, *texts))


def _page(job: Job, answer: Answer) -> str:
    from partita.planner.answer import counts
    from partita.plots.plans import plans_page

    model, cluster = job.model.name, job.cluster.name
    title = f"{model} on {cluster}" if model and cluster else job.name
    return plans_page(
        title, counts(answer.found), answer.plans, {answer.plans[0].plan: answer.texts}
    )


def _tell(answer: Answer, json: bool) -> None:
    from partita.planner.answer import counts, document, ranked

    if json:
        write_json(document(answer))
        return
    lines = [ranked(answer.plans)] if answer.plans else []
    lines += [answer.solved.text] if answer.solved else [counts(answer.found)]
    write_text("\n".join([*lines, *answer.texts]))


def _judge(job: Job, json: bool) -> None:
    """One plan of the user's."""
    start = time.perf_counter()
    found = judged(job)
    illegal = any(p.severity == "error" for p in found.problems)
    why = _why(job, found, illegal)
    if json:
        write_json(_document(found, why, time.perf_counter() - start))
    else:
        text = str(found) if illegal or found.fits else found.head()  # else `why` has the ledger
        write_text("\n".join([text, *why]))
    if not found.fits:
        note(f"partita: {found.verdict}")
        raise typer.Exit(1)


def _why(job: Job, found: Prediction, illegal: bool) -> list[str]:
    if illegal:
        return would_be_legal(found)
    if not found.fits:
        return str(fit_error(job, found)).splitlines()
    from partita.planner.explain import beside

    return beside(job, found)


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

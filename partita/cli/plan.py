"""`partita plan`: searches for the best plan of a model on a cluster, or judges one."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from partita.base.errors import UsageError
from partita.cli.jobs import (
    GlobalBatchSize,
    Json,
    MicroBatchSize,
    PlanLine,
    SeqLen,
    Words,
    from_words,
)
from partita.cli.out import hold_place, note, waiting, write_file, write_json, write_text
from partita.cli.plan_serve import ServeOptions, answer_of_server, hold_apart
from partita.planner.answers.judge import fit_error, judged, would_be_legal
from partita.simulate.predict import Prediction
from partita.spec.job import Job

if TYPE_CHECKING:
    from partita.planner.answers.ask import Answer

OF_SEARCH = ("solve", "pareto", "fix", "forbid", "precision", "survive")


@dataclass(frozen=True)
class Files:
    """Where the page and the job with its plan go; None: nowhere."""

    html: Path | None = None
    save: Path | None = None


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("plan", help=plan.__doc__)(plan)


def plan(
    words: Words,
    line: PlanLine = None,
    global_batch_size: GlobalBatchSize = None,
    seq_len: SeqLen = None,
    micro_batch_size: MicroBatchSize = None,
    top: Annotated[int, typer.Option(min=1, help="Plans in the answer.")] = 5,
    goal: Annotated[
        str, typer.Option(help="time, memory, devices, cost; served: throughput, latency.")
    ] = "time",
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
    survive: Annotated[
        int, typer.Option(min=0, help="Losses of a node (or a device) to have a plan for each.")
    ] = 0,
    serve: Annotated[bool, typer.Option("--serve", help="A plan to serve, not to train.")] = False,
    prompt_len: Annotated[
        int | None, typer.Option(min=1, help="Served: tokens of a prompt.")
    ] = None,
    output_len: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    max_ttft: Annotated[float | None, typer.Option(help="Seconds to the first token.")] = None,
    max_itl: Annotated[float | None, typer.Option(help="Seconds from token to token.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a step.")] = None,
    server: Annotated[
        str | None, typer.Option(help="partita, or graphs: kernels that no host starts.")
    ] = None,
    json: Json = False,
) -> None:
    """Searches for the best plan of a model on a cluster; with --plan judges that one."""
    served = ServeOptions(
        prompt_len, output_len, concurrency, max_ttft, max_itl, max_batch_tokens, server
    )
    training = {
        "global_batch_size": global_batch_size, "seq_len": seq_len,
        "micro_batch_size": micro_batch_size, "fix": fix, "forbid": forbid, "pareto": pareto,
        "solve": solve, "measure": measure, "html": html, "save": save,
        "survive": survive,
    }  # fmt: skip
    hold_apart(serve, served, training)
    if serve:
        answer_of_server(words, line, served, goal, top, precision, budget, json)
        return
    batch = {
        "global_batch_size": global_batch_size,
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
    }
    hold_place(html)
    hold_place(save)
    words_of = (tuple(fix or ()), tuple(forbid or ()))
    if line is not None:
        asked = (solve, pareto, *words_of, precision, survive)
        _hold_alone(dict(zip(OF_SEARCH, asked, strict=True)))
        _judge(from_words(words, line, batch), goal, Files(html, save), measure, json)
        return
    job = from_words(words, None, batch)
    from partita.planner.answers.ask import (  # a user's own plan is judged without the search
        Question,
        ask,
    )

    dtypes = tuple(filter(None, precision.split(",")))
    question = Question(goal, top, *words_of, budget, pareto or "", solve or "", dtypes)
    with waiting(f"plan  searching, {budget:g} s at most", quiet=json):
        answer = ask(job, question)
    if solve and answer.plans:
        job = answer.plans[0].job or job  # of what was found
    if measure and answer.plans:
        answer = _measured(job, answer, measure)
    if answer.plans:
        if survive:
            answer = _with_survivors(job, answer, survive, budget)
        _write(job, answer, Files(html, save))
    _tell(answer, json)
    if not answer.plans:
        note(f"partita: {next(iter(answer.texts), 'no plan fits')}")
        raise typer.Exit(1)


def _with_survivors(job: Job, answer: Answer, losses: int, budget: float) -> Answer:
    """With plans for what losses leave of the best plan's ranks."""
    from partita.planner.answers.survive import survivors, told

    best = answer.plans[0]
    found = survivors(job.with_plan(best.plan), losses, budget)
    return replace(answer, survive=found, texts=(*answer.texts, *told(found, best)))


def _hold_alone(asked: dict[str, Any]) -> None:
    """Raises UsageError where a question to the search stands beside a plan of the user's."""
    for name, value in asked.items():
        if value:
            text = f"--{name} asks the search, --plan judges one plan without it: one of the two, not both"
            raise UsageError(text, key=name)


def _write(job: Job, answer: Answer, files: Files) -> None:
    """What the user asked for of plans that were found, the best first."""
    if files.save is not None:
        kept = tuple(p.plan for p in answer.survive.values() if p is not None)
        saved = replace(job.with_plan(answer.plans[0].plan), survive=kept or job.survive)
        write_file(files.save, saved.to_toml())
    if files.html is not None:
        write_file(files.html, _page(job, answer))


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
    from partita.planner.answers.answer import counts
    from partita.plots.plans import plans_page

    model, cluster, best = job.model.name, job.cluster.name, answer.plans[0]
    title = f"{model} on {cluster}" if model and cluster else job.name
    lead = counts(answer.found) if answer.found.considered else best.verdict
    return plans_page(title, lead, answer.plans, {best.plan: answer.texts})


def _tell(answer: Answer, json: bool) -> None:
    from partita.planner.answers.answer import counts, document, ranked

    if json:
        write_json(document(answer))
        return
    lines = list[str]()
    if answer.plans:
        from partita.simulate.told import sureness

        lines = [ranked(answer.plans), f"step times: {sureness(answer.plans[0])}"]
    lines += [answer.solved.text] if answer.solved else [counts(answer.found)]
    write_text("\n".join([*lines, *answer.texts]))


def _judge(job: Job, goal: str, files: Files, measure: int, json: bool) -> None:
    """One plan of the user's; what fits may be measured, shown and saved."""
    start = time.perf_counter()
    if goal != "time":
        from partita.planner.answers.solve import goal_of

        goal_of(job, goal)
    found = judged(job)
    illegal = any(p.severity == "error" for p in found.problems)
    why = _why(job, found, illegal, goal)
    ran: dict[str, Any] = {}
    if found.fits and (measure or files != Files()):
        from partita.planner.answers.ask import Answer
        from partita.planner.search.search import Found

        answer = Answer(Found(plans=[found]), (found,), tuple(why))
        answer = _measured(job, answer, 1) if measure else answer
        _write(job, answer, files)
        why = list(answer.texts)
        if answer.measured:
            seconds, num_bytes = answer.measured[found.plan]
            ran = {"measured": {"step_time_s": seconds, "peak_bytes": num_bytes}}
            ran["others"] = answer.others
    if json:
        write_json(_document(found, why, ran, time.perf_counter() - start))
    else:
        text = str(found) if illegal or found.fits else found.head()  # else `why` has the ledger
        write_text("\n".join([text, *why]))
    if not found.fits:
        if measure or files != Files():
            note("nothing was measured or written: that is for plans that fit")
        note(f"partita: {found.verdict}")
        raise typer.Exit(1)


def _why(job: Job, found: Prediction, illegal: bool, goal: str) -> list[str]:
    if illegal:
        return would_be_legal(found)
    if not found.fits:
        return str(fit_error(job, found)).splitlines()
    from partita.planner.answers.explain import beside

    return beside(job, found, goal)


def _document(
    found: Prediction, why: list[str], ran: dict[str, Any], seconds: float
) -> dict[str, Any]:
    wrong = next((f"{p.room} {p.rule}" for p in found.problems if p.severity == "error"), "memory")
    others = {"others": ran["others"]} if ran else {}
    return {
        "plans": [{**found.to_json(), "why": why, "measured": ran.get("measured")}],
        "considered": 1,
        "rejected": {} if found.fits else {wrong: 1},
        "bounded": 0,
        "simulated": int(found.step_time_s is not None),
        "complete": True,
        "seconds": seconds,
        **others,
    }

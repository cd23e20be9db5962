"""`partita plan`: searches for the best plan of a model on a cluster, or judges one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.base.errors import UsageError
from partita.cli.jobs import Json, PlanLine, from_words
from partita.cli.out import note, write_file, write_json, write_text
from partita.planner.answer import counts, document, ranked
from partita.planner.explain import binds, why
from partita.planner.judge import fit_error, judged, would_be_legal
from partita.planner.search import GOALS, KEEP, Found, Goal, Search, searcher
from partita.planner.solve import Makes, Solved, nothing_fits
from partita.planner.solve import pareto as front
from partita.planner.solve import solve as answer_for
from partita.simulate.predict import Prediction
from partita.spec.job import Job


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
    top: Annotated[int, typer.Option(min=1, help="Plans in the answer.")] = 5,
    goal: Annotated[str, typer.Option(help="time, memory, devices.")] = "time",
    fix: Annotated[list[str] | None, typer.Option(help="What the plan must have: tp8.")] = None,
    forbid: Annotated[list[str] | None, typer.Option(help="What it must not: cp.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds the search may take.")] = 60.0,
    pareto: Annotated[str | None, typer.Option(help="A front of two goals: time,memory.")] = None,
    solve: Annotated[
        str | None,
        typer.Option(
            help="Smallest or biggest that fits: devices, seq_len, global_batch_size, layers."
        ),
    ] = None,
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
    _check(goal)

    def makes(of: Job) -> Search:
        return searcher(of, tuple(fix or ()), tuple(forbid or ()))

    asked = Asked(KEEP if pareto else top, makes, budget)
    if solve is not None:
        solved = answer_for(job, solve, makes, budget)
        _answer(job, solved.found, asked, json, solved)
        raise typer.Exit(0 if solved.found.plans else 1)
    if pareto is not None:
        first, _, second = pareto.partition(",")
        found = front(makes(job), first, second, budget)
    else:
        found = makes(job).best(Goal(goal), top, budget)
    if save is not None and found.plans:
        write_file(save, job.with_plan(found.plans[0].plan).to_toml())
    _answer(job, found, asked, json)
    if not found.plans:
        raise typer.Exit(1)


def _check(goal: str) -> None:
    if goal == "cost":
        raise UsageError("--goal cost needs prices, and a cluster file has none yet", key="goal")
    if goal not in GOALS:
        raise UsageError(f"--goal {goal} is none of {', '.join(GOALS)}", key="goal")


@dataclass(frozen=True)
class Asked:
    """Plans wanted, how a search is made, seconds it may take."""

    top: int
    makes: Makes
    budget_s: float


def _answer(job: Job, found: Found, asked: Asked, json: bool, solved: Solved | None = None) -> None:
    plans = found.plans[: asked.top]
    texts: list[str] = []
    if plans and solved is None:
        texts = [binds(job, plans[0]), *(r.text for r in why(job, plans[0]))]
    elif solved is None:
        texts = nothing_fits(job, asked.makes, asked.budget_s / 4)
    if json:
        told = document(found, {p.plan: texts for p in plans[:1]}, asked.top)
        told |= {} if plans or solved else {"why": texts}
        if solved is not None:
            told["solve"] = {
                "field": solved.field, "value": solved.value, "unit": solved.unit,
                "proven": solved.proven,
            }  # fmt: skip
        write_json(told)
        return
    lines = [ranked(plans)] if plans else []
    lines += [solved.text] if solved else [counts(found)]
    write_text("\n".join([*lines, *texts]))


def _judge(job: Job, json: bool) -> None:
    """One plan of the user's."""
    start = time.perf_counter()
    found = judged(job)
    illegal = any(p.severity == "error" for p in found.problems)
    why = [] if found.fits else _why(job, found, illegal)
    if json:
        write_json(_document(found, why, time.perf_counter() - start))
    else:
        write_text("\n".join([str(found), *why]))
    if not found.fits:
        note(f"partita: {found.verdict}")
        raise typer.Exit(1)


def _why(job: Job, found: Prediction, illegal: bool) -> list[str]:
    if not illegal:
        return str(fit_error(job, found)).splitlines()
    return would_be_legal(found)


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

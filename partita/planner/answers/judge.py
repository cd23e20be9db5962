"""Judges a plan: is it legal, does it fit, and which changes close by would fit (remedy.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from partita.base.errors import PartitaError, PlanError, Problem
from partita.base.text import table
from partita.base.units import format_bytes, format_seconds, sign_of, times
from partita.parallel.laid import problems
from partita.planner.answers.remedy import Remedy, remedies
from partita.simulate.imbalance import Load
from partita.simulate.predict import Prediction, request_of, simulate
from partita.spec.job import Job

STEPS = 8  # rules that a way out may still have to keep
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "buffers")


def ways_out(job: Job, found: Sequence[Problem]) -> tuple[Problem, ...]:
    """The problems, each error's `nearest` a plan that is legal as a whole, or None: a room's own keeps that
    room's rule, so the rules that it still breaks are kept one after the other."""
    return tuple(
        replace(p, nearest=_legal(job, p.nearest)) if p.severity == "error" and p.nearest else p
        for p in found
    )


def _legal(job: Job, line: str) -> str | None:
    for _ in range(STEPS):
        try:
            job = job.with_plan(line)
            found = (*job.problems(), *problems(request_of(job)))
        except PartitaError:  # microbatches that the batch cannot be cut into
            return None
        wrong = [p for p in found if p.severity == "error"]
        if not wrong:
            return line
        hints = [p.nearest for p in wrong if p.nearest not in (None, line)]
        if not hints:
            return None
        line = str(hints[0])
    return None


def judged(job: Job, load: Load | None = None) -> Prediction:
    """`simulate`, with ways out of what is wrong."""
    found = simulate(job, load=load)
    return replace(found, problems=ways_out(job, found.problems))


def would_be_legal(found: Prediction) -> list[str]:
    """A line for each way out."""
    ways = dict.fromkeys(p.nearest for p in found.problems if p.severity == "error" and p.nearest)
    return [f"would be legal: {line}" for line in ways]


def fit_error(job: Job, prediction: Prediction) -> PlanError:
    """Why the job does not fit: the fullest rank's ledger, what binds, and what would fit."""
    worst = prediction.fullest
    limit = prediction.limit_bytes
    over = worst.peak_bytes - limit
    binds = max(CATEGORIES, key=lambda c: worst.at_peak.get(c, 0))
    rows = [
        [c, format_bytes(worst.at_peak.get(c, 0)), "<- binds" * (c == binds)] for c in CATEGORIES
    ]
    rows.append(["total", format_bytes(worst.peak_bytes), f"of {format_bytes(limit)}"])
    ways = remedies(job)
    hints = [_hint(r, prediction) for r in ways]
    headline = (
        f"{job.plan} does not fit: rank {worst.rank} needs {format_bytes(worst.peak_bytes)}, "
        f"{format_bytes(over)} more than its limit of {format_bytes(limit)} "
        f"({times(worst.peak_bytes, limit)})"
    )
    text = "\n".join(
        [headline, table(rows), "what would fit:", *(hints or ["nothing close by on this cluster"])]
    )
    nearest = ways[0].prediction.plan if ways else None
    problem = Problem(
        "memory", "limit", f"{format_bytes(worst.peak_bytes)} on rank {worst.rank}, mostly {binds}",
        asked=format_bytes(worst.peak_bytes), limit=format_bytes(limit), nearest=nearest,
    )  # fmt: skip
    error = PlanError(text)
    error.problems = (problem,)
    return error


def _hint(remedy: Remedy, now: Prediction) -> str:
    found = remedy.prediction
    seconds = found.step_time_s or 0.0
    return (
        f'{" and ".join(remedy.names)}: plan="{found.plan}" needs {format_bytes(remedy.peak_bytes)}, '
        f"{format_seconds(seconds)} a step ({sign_of(seconds - (now.step_time_s or 0.0))})"
    )

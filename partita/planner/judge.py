"""Judges a plan: is it legal, does it fit, and which changes close by would fit.

changes tried, alone and in pairs   recompute:full, +sp, bf16, twice the tp, twice the pp, more
                                    microbatches of the same batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from partita.base.errors import PartitaError, PlanError, Problem
from partita.base.text import table
from partita.base.units import format_bytes, format_seconds
from partita.parallel.laid import problems
from partita.simulate.imbalance import Load
from partita.simulate.predict import Prediction, request_of, simulate
from partita.spec.job import Job
from partita.spec.plan import Plan

STEPS = 8  # rules that a way out may still have to keep
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "buffers")


def changes(plan: Plan) -> dict[str, Plan]:
    """Plans one change away, by the change's name."""
    m = plan.mesh
    found: dict[str, Plan] = {}
    if plan.recompute.mode == "none":
        found["recompute:full"] = plan.with_("recompute", mode="full")
    if plan.precision.dtype in ("fp32", "fp64"):
        found["bf16"] = plan.with_("precision", dtype="bf16")
    found["twice the tp"] = plan.with_("mesh", tp=2 * m.tp, sp=True)
    found["twice the pp"] = plan.with_("mesh", pp=2 * m.pp)
    if m.tp > 1 and not m.sp:
        found["+sp"] = plan.with_("mesh", sp=True)
    return found


def _combined(plan: Plan, names: tuple[str, ...]) -> Plan:
    for name in names:
        plan = changes(plan).get(name, plan)
    return plan


def neighbours(plan: Plan) -> Iterator[tuple[tuple[str, ...], Plan]]:
    """Plans one, two and three changes away, nearest first."""
    names = tuple(changes(plan))
    for count in (1, 2, 3):
        for chosen in combinations(names, count):
            yield chosen, _combined(plan, chosen)
    twice = ("twice the pp", "twice the tp", "bf16", "recompute:full")
    yield twice, _combined(plan, twice)


def with_plan(job: Job, plan: Plan) -> Job:
    """The job under another plan; microbatches split further where the pipeline needs them."""
    samples = job.train.global_batch_size // plan.data_parallel_size
    microbatches = job.plan.num_microbatches
    if plan.mesh.pp > job.plan.mesh.pp:
        fits = [n for n in range(1, samples + 1) if samples % n == 0]
        microbatches = min((n for n in fits if n >= 2 * plan.mesh.pp), default=max(fits))
    return replace(job, plan=plan.with_("pipeline", num_microbatches=microbatches))


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


def fitting(job: Job, most: int = 3) -> list[tuple[tuple[str, ...], Prediction]]:
    """The fewest changes that make the job fit the cluster, fastest first among equals."""
    found: list[tuple[tuple[str, ...], Prediction]] = []
    for names, plan in neighbours(job.plan):
        if found and len(names) > len(found[0][0]):
            break
        if plan.world_size > job.cluster.devices:
            continue
        prediction = simulate(with_plan(job, plan))
        if prediction.fits:
            found.append((names, prediction))
    return sorted(found, key=lambda x: x[1].step_time_s or 0.0)[:most]


def fit_error(job: Job, prediction: Prediction) -> PlanError:
    """Why the job does not fit: the fullest rank's ledger, what binds, and what would fit."""
    worst = max(prediction.ledgers, key=lambda x: x.peak_bytes)
    limit = prediction.limit_bytes
    over = worst.peak_bytes - limit
    binds = max(CATEGORIES, key=lambda c: worst.at_peak.get(c, 0))
    rows = [
        [c, format_bytes(worst.at_peak.get(c, 0)), "<- binds" * (c == binds)] for c in CATEGORIES
    ]
    rows.append(["total", format_bytes(worst.peak_bytes), f"of {format_bytes(limit)}"])
    ways = fitting(job)
    hints = [
        f'{" and ".join(names)}: plan="{p.plan}" needs '
        f"{format_bytes(max(x.peak_bytes for x in p.ledgers))}, {format_seconds(p.step_time_s or 0)} a step"
        for names, p in ways
    ]
    headline = (
        f"{job.plan} does not fit: rank {worst.rank} needs {format_bytes(worst.peak_bytes)}, "
        f"{format_bytes(over)} more than its limit of {format_bytes(limit)} "
        f"({worst.peak_bytes / limit:.2f} times)"
    )
    text = "\n".join(
        [headline, table(rows), "what would fit:", *(hints or ["nothing close by on this cluster"])]
    )
    nearest = ways[0][1].plan if ways else None
    problem = Problem(
        "memory", "limit", f"{format_bytes(worst.peak_bytes)} on rank {worst.rank}, mostly {binds}",
        asked=format_bytes(worst.peak_bytes), limit=format_bytes(limit), nearest=nearest,
    )  # fmt: skip
    error = PlanError(text)
    error.problems = (problem,)
    return error

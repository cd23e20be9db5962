"""Plans for what is left when devices are lost, found before that happens (after Oobleck, Jang et al. 2023,
arXiv 2309.08125, whose templates are pipelines; these are whole plans, each of all ranks that are left).

    lost    ranks of a node at once where the plan spans nodes, else one at a time
    kept    batch, sequence, precision: the run goes on from its checkpoint, which every plan loads
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from partita.base.errors import UsageError
from partita.base.text import table
from partita.base.units import format_seconds
from partita.planner.answers.ask import Question, searched
from partita.planner.answers.solve import with_devices
from partita.planner.search.nodes import ANY
from partita.simulate.predict import Prediction
from partita.spec.job import Job
from partita.spec.plan import Plan

MANY = 20  # plans among which one of all ranks is looked for


def survivors(job: Job, losses: int, budget_s: float) -> dict[int, Prediction | None]:
    """Of the job's plan after each of so many losses: how many ranks are left, and the best plan that has as
    many, None where none of them fits. Raises UsageError where nothing would be left."""
    world, node = job.plan.world_size, job.cluster.devices_per_node
    each = node if world > node else 1
    if losses * each >= world:
        most = (world - 1) // each
        text = (
            f"{losses} losses of {each} of {world} ranks leave none; {most} can be survived at most"
        )
        raise UsageError(text, key="survive")
    left = range(world - each, world - losses * each - 1, -each)
    return {n: _best(job, n, budget_s / losses) for n in left}


def _best(job: Job, ranks: int, budget_s: float) -> Prediction | None:
    """The fastest plan of exactly so many ranks, in the job's precision."""
    dtype = job.plan.precision.dtype
    less = replace(job, cluster=with_devices(job.cluster, ranks))
    question = Question(top=MANY, budget_s=budget_s, precision=(dtype,))
    plans = searched(question.search(less), ANY, question).plans
    return next((p for p in plans if Plan.parse(p.plan).world_size == ranks), None)


def told(found: Mapping[int, Prediction | None], whole: Prediction) -> list[str]:
    """What is left of the speed with the ranks that are left, as text."""
    rows: list[list[object]] = []
    for ranks, p in found.items():
        if p is None or p.step_time_s is None or whole.step_time_s is None:
            rows.append([ranks, "no plan of as many ranks fits", "", ""])
        else:
            share = f"{whole.step_time_s / p.step_time_s:.0%}"
            rows.append([ranks, p.plan, format_seconds(p.step_time_s), share])
    texts = [table(rows, ["ranks left", "plan", "step", "of the speed"])]
    if any(found.values()):
        texts.append("every one of them goes on from any checkpoint of the run")
    return texts

"""Unequal devices: layers of the stages by what their devices reach.

The search takes every device for the weakest (spec/unequal.py), so what it proves is of plans whose ranks are
treated alike. Beside it, for each pp whose stages lie on devices of one kind each:

    the best such plans, their layers laid so that stages take equally long
    from there a layer at a time, and other choices one at a time, while any is better

each simulated with every stage on its own devices. Of these nothing is proven.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from partita.planner.answers.explain import changes
from partita.planner.answers.nearby import allowed
from partita.planner.search.nodes import Found, Goal, Queue, measures
from partita.planner.search.search import Search
from partita.planner.words import Words
from partita.simulate.predict import Prediction, layers_of, simulate
from partita.spec.job import Job
from partita.spec.mesh import divisors
from partita.spec.plan import Plan

Searches = Callable[[int], Search | None]  # of a pp; of 0: of all
MESHES, EACH = 4, 3  # sizes of pp, and plans of each
LEVELLED = 4  # times that layers are laid anew by what stages took
SHARES = (
    1.0,
    0.75,
    0.5,
    0.25,
)  # of the way from even layers, where memory does not allow all of it


@dataclass
class Tries:
    """Plans simulated on the devices as they are, until the clock says `end_s`; the best are kept."""

    job: Job
    goal: Goal
    queue: Queue
    end_s: float
    seen: dict[str, Prediction] = field(default_factory=dict)

    def predict(self, plan: Plan) -> Prediction:
        """`simulate`, each plan once."""
        line = str(plan)
        if line not in self.seen:
            told = self.seen[line] = simulate(self.job.with_plan(plan))
            if told.fits:
                self.queue.keep(told, measures(told))
        return self.seen[line]

    def late(self) -> bool:
        """Whether no time is left."""
        return time.perf_counter() > self.end_s


def by_rates(
    job: Job, searches: Searches, goal: Goal, top: int, found: Found, budget_s: float
) -> Found:
    """What was found, told of the devices as they are, and what is better with layers by their rates, as one
    answer. `searches`: of the plans of a pp, None where words leave it out."""
    start = time.perf_counter()
    tries = Tries(job, goal, Queue(goal, found.rejected, top), start + budget_s)
    plans = [Plan.parse(p.plan) for p in found.plans]
    for plan in plans:
        tries.predict(plan)
    sizes = of_each_pp(job)
    for pp in sizes:
        search = searches(pp)
        if search is not None and not tries.late():
            seconds = budget_s / 2 / len(sizes)
            plans += [Plan.parse(p.plan) for p in search.best(goal, EACH, seconds).plans]
    words = searches(0)
    for plan in dict.fromkeys(plans):
        _laid_anew(tries, plan)
    while tries.queue.best and words is not None and not tries.late():
        best = tries.queue.best[0][1]
        _closer(tries, best, words.space.words)
        if tries.queue.best[0][1] is best:
            break
    found.plans = [p for _, p in tries.queue.best] or found.plans
    found.by_rates, found.complete, found.unproven, found.least_s = len(tries.seen), False, (), 0.0
    found.seconds += time.perf_counter() - start
    return found


def _laid_anew(tries: Tries, plan: Plan) -> None:
    """Its layers laid so that stages take equally long, as the devices are."""
    if plan.mesh.pp == 1 or plan.pipeline.costs:
        return
    even = tries.predict(plan)
    at = wanted = layers_of(even)
    seconds = _stage_seconds(even)
    for _ in range(LEVELLED):
        if not seconds or min(at) < 1 or tries.late():
            return
        wanted = levels([s / n for s, n in zip(seconds, wanted, strict=True)], sum(at))
        seconds = _stage_seconds(tries.predict(plan.with_("pipeline", split=wanted)))
    for share in SHARES:
        between = [round(a + share * (b - a)) for a, b in zip(at, wanted, strict=True)]
        between[-1] += sum(at) - sum(between)
        if min(between) > 0 and not tries.late():
            tries.predict(plan.with_("pipeline", split=tuple(between)))


def levels(seconds: Sequence[float], layers: int) -> tuple[int, ...]:
    """Layers of each stage, one at least, so that the longest of them is shortest, where a layer takes so
    many seconds there.

    >>> levels([1.0, 3.0], 8)
    (6, 2)
    """
    found = [1] * len(seconds)
    for _ in range(layers - len(seconds)):
        stage = min(range(len(seconds)), key=lambda i: (found[i] + 1) * seconds[i])
        found[stage] += 1
    return tuple(found)


def _closer(tries: Tries, best: Prediction, words: Words) -> None:
    """A layer moved from each stage to each of the quickest, and each other choice changed alone."""
    plan, at, seconds = Plan.parse(best.plan), layers_of(best), _stage_seconds(best)
    if plan.mesh.pp > 1 and not plan.pipeline.costs and seconds:
        order = sorted(range(len(at)), key=lambda i: seconds[i])
        for giver in reversed(order):
            moved = list(at)
            taker = next(i for i in order if i != giver)
            moved[giver], moved[taker] = moved[giver] - 1, moved[taker] + 1
            if min(moved) > 0 and not tries.late():
                tries.predict(plan.with_("pipeline", split=tuple(moved)))
    for _, other in changes(tries.job, plan, lambda x: x.precision == plan.precision):
        if tries.late():
            return
        if allowed(words, other):
            tries.predict(other)


def _stage_seconds(p: Prediction) -> list[float]:
    """Forward and backward of a microbatch; none of a plan that cannot be."""
    return [s.seconds for s in p.timed.stages] if p.timed is not None else []


def of_each_pp(job: Job) -> list[int]:
    """The smallest sizes of pp, as many as are looked at, whose stages lie on devices of one kind each where
    pp is outermost."""
    cluster = job.cluster
    ends = set(accumulate(n.count * n.devices for n in cluster.nodes))
    sizes = (pp for pp in divisors(cluster.devices) if 1 < pp <= job.model.layers)
    return [pp for pp in sizes if all(end % (cluster.devices // pp) == 0 for end in ends)][:MESHES]

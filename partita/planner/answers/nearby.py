"""Where a search ended before its proof: plans that differ from the best in one choice, as its reasons do,
and from there on, until none is better. What the user's words do not allow stays out, and so does another
precision."""

from __future__ import annotations

import time
from collections.abc import Iterator

from partita.planner.answers.explain import changes
from partita.planner.search.beyond import keep_better
from partita.planner.search.nodes import Found, Goal, Queue
from partita.planner.search.search import Search
from partita.planner.space import Words
from partita.simulate.predict import Prediction
from partita.spec.plan import Plan


def nearby(search: Search, goal: Goal, top: int, found: Found, budget_s: float) -> Found:
    """What was found, and what is better close by, as one answer."""
    if found.complete or not found.plans:
        return found
    start, queue, best = time.perf_counter(), Queue(goal, found.rejected, top, found.plans), None
    end = start + budget_s
    while best is not found.plans[0]:
        best = found.plans[0]
        found.near += keep_better(search, queue, best, _others(search, best, end), end)
        found.plans = [p for _, p in queue.best]
    found.seconds += time.perf_counter() - start
    return found


def _others(search: Search, best: Prediction, end_s: float) -> Iterator[Plan]:
    """Its neighbours; no schedule is made for one that is not wanted, nor once the clock says `end_s`."""
    plan, words = Plan.parse(best.plan), search.space.words

    def wanted(other: Plan) -> bool:
        in_time = time.perf_counter() <= end_s
        return in_time and other.precision == plan.precision and allowed(words, other)

    return (other for _, other in changes(search.job, plan, wanted))


def allowed(words: Words, plan: Plan) -> bool:
    """Whether a plan has what the words fix and nothing that they forbid."""
    m, p, c = plan.mesh, plan.pipeline, plan.context
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "sp", "ep", "etp", "order")
    told = {axis: getattr(m, axis) for axis in axes}
    told |= {"dp": plan.data_parallel_size, "num_microbatches": plan.num_microbatches}
    told |= {"zero": plan.data.zero_stage if m.dp_shard > 1 else 0, "dtype": plan.precision.dtype}
    told |= {"recompute": plan.recompute.mode, "offload": plan.offload.to, "method": c.method}
    told |= {"ulysses": c.ulysses if c.method == "hybrid" else None}
    told |= {"schedule": p.schedule, "virtual": p.virtual_stages, "groups": m.split}
    told |= {"split": p.split or m.split if p.split or m.split > 1 else None}
    fixed = {name for name, _ in words.fixed}
    nothing = {"method"} if m.cp == 1 else set[str]()  # what a plan has no use for
    nothing |= {"schedule", "virtual"} if m.pp == 1 else set[str]()
    return all(words.admit(name, told[name]) for name in told if name not in nothing - fixed)

"""What is tried beyond the search, whose answer it has to beat: other precisions that the user names, or fp32
where the best plan is faster in it, each a space of its own, and axes in another order on the links:

at most SMALL devices    every plan in every order that differs on the links, as a space of its own
                         (with experts, whose rows a bound for every order knows little of: SPARSE)
more                     the best plans (BEST at most), each in its other orders
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from partita.planner.orders import orders_of
from partita.planner.search.elsewhere import ways_of
from partita.planner.search.nodes import Found, Goal, Queue, measures
from partita.planner.search.search import Search
from partita.planner.space import Space
from partita.simulate.predict import Prediction
from partita.spec.plan import Plan

SMALL, SPARSE = 16, 8
BEST = 3
WORTH = 0.01  # of a step, for which another precision is looked at


def precise(
    search: Search, dtypes: Sequence[str], goal: Goal, top: int, found: Found, budget_s: float
) -> tuple[Search, Found]:
    """What was found, and in the other of these precisions, as one answer; the search of the best plan."""
    space, end = search.space, time.perf_counter() + budget_s
    best = search
    for dtype in dtypes:
        if dtype == space.dtype:
            continue
        more = Search(Space(space.job, space.words, dtype, space.offload), before=search)
        before = found.plans[:1]
        found.join(more.best(goal, top, max(end - time.perf_counter(), 0.0), seen=found.plans))
        best = more if found.plans[:1] != before else best
    return best, found


def faster_dtype(search: Search, goal: Goal, found: Found) -> tuple[str, ...]:
    """fp32, where the device's rates chose bf16 and the best plan is yet faster in it, by WORTH, as the words
    allow; else none."""
    other, words = "fp32", search.space.words
    if search.space.dtype != "bf16" or not words.admit("dtype", other):
        return ()
    if not found.plans or goal.name == "memory":
        return ()
    told = search.predict(Plan.parse(found.plans[0].plan).with_("precision", dtype=other))
    seconds = measures(found.plans[0])[0]
    return (other,) if told.fits and measures(told)[0] <= (1 - WORTH) * seconds else ()


def keep_better(
    search: Search, queue: Queue, best: Prediction, others: Iterable[Plan], end_s: float
) -> int:
    """Predicts plans, until the clock says `end_s`, and keeps those that are better than `best`; how many it
    predicted."""
    count = 0
    for other in others:
        if time.perf_counter() > end_s:
            break
        told, count = search.predict(other), count + 1
        if told.fits and queue.goal.key(*measures(told)) < queue.goal.key(*measures(best)):
            queue.keep(told, measures(told))
    return count


def turned(
    search: Search, goal: Goal, top: int, found: Found, budget_s: float, every: bool = True
) -> Found:
    """What was found, and with axes in another order, as one answer; `every` plan of few devices, else the
    best."""
    space, cluster = search.space, search.job.cluster
    wanted, start = not space.stated and space.words.admit("order", "another"), time.perf_counter()
    if not found.plans or len(cluster.links) < 2 or not wanted:
        return found
    if every and cluster.devices <= (SPARSE if space.model.experts else SMALL):
        for offload in ways_of(space, found):
            orders = Space(space.job, space.words, space.dtype, offload, turned=True)
            others = Search(orders, before=search)
            left = max(budget_s - (time.perf_counter() - start), 0.0)
            there = others.best(goal, top, left, seen=found.plans)
            found.join_other("other orders of axes", there)
            if not there.complete:
                break
        return found
    queue = Queue(goal, found.rejected, top, found.plans)
    for best in found.plans[: min(top, BEST)]:
        plan = Plan.parse(best.plan)
        orders = (plan.with_("mesh", order=order) for order in orders_of(plan.mesh, cluster))
        found.turned += keep_better(search, queue, best, orders, start + budget_s)
    found.plans = [p for _, p in queue.best]
    found.seconds += time.perf_counter() - start
    return found

"""How many layers each stage has, beyond the balanced split, whose stages have equal FLOPs: times are not
proportional to those (embedding and head, a first stage that waits for all others), and memory is not.

On few devices all are searched with everything else (uneven.py). Where those are too many, or devices, the
best plans' neighbours are simulated (a layer moved from a dear stage to a cheap one, or from or to an end),
in order of the schedule's bound, until none is better: of such plans the best is not proven.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from partita.planner.bounds.columns import TIMES
from partita.planner.bounds.table import Table
from partita.planner.search.beyond import SMALL, SPARSE, turned
from partita.planner.search.elsewhere import is_always
from partita.planner.search.gap import least_seconds
from partita.planner.search.made import FEW as MANY
from partita.planner.search.made import made
from partita.planner.search.nodes import ANY, Found, Goal, Queue, measures
from partita.planner.search.search import Search
from partita.planner.search.uneven import count_splits, every_split, spread_out
from partita.planner.space import MeshChoice, Shape, Tokens
from partita.simulate.predict import Prediction, layers_of
from partita.spec.mesh import divisors
from partita.spec.plan import Plan

Split = tuple[int, ...]
ALL, TRIES = (
    300,
    12,
)  # splits of which all are simulated on few devices; neighbours that are, a turn
FEW, BEST = 8, 3  # devices; plans
MOST_S = 2.0
ENDS = 5  # so many of the dearest and of the cheapest stages give and take layers


def finished(
    search: Search, goal: Goal, top: int, found: Found, budget_s: float, every: bool = False
) -> Found:
    """What was found, and its best plans (`every` plan of few devices) with axes in another order, then with
    other splits of the layers, then with schedules made for them, as one answer."""
    end = time.perf_counter() + budget_s

    def left() -> float:
        return max(end - time.perf_counter(), 0.0)

    def may_change() -> bool:
        """Where time is left; or where what was not looked at makes unproven what else was proven."""
        return left() > 0 or (every and found.proven)

    if may_change():
        found = turned(search, goal, top, found, left(), every)
    if every and found.proven:
        found = spread_out(search, goal, top, found, left())
    if left() > 0:
        found = splits(search, goal, top, found, left())
    found = made(search, goal, top, found, left(), every) if may_change() else found
    found.not_searched = not_searched(search, every)
    many = search.job.cluster.devices > MANY and found.complete and found.plans
    if every and many and goal == ANY and _is_of(search, found.plans[0]):
        found.least_s = least_seconds(search, found, left())
    return found


def any_fits(search: Search, budget_s: float) -> Found:
    """Any plan that fits, those of little memory first: of the search's own space; on few devices then with
    layers split in another way, or with a schedule made for it, which may hold less."""
    goal, end = Goal("memory"), time.perf_counter() + budget_s

    def left() -> float:
        return max(end - time.perf_counter(), 0.0)

    found = search.best(goal, budget_s=budget_s, first=True)
    if search.job.cluster.devices > MANY:
        return found
    if not found.plans:
        found = spread_out(search, goal, 1, found, left(), first=True)
    return found if found.plans else made(search, goal, 1, found, left(), first=True)


def not_searched(search: Search, every: bool) -> tuple[str, ...]:
    """The choices that no proof is over: those looked at for the best plans alone, and pairs of choices."""
    space, cluster, admit = search.space, search.job.cluster, search.space.words.admit
    few = every and cluster.devices <= MANY
    alone = every and cluster.devices <= (SPARSE if space.model.experts else SMALL)
    turns = len(cluster.links) > 1 and not space.stated and admit("order", "another")
    splits = admit("split", "uneven") and admit("pp", 2)
    auto = admit("schedule", "auto") and space.model.image is None and admit("pp", 2)
    of_best = ["orders of axes"] * (turns and not alone)
    of_best += ["splits of layers"] * (splits and not few) + ["made schedules"] * (auto and not few)
    found = [f"other {', '.join(of_best)} of all but the best plans"] if of_best else []
    if few and splits and auto:
        found.append("auto beside another split of layers")
    parts, seq_len = divisors(cluster.devices), search.job.train.seq_len
    if space.model.image is None and any(seq_len % n and admit("cp", n) for n in parts):
        found.append("parts of a sequence that do not divide it")
    if admit("offload", "cpu"):
        beside = ["other orders"] * turns + ["other splits"] * splits + ["auto"] * auto
        if not few or not is_always(cluster):
            found.append("offload where a plan fits without")
        elif beside:
            found.append(f"offload beside {', '.join(beside)} but as the best plan has it")
    return tuple(found)


def _is_of(search: Search, best: Prediction) -> bool:
    """Whether the plan is of the search's precision and offload."""
    plan, space = Plan.parse(best.plan), search.space
    return plan.precision.dtype == space.dtype and plan.offload == space.offload


def splits(search: Search, goal: Goal, top: int, found: Found, budget_s: float) -> Found:
    """What was found, and the best plans with other splits, as one answer."""
    start = time.perf_counter()
    end = start + min(budget_s, MOST_S)
    if not search.space.words.admit("split", "uneven"):
        return found
    queue = Queue(goal, found.rejected, top, found.plans)
    for best in found.plans[: min(top, BEST)]:
        better = _best_split(search, goal, best, found, end)
        if better is not best:
            queue.keep(better, measures(better))
    found.plans = [p for _, p in queue.best]
    found.seconds += time.perf_counter() - start
    return found


def _best_split(
    search: Search, goal: Goal, best: Prediction, found: Found, end: float
) -> Prediction:
    """The best of the splits looked at, the plan's own first."""
    plan, at, stages_of = Plan.parse(best.plan), layers_of(best), _stages(search, best)
    if (
        plan.mesh.pp == 1
        or plan.pipeline.schedule == "auto"
        or sum(at) != search.job.model.layers
        or stages_of is None
    ):
        return best
    few = search.job.cluster.devices <= FEW and count_splits(sum(at), len(at)) <= ALL
    seen, now = {at}, best
    while True:
        near = every_split(sum(at), len(at)) if few else _near(at, stages_of(at)[0])
        tries = sorted(near, key=lambda s: stages_of(s)[1])
        start, tries = now, [s for s in tries if s not in seen][: ALL if few else TRIES]
        for split in tries:
            if time.perf_counter() > end:
                return now
            seen.add(split)
            found.split += 1
            told = search.predict(plan.with_("pipeline", split=split))
            if told.fits and goal.key(*measures(told)) < goal.key(*measures(now)):
                now, at = told, split
        if now is start or few:
            return now


Stages = Callable[[Split], tuple[list[float], float]]


def _stages(search: Search, best: Prediction) -> Stages | None:
    """Of a split the seconds of a microbatch in each stage, and what the schedule takes at least."""
    plan, bounds = Plan.parse(best.plan), search.bounds
    m, p = plan.mesh, plan.pipeline
    mesh = MeshChoice(m.pp, plan.data_parallel_size, m.cp, m.tp, m.sp, m.split)
    shape = Shape(plan.context.method, plan.context.ulysses, m.ep, m.etp)
    samples = search.space.batch // plan.data_parallel_size // plan.num_microbatches
    table = bounds.table(mesh, shape, Tokens(plan.recompute.mode, plan.recompute.every, samples))
    if not isinstance(table, Table):
        return None

    def told(split: Split) -> tuple[list[float], float]:
        rows = table.stages(split)
        named = (p.schedule, p.virtual_stages)
        seconds = bounds.pipeline(rows, mesh, named, plan.num_microbatches, table.sent)
        return rows[:, TIMES].sum(1).tolist(), seconds

    return told


def _near(at: Split, seconds: Sequence[float]) -> Iterator[Split]:
    """A layer moved, where stages take so long."""
    last = len(at) - 1
    order = sorted(range(last + 1), key=lambda i: seconds[i])
    for giver in {*order[-ENDS:], 0, last}:
        for taker in {*order[:ENDS], 0, last} - {giver}:
            if at[giver] > (0 if giver in (0, last) else 1):
                moved = list(at)
                moved[giver], moved[taker] = moved[giver] - 1, moved[taker] + 1
                yield tuple(moved)

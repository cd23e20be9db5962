"""Questions around the search: the fewest devices, the longest sequence, the biggest batch or model that
fits; a front of two goals; what to do where nothing fits.

A quantity is doubled (or halved) until its answer changes, then bisected down to its unit. Where a search
stopped by its budget, the answer is a bound that was reached, and `proven` is false.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from partita.base.errors import UsageError
from partita.base.units import bytes_apart, format_bytes, times
from partita.planner.answers.no_plan import NONE_LEGAL, leaves, which
from partita.planner.search.elsewhere import WITHOUT, least_memory, ways_of, widened
from partita.planner.search.made import made
from partita.planner.search.nodes import GOALS, INF
from partita.planner.search.search import ANY, Found, Goal, Search, measures
from partita.planner.search.splits import any_fits, finished
from partita.planner.search.uneven import FEW, Uneven, UnevenSpace, spread_out
from partita.planner.space import Space
from partita.simulate.predict import Prediction, simulate
from partita.spec.cluster import Cluster
from partita.spec.job import Job

FIELDS = ("devices", "seq_len", "global_batch_size", "layers")
TEXT = ("seq_len", "layers")  # what a model of images does not choose
MOST_DEVICES = 1 << 20
QUARTER = 0.25  # of the seconds, for what would fit where nothing does
SLICES = 3  # of the time that is left, one for a search among several
DOUBLINGS = 10  # a batch doubled so often that still fits has no limit: microbatches take it
FEWEST = Goal("devices")
Makes = Callable[[Job], Search]


@dataclass(frozen=True)
class Solved:
    """The value (None: no limit, or none fits), the plan that shows it, and whether it is proven."""

    field: str
    value: int | None
    unit: int
    found: Found
    proven: bool
    text: str


def with_devices(cluster: Cluster, devices: int) -> Cluster:
    """The cluster with another number of devices, its outermost link joining them all."""
    if cluster.nodes or (not cluster.links and devices > 1):
        raise UsageError(
            "a cluster of unequal nodes, or without links, does not grow", key="devices"
        )
    links = list(cluster.links)
    if links and links[-1].devices < devices:
        links[-1] = replace(links[-1], devices=devices)
    return replace(cluster, devices=devices, links=tuple(links))


def _with(job: Job, field: str, value: int) -> Job:
    if field == "devices":
        return replace(job, cluster=with_devices(job.cluster, value))
    if field == "layers":
        dense = min(job.model.dense_layers, value - 1)
        return replace(job, model=replace(job.model, layers=value, dense_layers=dense))
    model = job.model
    if field == "seq_len" and not model.has_positions and value > model.max_seq_len:
        model = replace(model, max_seq_len=value)
    return replace(job, model=model, train=replace(job.train, **{field: value}))


def solve(job: Job, field: str, makes: Makes, budget_s: float, share: float = 1.0) -> Solved:
    """The smallest number of devices, or the biggest of what else is asked, for which a plan fits, in a share
    of the budget."""
    if field not in FIELDS:
        raise UsageError(f"--solve {field} is none of {', '.join(FIELDS)}", key="solve")
    if field in TEXT and job.model.image is not None:
        raise UsageError(f"--solve {field}: a model of images has none to choose", key="solve")
    if field == "devices":
        return _devices(job, makes, budget_s, budget_s * share)
    return _most(job, field, makes, budget_s, budget_s * share)


def _devices(job: Job, makes: Makes, budget_s: float, seconds: float) -> Solved:
    devices, end = job.cluster.devices, time.perf_counter() + seconds
    while devices <= MOST_DEVICES and time.perf_counter() < end:
        search = makes(_with(job, "devices", devices))
        found = _everywhere(search, end)
        if found.plans:
            search, found = _fewer(job, makes, (search, found), end)
            found = finished(search, FEWEST, 1, found, max(end - time.perf_counter(), 0.0))
            world = measures(found.plans[0])[2]
            text = f"{world} device{'s'[: world > 1]}: {found.plans[0].plan}"
            if not found.complete and world > 1:
                text += f"; {_unknown('fewer', budget_s)}"
            return Solved("devices", world, 1, found, found.complete, text)
        devices *= 2
    text = f"no plan was found on less than {devices:,} devices"
    if devices <= MOST_DEVICES:
        text += f"; {_unknown('more', budget_s)}"
    return Solved("devices", None, 1, Found(), False, text)


def _unknown(what: object, budget_s: float) -> str:
    """Said of what a search was ended before."""
    return f"whether {what} would fit is not known: --budget {4 * budget_s:g} may tell"


def _everywhere(search: Search, end: float) -> Found:
    """The plan on the fewest devices, with all on them or what may lie elsewhere; of few also with layers
    split in any way, or with a schedule made for it, where that needs fewer."""

    def left() -> float:
        return max(end - time.perf_counter(), 0.0)

    found = search.best(FEWEST, budget_s=left())
    found = widened(search, FEWEST, 1, found, left())
    if search.job.cluster.devices > FEW or not found.complete:
        return found
    world = measures(found.plans[0])[2] if found.plans else INF
    fewer = Goal("devices", (INF, INF, world, INF))
    for more in (spread_out, made):
        known = found.plans
        found = more(search, fewer, 1, found, left())
        if found.plans and found.plans != known:
            break
        found.plans = known
    return found


def _fewer(job: Job, makes: Makes, most: tuple[Search, Found], end: float) -> tuple[Search, Found]:
    """What was found, or what fits on fewer devices than those that were tried: of a node any number, then
    whole nodes; each with its search."""
    search, found = most
    world, tried = measures(found.plans[0])[2], search.space.worlds()
    node = job.cluster.devices_per_node
    for devices in (*range(1, min(node, world)), *range(node, world, node)):
        if devices in tried and not devices <= FEW < job.cluster.devices:
            continue
        if time.perf_counter() > end:
            return search, replace(found, complete=False)
        fewer = makes(_with(job, "devices", devices))
        less = _everywhere(fewer, end)
        if less.plans:
            return fewer, replace(less, complete=less.complete and found.complete)
        found = replace(found, complete=found.complete and less.complete)
    return search, found


def _most(
    job: Job, field: str, makes: Makes, budget_s: float, seconds: float, away: bool = False
) -> Solved:
    """`away`: offload is among the choices, which nothing fits without."""
    start = job.model.layers if field == "layers" else getattr(job.train, field)
    unit = 1 if field == "layers" else max(start // 8, 1)
    shown, open_values, end = Found(), set[int](), time.perf_counter() + seconds

    def fits(value: int) -> bool:
        nonlocal shown
        there = _with(job, field, value)
        for known in shown.plans[:1]:  # a moment's look, before a search
            again = simulate(there.with_plan(known.plan))
            if again.fits:
                shown = replace(shown, plans=[again])
                return True
        left = max(end - time.perf_counter(), 0.0) / SLICES if shown.plans else seconds
        found = any_fits(search := makes(there), left)
        if away and not found.plans:
            found = widened(search, Goal("memory"), 1, found, left, first=True)
        if found.plans:
            shown = found
        elif not found.complete:
            open_values.add(value)
        return bool(found.plans)

    low, high = (start, start * 2) if fits(start) else (0, start)
    for _ in range(DOUBLINGS):
        if not low or time.perf_counter() > end or not fits(high):
            break
        low, high = high, high * 2
    else:
        text = f"{field} {low:,} fits too, more was not tried"
        if field == "global_batch_size":
            text = f"no limit: {low:,} sequences fit too, more microbatches take more"
            return Solved(field, None, unit, shown, not open_values, text)
        return Solved(field, low, unit, shown, False, text)
    while high - low > unit:
        if time.perf_counter() > end:
            fits_too = f"{field} {low:,} fits, " if low else ""
            text = f"{fits_too}{_unknown(f'{field} {high:,}', budget_s)}"
            return Solved(field, low or None, unit, shown, False, text)
        middle = (low + high) // 2 // unit * unit
        middle = middle if low < middle < high else low + unit
        low, high = (middle, high) if fits(middle) else (low, middle)
    left = max(end - time.perf_counter(), 0.0)
    if low:
        reached = _Reached(field, low, high, unit, frozenset(open_values), away)
        return _edge(job, makes, reached, shown, (budget_s, left))
    space, text = makes(job).space, f"no {field} of at least {unit} fits"
    if not away and not open_values and left and space.words.admit("offload", "cpu"):
        return _most(job, field, makes, budget_s, left, away=True)
    if open_values:
        text = f"no {field} that fits was found; {_unknown(f'{min(open_values):,}', budget_s)}"
    known = not open_values
    if not leaves(space, space.words):  # of a larger one some may be
        known, text = False, f"of {field} {start:,} {NONE_LEGAL}{which(space)}"
    return Solved(field, None, unit, shown, known, text)


class _Reached(NamedTuple):
    """The biggest value that fits, and the next, which does not or is among those not known (`unknown`);
    `away`: offload was among the choices."""

    field: str
    low: int
    high: int
    unit: int
    unknown: frozenset[int]
    away: bool


def _edge(
    job: Job, makes: Makes, at: _Reached, shown: Found, budgets: tuple[float, float]
) -> Solved:
    """The fastest plan of the biggest value that fits, found in what is left (the second of the budgets), and
    whether the next would fit with offload."""
    budget_s, left = budgets
    end, few = time.perf_counter() + left, job.cluster.devices <= FEW

    def rest() -> float:
        return max(end - time.perf_counter(), 0.0)

    search = makes(_with(job, at.field, at.low))
    fastest = search.best(budget_s=left)
    if at.away:
        fastest = widened(search, ANY, 1, fastest, rest())
    fastest = finished(search, ANY, 1, fastest, rest(), every=few)
    shown = fastest if fastest.plans else shown
    ends = f"{at.high:,} does not"
    if at.high in at.unknown:
        ends = _unknown(f"{at.high:,}", budget_s)
    elif not few and search.space.words.admit("pp", 2):
        ends += " with layers split evenly and a named schedule"
    text = f"{at.field} {at.low:,} fits ({shown.plans[0].plan}), {ends} (steps of {at.unit})"
    proven = not at.unknown
    if not at.away:
        more = makes(_with(job, at.field, at.high))
        beyond = widened(more, Goal("memory"), 1, Found(), rest(), first=True)
        if beyond.plans:
            text += f" without offload: {at.high:,} fits with {beyond.plans[0].plan}"
        proven = proven and beyond.complete and not beyond.plans
    return Solved(at.field, at.low, at.unit, shown, proven, text)


def goal_of(job: Job, name: str, under: Sequence[float] = ()) -> Goal:
    """The goal of that name, with the cluster's prices. Raises UsageError."""
    if name not in GOALS:
        raise UsageError(f"--goal {name} is none of {', '.join(GOALS)}", key="goal")
    prices = job.cluster.prices
    price = prices.money_per_s if prices is not None else 0.0
    if name == "cost" and not price:
        none = "has none" if prices is None else "states no price: watts without kwh"
        raise UsageError(
            f"cost needs prices, and {job.cluster.name or 'the cluster'} {none}: "
            "a table [prices] with device_hour, or watts and kwh",
            key="goal",
        )
    bounds = [*under, *[float("inf")] * (len(GOALS) - len(under))]
    return Goal(name, (bounds[0], bounds[1], bounds[2], bounds[3]), price)


def pareto(search: Search, first: str, second: str, budget_s: float, most: int = 8) -> Found:
    """Plans none of which is beaten in both goals, best in the first one first; of more than so many the last
    is the best in the second."""
    for name in (first, second):
        if name not in GOALS or first == second:
            asked = f"--pareto {first},{second}".rstrip(",")
            text = f"{asked} is not two of {', '.join(GOALS)}, such as time,memory"
            raise UsageError(text, key="pareto")
        goal_of(search.job, name)
    under = [float("inf")] * len(GOALS)
    front, whole, end = list[Prediction](), Found(), time.perf_counter() + budget_s
    few = search.job.cluster.devices <= FEW

    def best(goal: Goal) -> Found:
        """In a slice of what is left."""
        left = max(end - time.perf_counter(), 0.0) / SLICES
        found = search.best(goal, budget_s=left)
        return finished(search, goal, 1, found, max(left - found.seconds, 0.0), every=few)

    for _ in range(most):
        goal = goal_of(search.job, first, under)
        found = best(goal)
        if not front:
            whole = found
        whole.complete = whole.complete and found.complete
        whole.seconds += found.seconds if front else 0.0
        if not found.plans:
            break
        front.append(found.plans[0])
        seconds, num_bytes, world = measures(found.plans[0])
        measured = (seconds, num_bytes, world, world * seconds * goal.price)
        under[GOALS.index(second)] = measured[GOALS.index(second)]
    else:
        whole.complete, whole.more = False, True
    if front and not whole.complete:  # its other end, which it did not come to
        last = best(goal_of(search.job, second))
        kept = front[:-1] if whole.more and last.plans else front
        front = [*kept, *(p for p in last.plans[:1] if all(p.plan != q.plan for q in kept))]
        whole.seconds += last.seconds
    whole.plans = [p for p in front if not any(_beats(q, p, first, second) for q in front)]
    return whole


def _beats(one: Prediction, other: Prediction, *goals: str) -> bool:
    """Whether a plan is better in one goal and no worse in the other: of searches that ended too soon."""
    pairs = [(_measured(one, goal), _measured(other, goal)) for goal in goals]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _measured(p: Prediction, goal: str) -> float:
    """Of a goal; the price of a device and second is the same for all."""
    seconds, num_bytes, world = measures(p)
    return (seconds, num_bytes, world, world * seconds)[GOALS.index(goal)]


def nothing_fits(job: Job, makes: Makes, budget_s: float) -> list[str]:
    """By how much nothing fits, and what would: devices, a shorter sequence, fewer layers; or which plan fits
    that a search did not come to; each in a quarter of the budget."""
    seconds = budget_s * QUARTER
    search, lines = makes(job), list[str]()
    least = least_memory(search, seconds)
    if least.complete:
        least = _least_of_splits(search, least, seconds)
    if least.plans:
        needs, limit = measures(least.plans[0])[1], job.cluster.memory_limit_bytes
        told = "{} with {} of {} a rank".format(least.plans[0].plan, *bytes_apart(needs, limit))
        if needs <= limit:
            return [f"{told} fits: the search had not come to it"]
        ended = "" if least.complete else f" in {seconds:g} s"
        lines.append(
            f"nothing fits: the least memory found{ended} is {told}, {format_bytes(needs - limit)} too much "
            f"({times(needs, limit)})"
        )
    elif least.complete:
        lines.append(f"nothing fits: {NONE_LEGAL}{which(search.space)}")
    else:
        lines.append(f"the plan of least memory was not found in {seconds:g} s")
    lines += _in_another_precision(search, seconds) if least.plans else []
    for field in FIELDS:
        if field == "global_batch_size" or (field == "devices" and not _grows(job.cluster)):
            continue
        if field in TEXT and job.model.image is not None:
            continue
        solved = solve(job, field, makes, budget_s, QUARTER)
        if solved.value is not None:
            lines.append(f"would fit: {solved.text}")
        elif field == "devices" and least.plans:
            lines.append(f"how many devices would do was not found: {solved.text}")
    return lines


def _in_another_precision(search: Search, budget_s: float) -> list[str]:
    """The plan that fits in the other of the two that are chosen without a word, if any does: a copy beside
    masters is more than none, and activations of 16 bits are less."""
    space, end = search.space, time.perf_counter() + budget_s
    other = "fp32" if space.dtype == "bf16" else "bf16"
    if not space.words.admit("dtype", other):
        return []
    more = Search(Space(space.job, space.words, other, space.offload), before=search)
    found = any_fits(more, budget_s)
    if not found.plans:
        left = max(end - time.perf_counter(), 0.0)
        found = widened(more, Goal("memory"), 1, found, left, first=True)
    return [f"would fit: {other}, with {p.plan}" for p in found.plans]


def _least_of_splits(search: Search, least: Found, budget_s: float) -> Found:
    """The same with layers split in another way, on few devices, with all on them or as the plan of least
    memory has it."""
    space, end = search.space, time.perf_counter() + budget_s
    if search.job.cluster.devices > FEW or not space.words.admit("split", "uneven"):
        return least
    for offload in ways_of(space, least):
        base = Space(space.job, space.words, space.dtype, offload)
        more = Search(UnevenSpace(base), Uneven, search)
        more.bounds.limit_bytes = WITHOUT
        left = max(end - time.perf_counter(), 0.0)
        least.join(more.best(Goal("memory"), budget_s=left, seen=least.plans))
    return least


def _grows(cluster: Cluster) -> bool:
    return bool(cluster.links) and not cluster.nodes

"""Why a plan: each of its choices changed, one at a time, and both plans simulated.

What an axis gives up goes to data parallelism, and what it takes comes from there; the samples of a
microbatch stay where they can. A sentence has the numbers of two simulations, and says what the changed
plan loses most by: memory, the bubble, or an axis' link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from partita.base.units import (
    bytes_apart,
    format_bytes,
    format_seconds,
    seconds_apart,
    sign_of,
    times,
)
from partita.parallel.room import PRODUCT_ORDER
from partita.planner.orders import another_order
from partita.planner.search.nodes import measures
from partita.simulate.groups import group_of
from partita.simulate.memory import arena_ledger
from partita.simulate.predict import Prediction, layers_of, simulate
from partita.spec.job import Job
from partita.spec.mesh import divisors
from partita.spec.plan import Plan, has_fixed_stages

OUT = "; it was not among the choices"


@dataclass(frozen=True)
class Reason:
    """One choice, the plan with that choice changed, and what `simulate` says of it."""

    choice: str
    text: str
    changed: Prediction


def changes(
    job: Job, plan: Plan, wanted: Callable[[Plan], bool] = lambda _: True
) -> Iterator[tuple[str, Plan]]:
    """Each choice of the plan with a plan that differs in it alone, and is `wanted`; other stages have the
    balanced split, and an `auto` of stated costs is made anew for what the changed plan's stages cost."""
    for choice, other in _changes(job, plan):
        alike = _stages(other) == _stages(plan)
        found = _plain(other if alike else other.with_("pipeline", split=()))
        if wanted(found):
            yield choice, _made_anew(job, plan, found) if plan.pipeline.costs else found


def _made_anew(job: Job, before: Plan, plan: Plan) -> Plan:
    from partita.planner.answers.anew import anew  # what makes schedules is read where one is made

    return anew(job, plan, before)


def _stages(plan: Plan) -> int:
    """How many a split of the layers is of."""
    return plan.mesh.pp * plan.pipeline.virtual_stages


def _changes(job: Job, plan: Plan) -> Iterator[tuple[str, Plan]]:
    m = plan.mesh
    image = job.model.image
    groups = ("split",) if image is not None and image.groups > 1 else ()
    for axis in ("tp", "pp", "cp", *groups):
        other = _moved(job, plan, axis)
        if other is not None and image is not None:
            method = "halo" if other.mesh.cp > 1 else "ring"  # rows' only one, or none
            other = other.with_("context", method=method).with_("mesh", sp=False)
        if other is not None:
            yield f"{axis}{getattr(m, axis)}", other
    if m.tp > 1 and image is None:
        yield "+sp" if m.sp else "no sp", plan.with_("mesh", sp=not m.sp)
    if m.cp > 1 and image is None:
        method = plan.context.method
        yield (
            method,
            plan.with_("context", method="all_gather" if method == "ring" else "ring", ulysses=1),
        )
    if job.model.experts:
        yield f"ep{m.ep}", plan.with_("mesh", ep=m.ep // 2 if m.ep > 1 else 2)
        if m.tp > 1:
            yield f"etp{m.etp}", plan.with_("mesh", etp=1 if m.etp > 1 else m.tp)
    if m.pp > 1:
        name = "zb_h1" if plan.pipeline.schedule == "1f1b" else "1f1b"
        other = plan.with_("pipeline", schedule=name, virtual_stages=1, costs=(), limit=0, copies=1)
        yield plan.pipeline.schedule, other if _is_one_each(plan) else _even(other)
        if split := plan.pipeline.split:
            yield f"split:{','.join(map(str, split))}", _even(plan)
        v = plan.pipeline.virtual_stages
        if v > 2 and not has_fixed_stages(plan.pipeline.schedule):
            yield f"x{v}", plan.with_("pipeline", virtual_stages=v - 1)
    for count in _counts(job, plan):
        yield f"{plan.num_microbatches}mb", plan.with_("pipeline", num_microbatches=count)
    mode = plan.recompute.mode
    others = ("full",) if mode == "none" else ("none",)
    for other_mode in others:
        yield f"recompute:{mode}", plan.with_("recompute", mode=other_mode, every=1)
    yield from _states(plan)
    if plan.offload.to != "none":
        yield f"offload:{plan.offload.to}", plan.with_("offload", to="none", targets=())
    if order := another_order(m, job.cluster):
        yield f"order:{','.join(m.order)}", plan.with_("mesh", order=order)
    dtype = plan.precision.dtype
    yield dtype, plan.with_("precision", dtype="bf16" if dtype == "fp32" else "fp32")


def _even(plan: Plan) -> Plan:
    """With the balanced split of the layers."""
    return plan.with_("pipeline", split=())


def _is_one_each(plan: Plan) -> bool:
    """Whether a stated split is of one stage a rank."""
    return len(plan.pipeline.split) == plan.mesh.pp


def _states(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Where states lie: another ZeRO stage, replicas for shards or shards for replicas."""
    m, ways = plan.mesh, plan.data_parallel_size
    if m.dp_shard > 1:
        zero = plan.data.zero_stage
        yield f"zero{zero}", plan.with_("data", zero_stage=1 if zero == 3 else 3)
    if m.dp_shard > 1 and m.ep == 1:
        yield f"dp_shard{m.dp_shard}", plan.with_("mesh", dp_replicate=ways, dp_shard=1)
    elif m.dp_shard > 1:  # experts need the axis
        by = divisors(m.dp_shard)[1]
        fewer = {"dp_replicate": m.dp_replicate * by, "dp_shard": m.dp_shard // by}
        yield f"dp_shard{m.dp_shard}", plan.with_("mesh", **fewer)
    elif ways > 1:
        shared = plan.with_("mesh", dp_replicate=1, dp_shard=ways)
        yield f"dp_replicate{m.dp_replicate}", shared.with_("data", zero_stage=1)


def _moved(job: Job, plan: Plan, axis: str) -> Plan | None:
    """The smallest factor of an axis given to data parallelism, or a factor 2 taken from there."""
    size, m = getattr(plan.mesh, axis), plan.mesh
    into = "dp_shard" if m.dp_shard > 1 else "dp_replicate"
    if size > 1:
        by = divisors(size)[1]
        found = plan.with_("mesh", **{axis: size // by, into: getattr(m, into) * by})
    elif getattr(m, into) % (by := _first(job, axis)) == 0:
        found = plan.with_("mesh", **{axis: by, into: getattr(m, into) // by})
        found = found.with_("mesh", sp=True) if axis == "tp" else found
    else:
        return None
    if found.mesh.tp == 1:
        found = found.with_("mesh", sp=False)
    if found.mesh.cp == 1 or found.mesh.cp % plan.context.ulysses:
        found = found.with_("context", method="ring", ulysses=1)
    if found.mesh.pp != m.pp:
        found = _even(found.with_("pipeline", costs=(), limit=0, copies=1))
    if found.mesh.pp == 1:
        found = found.with_("pipeline", schedule="1f1b", virtual_stages=1)
    samples, ways = job.train.global_batch_size, found.data_parallel_size
    if samples % ways:
        return None
    micro = min(job.with_plan(plan).micro_batch_size, samples // ways)
    micro = max(d for d in divisors(samples // ways) if d <= micro)
    return found.with_("pipeline", num_microbatches=samples // ways // micro)


def _first(job: Job, axis: str) -> int:
    """The fewest ranks of an axis beyond one: two, or the smallest factor of an image model's groups."""
    image = job.model.image
    return divisors(image.groups)[1] if axis == "split" and image is not None else 2


def _counts(job: Job, plan: Plan) -> list[int]:
    """The next smaller and larger number of microbatches."""
    every = divisors(job.train.global_batch_size // plan.data_parallel_size)
    if job.train.micro_batch_size is not None:
        return []
    at = every.index(plan.num_microbatches) if plan.num_microbatches in every else 0
    return [every[i] for i in (at - 1, at + 1) if 0 <= i < len(every)]


def causes(p: Prediction) -> dict[str, float]:
    """Seconds of the step by cause: compute, bubble, optimizer, collectives by axis."""
    found = {k: p.time[f"{k}_s"] for k in ("compute", "bubble", "optimizer")}
    return found | {f"{axis} traffic": s for axis, s in p.time["exposed_comm_s"].items()}


def reason(job: Job, best: Prediction, choice: str, plan: Plan, goal: str = "time") -> Reason:
    """What the change would do."""
    other = simulate(job.with_plan(plan))
    lead = f"{choice}: {other.plan}"
    wrong = [p.message for p in other.problems if p.severity == "error"]
    if wrong:
        return Reason(choice, f"{lead} cannot be: {wrong[0]}", other)
    seconds, num_bytes, _ = measures(other)
    ours, own_bytes, _ = measures(best)
    if num_bytes > other.limit_bytes:
        over, room = bytes_apart(num_bytes, other.limit_bytes)
        ratio = times(num_bytes, other.limit_bytes)
        text = f"{lead} does not fit: {over} of {room} ({ratio}; here {format_bytes(own_bytes)})"
        return Reason(choice, text, other)
    mine, theirs = causes(best), causes(other)
    more = {k: theirs.get(k, 0.0) - mine.get(k, 0.0) for k in {*mine, *theirs}}
    sign = 1 if seconds >= ours else -1
    most = max(sorted(more), key=lambda k: sign * more[k])
    after, before = seconds_apart(seconds, ours)
    slower = f"{seconds / ours - 1:+z.1%}"
    takes = f"takes {after} instead of {before} ({slower}), {most} {sign_of(more[most])}"
    if after == before and slower == "+0.0%":
        takes = f"takes {before} as here"
    needs, here = format_bytes(num_bytes), format_bytes(own_bytes)
    if goal == "memory":
        needs = f"needs {needs} instead of {here} ({num_bytes / own_bytes - 1:+z.1%})"
        return Reason(choice, f"{lead} {needs}; {takes}", other)
    memory = f"memory {needs} instead of {here}" if needs != here else f"memory {here} as here"
    return Reason(choice, f"{lead} {takes}; {memory}", other)


def why(
    job: Job,
    best: Prediction,
    goal: str = "time",
    admitted: Callable[[Plan], bool] = lambda _: True,
) -> list[Reason]:
    """A reason for every choice of a plan that was simulated; memory comes first where it is the goal. Of a
    change that is better, and was not `admitted` among the plans it is chosen from, the sentence says so."""
    plan, found = Plan.parse(best.plan), list[Reason]()
    for choice, changed in (*changes(job, plan), *_one_layer_moved(best, plan)):
        if changed == plan:
            continue
        told = reason(job, best, choice, changed, goal)
        out = _is_better(told.changed, best, goal) and not admitted(changed)
        found.append(replace(told, text=told.text + OUT) if out else told)
    return found


def _one_layer_moved(best: Prediction, plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Where the split is the balanced one, a layer moved from the stage that takes longest to the one that
    takes least. An `auto` schedule is of the split that it was made for."""
    at, timed = layers_of(best), best.timed
    if plan.mesh.pp == 1 or plan.pipeline.split or plan.pipeline.costs or timed is None:
        return
    seconds = [s.forward_s + s.backward_s for s in timed.stages]
    stages = sorted(range(len(at)), key=lambda stage: seconds[stage])
    giver = next((stage for stage in reversed(stages) if at[stage] > 1), None)
    if giver is not None:
        taker = next(stage for stage in stages if stage != giver)
        moved = (n + (i == taker) - (i == giver) for i, n in enumerate(at))
        yield "even split", plan.with_("pipeline", split=tuple(moved))


def _is_better(changed: Prediction, best: Prediction, goal: str) -> bool:
    """Whether a change fits, and is faster, or smaller where memory is the goal."""
    if not changed.fits:
        return False
    at = int(goal == "memory")
    return round(measures(changed)[at] / measures(best)[at], 3) < 1


def _plain(plan: Plan) -> Plan:
    """The plan without a ZeRO stage that has nothing to cut."""
    return plan if plan.mesh.dp_shard > 1 else plan.with_("data", zero_stage=Plan().data.zero_stage)


def beside(job: Job, named: Prediction, goal: str = "time") -> list[str]:
    """Of a plan that a user names and that fits: what binds, the change of one choice that makes it fastest,
    and the reason for every choice, memory first where it is the goal."""
    reasons, (ours, _, _) = why(job, named, goal), measures(named)
    fits = [r for r in reasons if r.changed.fits and r.changed.step_time_s is not None]
    best = min(fits, key=lambda r: measures(r.changed)[0], default=None)
    told = "no change of one choice alone makes it faster"
    if best is not None and round((seconds := measures(best.changed)[0]) / ours, 3) < 1:
        told = (
            f"faster by one change, of {best.choice}: {best.changed.plan} takes {format_seconds(seconds)} "
            f"({seconds / ours - 1:+z.1%})"
        )
    return [binds(job, named), told, *(r.text for r in reasons)]


def binds(job: Job, best: Prediction) -> str:
    """What holds the plan: memory, the bubble, and the dearest axis with the link it crosses."""
    seconds, num_bytes, _ = measures(best)
    found = causes(best)
    text = (
        f"memory {format_bytes(num_bytes)} of {format_bytes(best.limit_bytes)} "
        f"({num_bytes / best.limit_bytes:.0%}); of the step of the critical rank compute "
        f"{found['compute'] / seconds:.1%}, bubble {found['bubble'] / seconds:.1%}"
    )
    text += _beside(job, best)
    comm = best.time["exposed_comm_s"]
    if not any(comm.values()):
        return f"binds: {text}, no collective is waited for"
    axis = max(comm, key=lambda a: comm[a])
    assert best.laid is not None
    names = tuple(axis.split("."))
    known = all(a in PRODUCT_ORDER for a in names)
    name = job.cluster.link_for(group_of(best.laid, names, job.cluster)).name if known else ""
    link = f"the {name} link" if known else "its own link"
    return f"binds: {text}, {axis} {comm[axis] / seconds:.1%} on {link}"


def _beside(job: Job, best: Prediction) -> str:
    """What a plan that offloads holds on the host of a node, and of how much."""
    cluster, laid = job.cluster, best.laid
    assert laid is not None
    ranks = min(cluster.devices_per_node, laid.mesh.world_size)
    places = range(laid.schedule.num_ranks)
    held = ranks * max(arena_ledger(laid, place, "host").peak_bytes for place in places)
    if not held:
        return ""
    room = cluster.host_memory_bytes
    if room is None:
        return (
            f"; {format_bytes(held)} on the host of a node, whose room the cluster does not state"
        )
    return f"; {format_bytes(held)} of {format_bytes(room)} on the host of a node"

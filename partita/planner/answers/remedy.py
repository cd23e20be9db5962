"""What makes a plan that is too big fit: one change, then two, then three together, cheapest
first.

    recompute:selective, recompute:full     bf16     +sp     smaller microbatches, of the same batch
    1f1b, v_half, v_min                     ZeRO stages, replicas made shards
    twice the tp, cp, pp                    from spare devices, else from data parallelism
    offload:cpu                             optimizer states in host memory

Each is weighed; one that fits is simulated: a remedy is a whole plan that fits, and takes the time that is
said (tests apply each).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from partita.simulate.predict import Prediction, simulate, weigh
from partita.spec.job import Job
from partita.spec.mesh import divisors
from partita.spec.plan import Plan, has_fixed_stages

HELPFUL = 6  # changes that save most, of which three are tried together


@dataclass(frozen=True)
class Remedy:
    """Names of changes, and what `simulate` says of the plan with them."""

    names: tuple[str, ...]
    prediction: Prediction

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(x.peak_bytes for x in self.prediction.ledgers)


def changes(job: Job, plan: Plan) -> dict[str, Plan]:
    """Plans one change away that may need less memory, by the change's name."""
    m, found = plan.mesh, dict[str, Plan]()
    if plan.recompute.mode == "none":
        found["recompute:selective"] = plan.with_("recompute", mode="selective")
    if plan.recompute.mode != "full" or plan.recompute.every > 1:
        found["recompute:full"] = plan.with_("recompute", mode="full", every=1)
    if plan.precision.dtype in ("fp32", "fp64"):
        found["bf16"] = plan.with_("precision", dtype="bf16")
    if m.tp > 1 and not m.sp and job.model.image is None:
        found["+sp"] = plan.with_("mesh", sp=True)
    for zero in range(plan.data.zero_stage + 1 if m.dp_shard > 1 else 4, 4):
        found[f"zero{zero}"] = plan.with_("data", zero_stage=zero)
    if m.dp_replicate > 1:
        shards = plan.with_("mesh", dp_shard=m.dp_shard * m.dp_replicate, dp_replicate=1)
        for zero in (1, 3):
            found[f"dp_shard.zero{zero}"] = shards.with_("data", zero_stage=zero)
    if job.train.micro_batch_size is None:
        found["smaller microbatches"] = _smaller(job, plan)
    found |= _schedules(plan)
    images = job.model.image is not None
    for axis in ("tp", "cp", "pp", *(("split",) if images else ())):
        found[f"twice the {axis}"] = _twice(job, plan, axis)
    if plan.offload.to == "none":
        found["offload:cpu"] = plan.with_("offload", to="cpu")
    return {name: other for name, other in found.items() if other != plan}


def _schedules(plan: Plan) -> dict[str, Plan]:
    """Schedules that hold fewer microbatches at once."""
    name = plan.pipeline.schedule
    if plan.mesh.pp == 1:
        return {}
    less = ("v_half", "v_min") if name in ("1f1b", "zb_h1") or has_fixed_stages(name) else ("1f1b",)
    pipes = {n: {"schedule": n, "virtual_stages": 2 if n != "1f1b" else 1} for n in less}
    plain = plan.with_("pipeline", split=(), costs=(), limit=0, copies=1)
    return {n: plain.with_("pipeline", **fields) for n, fields in pipes.items()}


def _smaller(job: Job, plan: Plan) -> Plan:
    """The next larger number of microbatches."""
    every = divisors(job.train.global_batch_size // plan.data_parallel_size)
    more = [n for n in every if n > plan.num_microbatches]
    return plan.with_("pipeline", num_microbatches=more[0]) if more else plan


def _twice(job: Job, plan: Plan, axis: str) -> Plan:
    """An axis twice as large, and samples cut into microbatches no larger than they were."""
    m, size = plan.mesh, getattr(plan.mesh, axis)
    changed = plan.with_("mesh", **{axis: 2 * size})
    if 2 * plan.world_size > job.cluster.devices:
        into = "dp_replicate" if m.dp_replicate % 2 == 0 else "dp_shard"
        if getattr(m, into) % 2:
            return plan
        changed = changed.with_("mesh", **{into: getattr(m, into) // 2})
    if axis == "tp" and job.model.image is None:
        changed = changed.with_("mesh", sp=True)
    if axis == "cp" and job.model.image is not None:
        changed = changed.with_("context", method="halo")
    if axis == "pp":
        changed = changed.with_("pipeline", split=(), costs=(), limit=0)
    samples, ways = job.train.global_batch_size, changed.data_parallel_size
    least = plan.num_microbatches * plan.data_parallel_size // ways
    least = max(least, 2 * changed.mesh.pp if axis == "pp" else 1)
    fits = [n for n in divisors(samples // ways) if n >= least] if samples % ways == 0 else []
    return changed.with_("pipeline", num_microbatches=fits[0]) if fits else plan


def _together(job: Job, plan: Plan, names: tuple[str, ...]) -> Plan | None:
    for name in names:
        other = changes(job, plan).get(name)
        if other is None:
            return None
        plan = other
    return plan


def remedies(job: Job) -> list[Remedy]:
    """The fewest changes that make the job fit its cluster, the three fastest first."""
    saves: dict[str, int] = {}
    for count in (1, 2, 3):
        found = []
        names = tuple(changes(job, job.plan))
        if count == 3:
            names = tuple(sorted(saves, key=lambda n: saves[n])[:HELPFUL])
        for chosen, plan in _tried(job, names, count):
            held = weigh(job.with_plan(plan))  # most do not fit: what they take is never asked
            if held is not None and count == 1:
                saves[chosen[0]] = held.peak_bytes
            if held is not None and held.fits:
                found.append(Remedy(chosen, simulate(job.with_plan(plan))))
        if found:
            return sorted(found, key=lambda r: r.prediction.step_time_s or 0.0)[:3]
    return []


def _tried(job: Job, names: tuple[str, ...], count: int) -> Iterator[tuple[tuple[str, ...], Plan]]:
    """Combinations of so many changes, and the plan with them, each plan once."""
    seen: set[Plan] = set()
    for chosen in combinations(names, count):
        plan = _together(job, job.plan, chosen)
        if plan is None or plan in seen or plan.world_size > job.cluster.devices:
            continue
        seen.add(plan)
        yield chosen, plan

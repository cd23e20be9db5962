"""What a plan will cost, before anything runs: time by cause, memory by category, traffic by site.

Every number is read off the laid program that the runtime executes: kernels (work.py), collectives and
stages (stage.py), the schedule's clock (pipeline.py), what runs once a step (step.py), bytes (memory.py).
Ranks of a node that share compute units run slower by (busy ranks / units) when more are busy than
there are units, in what they compute and in what they copy to each other; and by what was measured of
the crowding in caches and memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from partita.base.errors import Problem
from partita.base.units import format_bytes, format_seconds
from partita.cost.empirical import SLOW
from partita.cost.machine import Machine, machine_of
from partita.parallel.laid import Laid, Request, lay, problems
from partita.parallel.pp.rules import in_force, schedule_of
from partita.parallel.read import flops
from partita.record.ledger import Ledger
from partita.record.span import Span
from partita.record.transfer import TrafficLine
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule
from partita.simulate.imbalance import Load, straggler
from partita.simulate.memory import arena_ledger, stage_ledger
from partita.simulate.pipeline import Played, play
from partita.simulate.stage import (
    PartTimes,
    StageTime,
    Works,
    send_seconds,
    stage_time,
    with_actions,
    works_of,
)  # fmt: skip
from partita.simulate.step import StepTime, stage_update_s, step_time
from partita.simulate.unequal import limits, machine_at, peak_flops
from partita.spec.cluster import Cluster
from partita.spec.job import Job, require_job
from partita.spec.program import distinct
from partita.spec.train import passes_of, states_of


@dataclass(frozen=True)
class Prediction:
    """The answer of `simulate`; numbers are None where the plan is illegal."""

    plan: str
    problems: tuple[Problem, ...]
    fits: bool
    device: str = ""
    laid: Laid | None = None
    schedule: Schedule | None = None
    played: Played | None = None
    ledgers: tuple[Ledger, ...] = ()  # one for each stage
    step_time_s: float | None = None
    tokens_per_step: int = 0
    limit_bytes: int = 0  # of the fullest
    limits: tuple[int, ...] = ()  # one for each place of pp, where devices differ
    time: dict[str, Any] = field(default_factory=dict)
    mfu: float | None = None
    hfu: float | None = None
    bubble_fraction: float | None = None
    job: Job | None = field(default=None, compare=False, repr=False)
    timed: Timed | None = field(default=None, compare=False, repr=False)
    load: Load | None = None  # of experts, after drops, where it was given

    def to_json(self) -> dict[str, Any]:
        """The document of `simulate --json` (docs: contract)."""
        from partita.simulate.answer import to_json

        return to_json(self)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The schedule as it was played."""
        return self.played.spans if self.played is not None else ()

    @cached_property
    def traffic(self) -> tuple[TrafficLine, ...]:
        """What the busiest rank sends in a step."""
        if self.laid is None:
            return ()
        ranks = [self.laid.mesh.rank_of({"pp": place}) for place in range(self.laid.sizes["pp"])]
        sent = [tuple(self.laid.traffic(rank)) for rank in ranks]
        return max(sent, key=lambda lines: sum(t.bytes for t in lines))

    @property
    def fullest(self) -> Ledger:
        """That of the ranks whose devices are fullest, the first of those alike."""
        if len(set(self.limits)) < 2:
            return max(self.ledgers, key=lambda x: x.peak_bytes)
        return self.ledgers[fullest_of(self.ledgers, self.limits)]

    @property
    def verdict(self) -> str:
        """The answer in a line: what is wrong first, by how much the fullest rank is too full, or that it
        fits."""
        wrong = next((p for p in self.problems if p.severity == "error"), None)
        if wrong is not None:
            return f"{self.plan}: {wrong.room}: {wrong.message}"
        peak = self.fullest.peak_bytes
        fits = "fits" if self.fits else "does not fit"
        sizes = f"{format_bytes(peak)} of {format_bytes(self.limit_bytes)}"
        return f"{self.plan} {fits}: {sizes} on the fullest rank"

    def head(self) -> str:
        """The plan, its problems, and the step; the rest follows in `str`."""
        lines = [f"plan    {self.plan}"]
        lines += [f"{p.room:<8}{p.severity}: {p.message}" for p in self.problems]
        if self.step_time_s is not None:
            lines.append(
                f"step    {format_seconds(self.step_time_s)}, bubble {self.bubble_fraction:.1%}, "
                f"MFU {self.mfu:.1%}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        from partita.simulate.told import told

        return told(self)


def request_of(job: Job) -> Request:
    """What the rooms are asked, from a job."""
    words = len(states_of(job.train.optimizer, job.train.momentum))
    return Request(
        job.plan, job.model, job.train.seq_len, job.micro_batch_size, words, job.frozen,
        packed=job.data.documents is not None,
        update_passes=passes_of(job.train.optimizer, job.train.momentum),
    )  # fmt: skip


def simulate(job: Job, machine: Machine | None = None, load: Load | None = None) -> Prediction:
    """Predicts one step of the job, on a machine that reaches what the constants of its device say. `load`:
    what each expert gets; evenly, unless given. Never raises for an illegal plan: its problems are the
    answer."""
    require_job(job, "simulate")
    request = request_of(job)
    found = (*job.problems(), *problems(request))
    if any(p.severity == "error" for p in found):
        return Prediction(str(job.plan), found, False)
    laid, machine = lay(request), machine or machine_of(job.cluster)
    if load is None or not job.model.experts:
        return _predicted(job, laid, machine, found)
    load = load.limited(job.model.capacity_factor)
    return replace(_predicted(job, straggler(laid, load), machine, found), load=load)


@dataclass(frozen=True)
class Weighed:
    """What a plan holds: a ledger for each place of pp, and whether all fits. No time is priced."""

    ledgers: tuple[Ledger, ...]
    fits: bool

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(x.peak_bytes for x in self.ledgers)


def weigh(job: Job) -> Weighed | None:
    """What `simulate` says of the job's memory alone; None where its plan is illegal."""
    if any(p.severity == "error" for p in wrongs(job)):
        return None
    return _weighed(lay(request_of(job)), job.cluster)


def wrongs(job: Job) -> list[Problem]:
    """What is wrong with a job and its plan, warnings too."""
    return [*job.problems(), *problems(request_of(job))]


def _weighed(laid: Laid, cluster: Cluster) -> Weighed:
    places, room = range(laid.schedule.num_ranks), limits(laid, cluster)
    ledgers = tuple(stage_ledger(laid, p, laid.schedule, cluster) for p in places)
    inside = all(x.peak_bytes <= most for x, most in zip(ledgers, room, strict=True))
    return Weighed(ledgers, inside and _fits_beside(laid, cluster))


@dataclass(frozen=True)
class Timed:
    """The times of a laid plan: stages, the schedule played with their `costs`, and what runs once a step.
    `pipeline_s`: the schedule's, of a rank alone where the next step may begin before all have ended this
    one."""

    machine: Machine
    works: Works
    costs: Costs
    stages: tuple[StageTime, ...]
    played: Played
    step: StepTime
    busy: float  # slow-down where ranks share compute units
    pipeline_s: float
    waits_s: float  # what an F, and a B or I, waits for its messages

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.pipeline_s + self.step.seconds


def timed(laid: Laid, machine: Machine, num_microbatches: int, works: Works | None = None) -> Timed:
    """Everything that takes time in a step of so many microbatches."""
    plan, works = laid.request.plan, works or works_of(laid)
    known: PartTimes = {}
    own = [machine_at(laid, s.places, machine) for s in laid.stages]
    alone = (
        stage_time(w, laid, mine, known if mine is machine else None)
        for w, mine in zip(works.stages, own, strict=True)
    )
    stages = tuple(with_actions(s, machine) for s in alone)

    def make(m: int) -> Schedule:
        return schedule_of(plan.with_("pipeline", num_microbatches=m))

    waits, message = waiting(send_seconds(laid, works.stages, machine), machine)
    updates = stage_update_s(works, laid, machine)

    def at(busy: float) -> tuple[Costs, Played]:
        each = zip(stages, updates, strict=True)
        costs = Costs(tuple(stage_costs(s, busy, waits * busy, u) for s, u in each), *message)
        return costs, play(make, plan.mesh.pp, num_microbatches, costs)

    busy, (costs, played) = 1.0, at(1.0)
    if machine.cluster.cores_shared:
        crowded = machine.cluster.crowded(_on_a_node(laid, machine.cluster))
        busy = crowded * _slow_down(played, laid, machine.cluster)
        costs, played = at(busy)
    published = machine.software.validates_after and plan.pipeline.schedule.startswith("zb_")
    after = published or in_force(plan).pipeline.post_validation
    pipeline_s = played.own if after else played.seconds
    step = step_time(laid, works, stages, machine, _ranks_a_unit(laid, machine.cluster))
    return Timed(machine, works, costs, stages, played, step, busy, pipeline_s, waits * busy)


def waiting(message: tuple[float, float], machine: Machine) -> tuple[float, tuple[float, float]]:
    """What an action waits for its messages, in seconds, and what messages (as send_seconds tells them)
    travel beside compute."""
    if machine.software.sends_block and message[0]:
        return message[0] + machine.software.restart_s, (0.0, 0.0)
    return 0.0, message


def _predicted(job: Job, laid: Laid, machine: Machine, found: tuple[Problem, ...]) -> Prediction:
    cluster, m = job.cluster, job.plan.num_microbatches
    t = timed(laid, machine, m)
    step_s, places = t.seconds, range(laid.schedule.num_ranks)
    held = _weighed(laid, cluster)
    tokens = job.train.global_batch_size * job.train.seq_len
    peak = peak_flops(laid, cluster, job.plan.precision.dtype)
    model_flops = tokens * job.model.train_flops_per_token(job.train.seq_len, "model_causal")
    again = _replay_flops(laid) * m * job.plan.world_size
    room = limits(laid, cluster)
    busy_s = sum(t.played.busy) / len(places)  # rounding may have it above the pipeline's span
    return Prediction(
        plan=str(job.plan), problems=found,
        fits=held.fits, device=cluster.device, laid=laid, schedule=laid.schedule, played=t.played,
        ledgers=held.ledgers,
        step_time_s=step_s, tokens_per_step=tokens, limits=room,
        limit_bytes=room[fullest_of(held.ledgers, room)],
        bubble_fraction=max(t.pipeline_s - busy_s, 0.0) / step_s if step_s else 0.0,
        time=_causes(t, laid.schedule), mfu=model_flops / (step_s * peak),
        hfu=(model_flops + again) / (step_s * peak), job=job, timed=t,
    )  # fmt: skip


def _fits_beside(laid: Laid, cluster: Cluster) -> bool:
    """Whether what a node's ranks put on its host and its disk has room there, where the cluster says."""
    rooms = {"host": cluster.host_memory_bytes, "disk": cluster.disk_bytes}
    alike = min(cluster.devices_per_node, laid.mesh.world_size)
    return all(
        room is None or alike * arena_ledger(laid, place, arena).peak_bytes <= room
        for arena, room in rooms.items()
        for place in range(laid.schedule.num_ranks)
    )


def _causes(t: Timed, schedule: Schedule) -> dict[str, Any]:
    """The step of the busiest rank by cause; the parts add up to the step."""
    busiest = max(range(schedule.num_ranks), key=lambda p: t.played.busy[p])
    compute = 0.0
    comm: dict[str, float] = {}
    pairs = Counter(a.stage for a in schedule.ranks[busiest] if a in schedule.beside)
    for index, times in Counter(a.stage for a in schedule.ranks[busiest] if a.kind == "F").items():
        if hidden := pairs[index] * t.costs.stages[index].hidden:
            comm["ep"] = comm.get("ep", 0.0) - hidden
        stage = t.stages[index]  # its backward follows on the same rank
        waiting = stage.host_forward_s + stage.host_backward_s
        compute += times * ((stage.forward_s + stage.backward_s) * t.busy + waiting)
        for part in (stage.comm_forward_s, stage.comm_backward_s):
            for axis, s in part.items():
                comm[axis] = comm.get(axis, 0.0) + times * s * t.busy
    own = (a.stage for a in schedule.ranks[busiest] if a.kind == "U")
    updates = sum(t.costs.stages[stage].U for stage in own)
    bubble = t.pipeline_s - compute - updates - sum(comm.values())
    for axis, s in t.step.comm_s.items():
        comm[axis] = comm.get(axis, 0.0) + s
    return {
        "compute_s": compute, "exposed_comm_s": comm, "bubble_s": max(bubble, 0.0),
        "optimizer_s": t.step.optimizer_s + updates,
    }  # fmt: skip


def measures(p: Prediction) -> tuple[float, int, int]:
    """Step time, bytes of the fullest rank, ranks."""
    assert p.laid is not None and p.step_time_s is not None
    return p.step_time_s, p.fullest.peak_bytes, p.laid.mesh.world_size


def fullest_of(ledgers: Sequence[Ledger], room: Sequence[int]) -> int:
    """The place of pp whose ranks fill most of their devices."""
    return max(range(len(room)), key=lambda place: ledgers[place].peak_bytes / room[place])


def layers_of(p: Prediction) -> tuple[int, ...]:
    """Layers of each stage."""
    stages = p.laid.stages if p.laid is not None else ()
    return tuple(sum(n.startswith("blocks.") for n in s.names) for s in stages)


def stage_costs(s: StageTime, busy: float, waits: float, update: float = 0.0) -> StageCosts:
    """What the clock is told of a stage. `waits`: seconds that an action waits for its messages; `update`: of
    a U, where the schedule has any. Rows of
    experts travel under compute of the microbatch that is paired (pp/pieces.py); a forward has pieces for as
    many legs as it has itself: where layers run again, for half of those that go back."""
    forward = (s.forward_s + sum(s.comm_forward_s.values())) * busy + s.host_forward_s + waits
    rest = sum(s.comm_backward_s.values()) * busy + s.host_backward_s + waits
    there, back = (x.get("ep", 0.0) for x in (s.comm_forward_s, s.comm_backward_s))
    travel = there + min(there, back)
    compute = (s.forward_s + s.backward_s) * busy
    hidden = (1 - SLOW) * min(travel, compute)
    back = s.input_s * busy + rest, s.weight_s * busy
    return StageCosts(forward, *back, U=update * busy, hidden=hidden)


def _slow_down(played: Played, laid: Laid, cluster: Cluster) -> float:
    """How much longer the schedule takes where ranks share units than where each has one: whenever more
    compute than there are units, they take turns; a unit that nobody wants stays idle."""
    each = _ranks_a_unit(laid, cluster, 0.0) / len(played.busy)
    changes = sorted((at, way) for s in played.spans for at, way in ((s.start_s, 1), (s.end_s, -1)))
    longer, count, last = 0.0, 0, 0.0
    for at, way in changes:
        longer += max(count * each - 1.0, 0.0) * (at - last)
        count, last = count + way, at
    return 1.0 + longer / last if last else 1.0


def _ranks_a_unit(laid: Laid, cluster: Cluster, least: float = 1.0) -> float:
    """Ranks of a node over its compute units, where they share them, at least `least`."""
    if not cluster.cores_shared:
        return 1.0
    return max(least, _on_a_node(laid, cluster) / cluster.cores_shared)


def _on_a_node(laid: Laid, cluster: Cluster) -> int:
    return min(cluster.devices_per_node, laid.mesh.world_size)


def _replay_flops(laid: Laid) -> float:
    """FLOPs that recomputation repeats, of a microbatch on the busiest rank of each stage, averaged."""
    per_stage = [
        sum(n * flops(b, laid.sizes)["replay"] for b, n in distinct(s.blocks)) for s in laid.stages
    ]
    return sum(per_stage) / len(per_stage)

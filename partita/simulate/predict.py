"""What a plan will cost, before anything runs: time by cause, memory by category, traffic by site.

Every number is read off the laid program that the runtime executes. Time is a plain roofline and
alpha-beta on the schedule's clock; tensor-parallel collectives count as exposed, the gradient reduction is
hidden under the backward of the last microbatch as far as it fits. Ranks of a node that share compute units
run slower by (busy ranks / units) when more are busy than there are units.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from partita.base.errors import Problem
from partita.base.text import table
from partita.base.units import format_bytes, format_seconds
from partita.cost.comm import AlphaBeta, seconds
from partita.cost.compute import Rates
from partita.parallel.laid import Laid, Request, lay, problems
from partita.parallel.read import backward_factor, op_flops, replayed, tensor_bytes
from partita.parallel.room import ACROSS
from partita.record.ledger import Ledger
from partita.record.span import Span
from partita.record.transfer import TrafficLine
from partita.schedule.clock import Costs, StageCosts, clock, makespan
from partita.schedule.ir import Schedule
from partita.simulate.memory import stage_ledger
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.program import Block, Op


@dataclass(frozen=True)
class StageTime:
    """Seconds of one microbatch at a stage, on a core of its own: compute and exposed collectives."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    comm_forward_s: dict[str, float] = field(default_factory=dict)
    comm_backward_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """The answer of `simulate`; numbers are None where the plan is illegal."""

    plan: str
    problems: tuple[Problem, ...]
    fits: bool
    laid: Laid | None = None
    schedule: Schedule | None = None
    spans: tuple[Span, ...] = ()
    ledgers: tuple[Ledger, ...] = ()  # one for each stage
    traffic: tuple[TrafficLine, ...] = ()
    step_time_s: float | None = None
    tokens_per_step: int = 0
    limit_bytes: int = 0
    time: dict[str, Any] = field(default_factory=dict)
    mfu: float | None = None
    hfu: float | None = None
    bubble_fraction: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The document of `simulate --json` (docs: contract)."""
        from partita.simulate.answer import to_json

        return to_json(self)

    def __str__(self) -> str:
        lines = [f"plan    {self.plan}"]
        lines += [f"{p.room:<8}{p.severity}: {p.message}" for p in self.problems]
        if self.step_time_s is None:
            return "\n".join(lines)
        worst = max(self.ledgers, key=lambda x: x.peak_bytes)
        lines.append(
            f"step    {format_seconds(self.step_time_s)}, bubble {self.bubble_fraction:.1%}, "
            f"MFU {self.mfu:.1%}"
        )
        rows = [[k, format_bytes(v)] for k, v in worst.at_peak.items()]
        rows.append(
            ["total", f"{format_bytes(worst.peak_bytes)} of {format_bytes(self.limit_bytes)}"]
        )
        return "\n".join(lines) + f"\nmemory of rank {worst.rank} (the fullest)\n" + table(rows)


def request_of(job: Job) -> Request:
    """What the rooms are asked, from a job."""
    words = 2 if job.train.optimizer == "adamw" else int(job.train.momentum > 0)
    return Request(job.plan, job.model, job.train.seq_len, job.micro_batch_size, words)


def simulate(job: Job) -> Prediction:
    """Predicts one step of the job. Never raises for an illegal plan: its problems are the answer."""
    request = request_of(job)
    found = (*job.problems(), *problems(request))
    if any(p.severity == "error" for p in found):
        return Prediction(str(job.plan), found, False)
    laid = lay(request)
    return _predicted(job, laid, laid.schedule, found)


def _predicted(job: Job, laid: Laid, schedule: Schedule, found: tuple[Problem, ...]) -> Prediction:
    cluster, m = job.cluster, job.plan.num_microbatches
    stages = [
        _stage_time(laid, i, cluster, job.plan.precision.dtype) for i in range(schedule.num_stages)
    ]
    send_s = _send_seconds(laid, cluster)
    busy = 1.0
    spans: list[Span] = []
    for _ in range(4):  # the slow-down depends on how many ranks are busy, and they on it
        costs = Costs(tuple(_costs(s, busy) for s in stages), send_s)
        spans = clock(schedule, costs)
        busy = _slow_down(spans, stages, schedule, laid, cluster)
    pipeline_s = makespan(spans)
    places = range(schedule.num_ranks)
    reduce_s = max(_reduce_seconds(laid, p, stages, busy, cluster) for p in places)
    ledgers = tuple(stage_ledger(laid, p, schedule) for p in places)
    optimizer_s = max(_optimizer_seconds(x, cluster) for x in ledgers) * busy
    critical = max(places, key=lambda p: sum(s.duration_s for s in spans if s.rank == p))
    compute_s, comm = 0.0, {}
    for action in schedule.ranks[critical]:
        if action.kind == "F":  # its backward follows on the same rank
            time = stages[action.stage]
            compute_s += (time.forward_s + time.backward_s) * busy
            for part in (time.comm_forward_s, time.comm_backward_s):
                for axis, s in part.items():
                    comm[axis] = comm.get(axis, 0.0) + s
    bubble_s = max(pipeline_s - compute_s - sum(comm.values()), 0.0)
    if reduce_s:
        comm["dp"] = reduce_s
    step_s = pipeline_s + reduce_s + optimizer_s
    tokens = job.train.global_batch_size * job.train.seq_len
    peak = Rates(cluster.peak_flops, 1.0).of(job.plan.precision.dtype)
    devices = min(job.plan.world_size, _units(cluster, job.plan.world_size))
    model_flops = tokens * job.model.train_flops_per_token(job.train.seq_len, "model_causal")
    again = _replay_flops(laid) * m * job.plan.world_size
    limit = int(cluster.memory_limit_bytes)
    fits = all(x.peak_bytes <= limit for x in ledgers)
    work = sum(s.duration_s for s in spans)
    busiest = max(places, key=lambda p: sum(t.bytes for t in _traffic(laid, p)))
    heaviest = laid.mesh.rank_of({"pp": busiest})
    return Prediction(
        plan=str(job.plan), problems=found, fits=fits, laid=laid, schedule=schedule, spans=tuple(spans),
        ledgers=ledgers, traffic=tuple(laid.traffic(heaviest)), step_time_s=step_s, tokens_per_step=tokens,
        limit_bytes=limit, bubble_fraction=1 - work / (len(places) * step_s) if step_s else 0.0,
        time={
            "compute_s": compute_s, "exposed_comm_s": comm, "bubble_s": bubble_s,
            "optimizer_s": optimizer_s,
        },
        mfu=model_flops / (step_s * devices * peak),
        hfu=(model_flops + again) / (step_s * devices * peak),
    )  # fmt: skip


def _traffic(laid: Laid, place: int) -> list[TrafficLine]:
    return laid.traffic(laid.mesh.rank_of({"pp": place}))


def _units(cluster: Cluster, world: int) -> int:
    """Compute units that do the work: devices, or the cores that CPU ranks share."""
    return min(world, cluster.cores_shared) if cluster.cores_shared else world


def _costs(s: StageTime, busy: float) -> StageCosts:
    forward = s.forward_s * busy + sum(s.comm_forward_s.values())
    backward = s.backward_s * busy + sum(s.comm_backward_s.values())
    return StageCosts(forward, backward / 2, backward / 2)


def _slow_down(
    spans: list[Span], stages: list[StageTime], schedule: Schedule, laid: Laid, cluster: Cluster
) -> float:
    """Busy ranks over compute units, at least 1: the mean over the step of those that compute."""
    if not cluster.cores_shared:
        return 1.0
    total = makespan(spans)
    alike = laid.mesh.world_size // schedule.num_ranks
    work = sum(s.duration_s for s in spans) / total if total else 1.0
    on_node = min(cluster.devices_per_node, laid.mesh.world_size) / laid.mesh.world_size
    return max(1.0, work * alike * on_node / cluster.cores_shared)


def _rates(cluster: Cluster) -> Rates:
    return Rates(cluster.peak_flops, cluster.memory_bytes_per_s)


def _stage_time(laid: Laid, stage: int, cluster: Cluster, dtype: str) -> StageTime:
    """Adds up the stage's blocks, each distinct block once."""
    forward = backward = 0.0
    known: dict[int, tuple[float, float]] = {}
    for block in laid.stages[stage].blocks:
        if id(block) not in known:
            known[id(block)] = _block_seconds(block, laid, cluster, dtype)
        forward, backward = forward + known[id(block)][0], backward + known[id(block)][1]
    comm: dict[str, dict[str, float]] = {"F": {}, "B": {}}
    for call, _ in laid.stage_calls(stage):
        if call.phase in comm and call.collective != "send":
            axis = ".".join(call.axes)
            s = call.times * _call_seconds(call.axes, call.collective, call.bytes, laid, cluster)
            comm[call.phase][axis] = comm[call.phase].get(axis, 0.0) + s
    return StageTime(forward, backward, comm["F"], comm["B"])


def _block_seconds(block: Block, laid: Laid, cluster: Cluster, dtype: str) -> tuple[float, float]:
    rates = _rates(cluster)

    def one(op: Op) -> float:
        if op.is_region or op.kind == "lookup":
            return 0.0
        names = (*op.reads, op.writes, *op.weights)
        size = sum(tensor_bytes(block.tensors[n], laid.sizes) for n in names)
        return rates.seconds(op_flops(op, laid.sizes), size, dtype)

    forward = sum(map(one, block.ops()))
    backward = sum(backward_factor(op) * one(op) for op in block.ops())
    return forward, backward + sum(map(one, replayed(block)))


def _link(ranks: tuple[int, ...], cluster: Cluster) -> AlphaBeta:
    link = cluster.link_for(ranks)
    return AlphaBeta(link.latency_s, link.bytes_per_s)


def _call_seconds(
    axes: tuple[str, ...], collective: str, size: int, laid: Laid, cluster: Cluster
) -> float:
    ranks = group_of(laid, axes)
    return seconds(collective, len(ranks), size, _link(ranks, cluster)) if len(ranks) > 1 else 0.0


def group_of(laid: Laid, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Rank 0's group over a product of axes; 'tied' and 'pp/copy' are the places of pp that hold one
    weight, 'tp/share' the tp ranks that hold the same kv head."""
    plain = [a for a in axes if a not in (*ACROSS, "tp/share")]
    for name in ACROSS:
        if name in axes:
            return tuple(laid.mesh.rank_of({"pp": place}) for place in laid.pairs[name][0])
    if "tp/share" not in axes:
        return laid.mesh.group(0, *plain)
    share = laid.sizes["tp"] // laid.request.model.kv_heads
    return tuple(r for r in laid.mesh.group(0, *plain, "tp") if laid.mesh.coords(r)["tp"] < share)


def _send_seconds(laid: Laid, cluster: Cluster) -> float:
    found = [
        seconds("send", 2, call.bytes, _link(laid.mesh.group(0, "pp")[:2], cluster))
        for s in laid.stages for call, _ in laid.stage_calls(s.index) if call.collective == "send"
    ]  # fmt: skip
    return max(found, default=0.0)


def _reduce_seconds(
    laid: Laid, place: int, stages: list[StageTime], busy: float, cluster: Cluster
) -> float:
    """What of the step's collectives is not hidden under the last microbatch's backward."""
    total = hidden = 0.0
    for call, _ in laid.calls(place):
        if call.phase == "step":
            s = _call_seconds(call.axes, call.collective, call.bytes, laid, cluster)
            total += s
            hidden += s if call.lane == "dp" else 0.0
    blocks = sum(len(s.blocks) for s in laid.stages_of(place))
    backward_s = sum(stages[s.index].backward_s for s in laid.stages_of(place))
    room = backward_s * busy * (blocks - 1) / blocks
    return total - min(hidden, room)


def _optimizer_seconds(ledger: Ledger, cluster: Cluster) -> float:
    """Every state is read and written once, every gradient read."""
    moved = (
        2 * ledger.at_peak["parameters"]
        + ledger.at_peak["gradients"]
        + 2 * ledger.at_peak["optimizer"]
    )
    return moved / cluster.memory_bytes_per_s


def _replay_flops(laid: Laid) -> float:
    """FLOPs that recomputation repeats, of a microbatch on the busiest rank of each stage, averaged."""
    per_stage = [
        sum(op_flops(op, laid.sizes) for b in s.blocks for op in replayed(b)) for s in laid.stages
    ]
    return sum(per_stage) / len(per_stage)

"""Seconds of one microbatch at a stage, and of what happens once a step.

    forward   = max(device: kernels + exposed collectives, host: kernels * host_s)
    backward  = the same of recomputation, input half and weight half

A collective inside a block is exposed, but for what the software runs beside matmuls: in backward a
region's collective beside its readers' weight gradients, in forward in pieces beside its matmul; what is
hidden still takes SLOW of itself from the compute beside it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from partita.cost.comm import group_seconds, seconds
from partita.cost.kernels import kernel_seconds
from partita.cost.machine import Machine
from partita.parallel.laid import Laid
from partita.parallel.read import Call, state_bytes, traffic
from partita.parallel.room import axis_name
from partita.simulate.groups import group_of, place
from partita.simulate.work import BlockWork, block_work
from partita.spec.program import Block

SLOW = 0.2  # [empirical] of a hidden collective's time is lost by the compute beside it
HIDDEN_KINDS = ("copy_to", "gather_from", "scatter_to")
Seconds = defaultdict[str, float]


@dataclass(frozen=True)
class StageTime:
    """Seconds of one microbatch at a stage, on a core of its own: compute by half, and exposed
    collectives by axis and phase. `host_s`: what the device waits for its host, forward and backward."""

    forward_s: float = 0.0
    input_s: float = 0.0  # recomputation included
    weight_s: float = 0.0
    comm_forward_s: dict[str, float] = field(default_factory=dict)
    comm_backward_s: dict[str, float] = field(default_factory=dict)
    host_forward_s: float = 0.0
    host_backward_s: float = 0.0

    @property
    def backward_s(self) -> float:
        """Both halves."""
        return self.input_s + self.weight_s


@dataclass(frozen=True)
class Part:
    """Equal blocks of a stage: how many, the kernels of one, and its calls in a microbatch."""

    times: int
    work: BlockWork
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Work:
    """What a stage runs for one microbatch, its messages, and the bytes of its states by ledger
    category."""

    parts: tuple[Part, ...]
    sends: tuple[Call, ...]
    states: Counter[str]

    @property
    def blocks(self) -> int:
        """Blocks of the stage."""
        return sum(p.times for p in self.parts)


@dataclass(frozen=True)
class Works:
    """All stages, and the calls that a rank at each place of pp makes once a step."""

    stages: tuple[Work, ...]
    once: tuple[tuple[Call, ...], ...]


def works_of(laid: Laid) -> Works:
    """What a plan runs; equal blocks are read once."""
    known: Known = {}
    stages = tuple(stage_work(laid, i, known) for i in range(len(laid.stages)))
    once = []
    for at in range(laid.sizes["pp"]):
        blocks = [b for s in laid.stages_of(at) for b in s.blocks]
        mine = [c for b in blocks for c in known[id(b)][1] if c.phase == "step"]
        once.append((*mine, *laid.step_calls(at)))
    return Works(stages, tuple(once))


Known = dict[int, tuple[BlockWork, tuple[Call, ...]]]


def stage_work(laid: Laid, stage: int, known: Known | None = None) -> Work:
    """Reads the stage's blocks, each distinct block once."""
    known = {} if known is None else known
    blocks = laid.stages[stage].blocks
    one = {id(b): b for b in blocks}
    states: Counter[str] = Counter()
    parts = []
    for key, times in Counter(id(b) for b in blocks).items():
        if key not in known:
            known[key] = _read(one[key], laid)
        work, calls = known[key]
        running = (c for c in calls if c.phase != "step" and c.axes != ("pp",))
        parts.append(Part(times, work, tuple(running)))
        for category, size in state_bytes(one[key], laid.sizes).items():
            states[category] += times * size
    sends = (c for key in one for c in known[key][1] if c.axes == ("pp",))
    return Work(tuple(parts), tuple(sends), states)


def _read(block: Block, laid: Laid) -> tuple[BlockWork, tuple[Call, ...]]:
    dtype = laid.request.plan.precision.dtype
    work = block_work(block, laid.sizes, dtype if dtype == "fp8" else "")
    return work, tuple(traffic(block, laid.sizes))


def stage_time(work: Work, laid: Laid, machine: Machine) -> StageTime:
    """Prices the work on a machine, block by block: a host that is behind in one block does not make
    up for it in the next."""
    total: Seconds = defaultdict(float)
    comm: dict[str, Seconds] = {"F": defaultdict(float), "B": defaultdict(float)}
    for part in work.parts:
        seconds, seen = _part_time(part, laid, machine)
        for name, s in seconds.items():
            total[name] += part.times * s
        for phase, axes in seen.items():
            for axis, s in axes.items():
                comm[phase][axis] += part.times * s
    return StageTime(
        total["F"], total["I"] + total["again"], total["W"], dict(comm["F"]), dict(comm["B"]),
        total["host F"], total["host B"],
    )  # fmt: skip


def _part_time(
    part: Part, laid: Laid, machine: Machine
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Seconds of one block by part, and its exposed collectives by phase and axis."""
    era, w = machine.software, part.work
    kernels = {"F": w.forward, "I": w.input, "W": w.weight, "again": w.again}
    found = {n: sum(kernel_seconds(k, machine) for k in ks) for n, ks in kernels.items()}
    matmuls = {
        n: sum(kernel_seconds(k, machine) for k in ks if k.kind == "matmul")
        for n, ks in kernels.items()
    }
    comm: dict[str, Seconds] = {"F": defaultdict(float), "B": defaultdict(float)}
    hideable: Seconds = defaultdict(float)
    launches = Counter({"F": w.launches[0], "B": w.launches[1]})
    for call in part.calls:
        s = call.times * call_seconds(call, laid, machine)
        where = "F" if call.phase == "F" else "B"
        comm[where][axis_name(call.axes)] += s
        launches[where] += call.times if s else 0
        if call.site.rpartition(":")[2] in HIDDEN_KINDS:
            hideable[where] += s
    beside = matmuls["W"] + (matmuls["I"] if era.overlaps_forward else 0.0)
    seen = {
        "F": _exposed(comm["F"], hideable["F"], matmuls["F"], era.overlaps_forward),
        "B": _exposed(comm["B"], hideable["B"], beside, era.overlaps_backward),
    }
    busy_f = found["F"] + sum(seen["F"].values())
    busy_b = found["I"] + found["again"] + found["W"] + sum(seen["B"].values())
    found["host F"] = max(launches["F"] * era.host_s - busy_f, 0.0)
    found["host B"] = max(launches["B"] * era.host_s - busy_b, 0.0)
    return found, seen


def _exposed(
    comm: Mapping[str, float], hideable: float, beside: float, overlaps: bool
) -> dict[str, float]:
    """What of the collectives is seen, in proportion over the axes."""
    total = sum(comm.values())
    if not total or not overlaps:
        return dict(comm)
    hidden = min(hideable, beside) * (1 - SLOW)
    return {axis: s * (total - hidden) / total for axis, s in comm.items()}


def call_seconds(call: Call, laid: Laid, machine: Machine) -> float:
    """Seconds of one call on rank 0's group."""
    ranks = group_of(laid, call.axes)
    if len(ranks) <= 1:
        return 0.0
    group = place(ranks, machine)
    if machine.class_ == "CPU":
        link = group.outer if group.nodes > 1 else group.inner
        return seconds(call.collective, len(ranks), call.bytes, link)
    return group_seconds(call.collective, group, call.bytes)


def send_seconds(laid: Laid, works: Sequence[Work], machine: Machine) -> float:
    """Seconds of the dearest message between neighbouring stages. Tensors that tp ranks hold alike are
    sent in shares where the software does so, and gathered over the inner link."""
    return max(
        (_send(call, i, laid, machine) for i, work in enumerate(works) for call in work.sends),
        default=0.0,
    )


def _send(call: Call, stage: int, laid: Laid, machine: Machine) -> float:
    places = (laid.stages[s].places[0] for s in (stage, _peer(call, stage)))
    ranks = [laid.mesh.rank_of({"pp": place}) for place in places]
    if ranks[0] == ranks[1]:
        return 0.0
    group = place(tuple(sorted(ranks)), machine)
    tp, size = laid.sizes["tp"], call.bytes
    if machine.class_ == "CPU":
        return seconds("send", 2, size, group.inner)
    whole = not laid.request.plan.mesh.sp
    if not (machine.software.scatters_sends and tp > 1 and whole and group.nodes > 1):
        return group_seconds("send", group, size)
    gathered = group_seconds("all_gather", place(group_of(laid, ("tp",)), machine), size / tp)
    return group_seconds("send", group, size / tp) + gathered


def _peer(call: Call, stage: int) -> int:
    return stage + 1 if call.phase == "F" else stage - 1

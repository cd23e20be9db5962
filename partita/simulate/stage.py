"""Seconds of one microbatch at a stage, and of what happens once a step.

    forward   = max(device: kernels + exposed collectives, host: kernels * host_s)
    backward  = the same of recomputation, input half and weight half

A collective inside a block is exposed, but for what its lane runs beside compute: rings of cp beside
attention, ZeRO's beside everything; tp's beside weight gradients, or in pieces beside its matmuls,
where the software does so; of a dispatch in n chunks all but one chunk's beside the experts. What is seen of
lanes side by side, on links that they share: links.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from partita.cost.comm import group_seconds, seconds, wire_seconds
from partita.cost.kernels import kernel_seconds
from partita.cost.machine import Machine, Software
from partita.cost.pieces import on_curve
from partita.parallel.laid import Laid
from partita.parallel.read import Call, replayed, state_bytes, traffic
from partita.parallel.room import ARENAS, axis_name
from partita.simulate.groups import group_of, over_one_adapter, place
from partita.simulate.links import Lane, one_ahead, path_seconds, seen_seconds
from partita.simulate.moves import is_move, move_seconds
from partita.simulate.started import (
    call_times,
    host_of,
    host_seconds,
    is_exchange,
    kernel_times,
    ran_kernels,
    small_kernels,
)
from partita.simulate.work import BlockWork, block_work
from partita.spec.program import Block, distinct

PASSES = 2  # over rows that come from several ranks, to put them by expert: read and written
AGAIN = ("B", "dp", "all_gather")  # phase, lane and collective of ZeRO-3's weights in backward
REDUCTIONS = ("all_reduce", "reduce_scatter")
HIDDEN_KINDS = ("copy_to", "gather_from", "scatter_to")
Seconds = defaultdict[str, float]
Lanes = dict[str, dict[str, Lane]]


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
    paths_s: tuple[float, float] = (0.0, 0.0)  # forward and backward, at least (links.path_seconds)
    calls_s: tuple[float, float] = (0.0, 0.0)  # of the host, for all that it starts
    lanes: Lanes = field(default_factory=dict)  # of the last of its parts, by phase and name

    @property
    def backward_s(self) -> float:
        """Both halves."""
        return self.input_s + self.weight_s

    @property
    def seconds(self) -> float:
        """Forward and backward of a microbatch, with all that is seen."""
        comm = sum(self.comm_forward_s.values()) + sum(self.comm_backward_s.values())
        host = self.host_forward_s + self.host_backward_s
        return self.forward_s + self.backward_s + comm + host


@dataclass(frozen=True)
class Part:
    """Equal blocks of a stage: how many (a share of one, where stages share it), the kernels of one, its
    calls in a microbatch, and the forward calls that its recomputation leaves out (None where it keeps
    more than its input). `shares` of the microbatches: those that leave between F and B; all but a first.
    `small`: kernels that are not priced (started.small_kernels)."""

    times: float
    work: BlockWork
    calls: tuple[Call, ...]
    unplayed: tuple[Call, ...] | None = None
    has_experts: bool = False
    shares: tuple[float, float] = (1.0, 1.0)
    small: tuple[int, int] = (0, 0)

    def times_of(self, call: Call) -> float:
        """How often a microbatch makes one of the calls, on average."""
        if call.apart or call.again:
            return call.times * self.shares[0 if call.apart else 1]
        return call.times


@dataclass(frozen=True)
class Work:
    """What a stage runs for one microbatch, its messages, and the bytes of its states by ledger
    category, on the device and `away` from it."""

    parts: tuple[Part, ...]
    sends: tuple[Call, ...]
    states: Counter[str]
    away: Counter[str] = field(default_factory=Counter)

    @property
    def blocks(self) -> float:
        """Blocks of the stage."""
        return sum(p.times for p in self.parts)


@dataclass(frozen=True)
class Works:
    """All stages, and the calls that a rank at each place of pp makes once a step, each with how often."""

    stages: tuple[Work, ...]
    once: tuple[Counter[Call], ...]


def works_of(laid: Laid, matmul_dtype: str = "") -> Works:
    """What a plan runs; equal blocks are read once. `matmul_dtype`: what linears compute in, where it is
    not the plan's (fp4, which no plan has)."""
    known: Known = {}
    stages = tuple(stage_work(laid, i, known, matmul_dtype) for i in range(len(laid.stages)))
    once = []
    for at in range(laid.sizes["pp"]):
        mine = Counter[Call]()
        for block, times in distinct(b for s in laid.stages_of(at) for b in s.blocks):
            for call in known[id(block)][1]:
                mine[call] += times if call.phase == "step" else 0
        mine.update(laid.step_calls(at))
        once.append(+mine)
    return Works(stages, tuple(once))


def with_actions(stage: StageTime, machine: Machine) -> StageTime:
    """The stage's times with what the executor takes for an F and a B, where it was measured."""
    measured = machine.piece("action", "fp32")
    if measured is None:
        return stage
    half = on_curve(1, measured) / 2
    return replace(stage, forward_s=stage.forward_s + half, input_s=stage.input_s + half)


Known = dict[int, tuple[BlockWork, tuple[Call, ...]]]


def stage_work(laid: Laid, stage: int, known: Known | None = None, matmul_dtype: str = "") -> Work:
    """Reads the stage's blocks, each distinct block once."""
    known = {} if known is None else known
    blocks = laid.stages[stage].blocks
    states: Counter[str] = Counter()
    away: Counter[str] = Counter()
    parts = []
    m, places = laid.request.plan.num_microbatches, len(laid.stages[stage].places)
    shares = sum(at == stage for at, _ in laid.leaving) / m, max(1 - places / m, 0.0)
    for block, times in distinct(blocks):
        if id(block) not in known:
            known[id(block)] = _read(block, laid, matmul_dtype)
        work, calls = known[id(block)]
        running = tuple(c for c in calls if c.phase != "step" and c.axes != ("pp",))
        told = _unplayed(block, running), "sent" in block.tensors, shares, small_kernels(block)
        parts.append(Part(times, work, running, *told))
        for category, size in state_bytes(block, laid.sizes).items():
            states[category] += times * size
        for arena in ARENAS:
            for category, size in state_bytes(block, laid.sizes, arena).items():
                away[category] += times * size
    sends = (c for b, _ in distinct(blocks) for c in known[id(b)][1] if c.axes == ("pp",))
    return Work(tuple(parts), tuple(sends), states, away)


def _read(block: Block, laid: Laid, matmul_dtype: str) -> tuple[BlockWork, tuple[Call, ...]]:
    """A block's kernels and calls. The head's matmul stays in 16 bits (as precision/fp8.py leaves it)."""
    dtype = laid.request.plan.precision.dtype
    low = matmul_dtype or (dtype if dtype == "fp8" else "")
    work = block_work(block, laid.sizes, low if block.name != "head" else "")
    return work, tuple(traffic(block, laid.sizes))


def _unplayed(block: Block, calls: tuple[Call, ...]) -> tuple[Call, ...] | None:
    """Forward calls that its recomputation leaves out; weights that backward gathers serve it too."""
    if block.kept != frozenset({block.input}):
        return None
    again = {op.name for op in replayed(block)}
    return tuple(c for c in calls if c.phase == "F" and c.lane != "dp" and c.site not in again)


PartTime = tuple[dict[str, float], dict[str, dict[str, float]], Lanes]
PartTimes = dict[tuple[object, ...], PartTime]


def stage_time(
    work: Work, laid: Laid, machine: Machine, known: PartTimes | None = None
) -> StageTime:
    """Prices the work on a machine, block by block: a host that is behind in one block does not make
    up for it in the next. `known`: what blocks of other stages took."""
    known = {} if known is None else known
    total: Seconds = defaultdict(float)
    comm: dict[str, Seconds] = {"F": defaultdict(float), "B": defaultdict(float)}
    lanes: Lanes = {}
    for part in work.parts:
        key = id(part.work), part.calls, part.unplayed, part.shares  # of the kernels alone
        if key not in known:
            known[key] = _part_time(part, laid, machine)
        seconds, seen, lanes = known[key]
        for name, s in seconds.items():
            total[name] += part.times * s
        for phase, axes in seen.items():
            for axis, s in axes.items():
                comm[phase][axis] += part.times * s
    return StageTime(
        total["F"], total["I"] + total["again"], total["W"], dict(comm["F"]), dict(comm["B"]),
        total["host F"], total["host B"], (total["path F"], total["path B"]),
        (total["calls F"], total["calls B"]),
        lanes,
    )  # fmt: skip


def _part_time(part: Part, laid: Laid, machine: Machine) -> PartTime:
    """Seconds of one block by part, its exposed collectives by phase and axis, and its lanes."""
    era, w, calls = machine.software, part.work, part.calls
    kernels = {"F": w.forward, "I": w.input, "W": w.weight, "again": w.again}
    if era.replays_layers and part.unplayed is not None:
        kernels["again"] = w.forward
        calls += tuple(replace(c, phase="B") for c in part.unplayed)
    if era.gathers_again and part.unplayed is not None:
        calls += tuple(c for c in calls if (c.phase, c.lane, c.collective) == AGAIN)
    ran = {n: ran_kernels(w, ks, n, machine) for n, ks in kernels.items()}
    each = {n: x.each for n, x in ran.items()}
    found = {n: x.seconds for n, x in ran.items()}
    host = host_of(ran, part.small, era)
    seen: dict[str, Seconds] = {"F": defaultdict(float), "B": defaultdict(float)}
    lanes: Lanes = {"F": {}, "B": {}}
    chunks: Counter[str] = Counter()
    exchanged = max((c.bytes for c in calls if is_exchange(c)), default=0)
    links: dict[tuple[str, ...], str] = {}
    for call in calls:
        if call.bytes != exchanged and is_exchange(
            call
        ):  # as long as the more of what goes and comes
            call = replace(call, bytes=exchanged)
        n = call.parts
        one = replace(call, bytes=call.bytes // n) if n > 1 else call
        times = part.times_of(call) * n
        s = call_times(one, era) * times * call_seconds(one, laid, machine)
        where = "F" if call.phase == "F" else "B"
        host[where] += times * host_seconds(call, machine) if s else 0.0
        name = call.lane if call.lane != "tp" or hides(call) else "alone"
        lane = lanes[where].setdefault(name, Lane(_beside(where, name, each, era)))
        if call.axes not in links:
            links[call.axes] = _link(call, laid, machine)
        lane.add(axis_name(call.axes), links[call.axes], s)
        chunks[name] = max(chunks[name], n)
    compute = {"F": found["F"], "B": found["I"] + found["again"] + found["W"]}
    for where, own in lanes.items():
        for name, lane in own.items():
            room = _room(name, lane, chunks[name], w, where, machine)
            own[name] = replace(lane, room=room)
        found[f"path {where}"] = path_seconds(own, compute[where])
        for name, s in seen_seconds(own, compute[where]).items():
            for axis, share in own[name].by_axis.items():
                seen[where][axis] += s * share / own[name].seconds
    for where in ("F", "B"):
        busy = compute[where] + sum(seen[where].values())
        if where == "F" and era.starts_experts:  # the host knows their rows when the device does
            timed = zip(each["F"], ran["F"].kernels, strict=True)
            busy = seen["F"].get("ep", 0.0) + sum(s for (_, s), k in timed if k.routed)
        found[f"calls {where}"] = host[where]
        found[f"host {where}"] = max(host[where] - busy, 0.0)
    return found, {where: dict(axes) for where, axes in seen.items()}, lanes


def _room(name: str, lane: Lane, chunks: int, w: BlockWork, where: str, machine: Machine) -> float:
    """Seconds of compute that a lane runs beside, of those it may: of an exchange in chunks the experts', but
    for one chunk's; of matrices that are gathered one ahead each the one's before."""
    era = machine.software
    if chunks > 1:
        kernels = w.experts[where == "B"]
        inside = sum(kernel_times(k, era) * kernel_seconds(k, machine) for k in kernels)
        return min(inside, lane.seconds * (1 - 1 / chunks))
    if name == "dp" and lane.room and era.gathers_one_ahead:
        sizes = [k.m * k.n * k.count for k in w.weight if k.adds]
        return one_ahead(lane.room, lane.seconds, sizes)
    return lane.room


def _link(call: Call, laid: Laid, machine: Machine) -> str:
    """The name of the link that holds a call up."""
    if is_move(call):
        return call.axes[0]
    return machine.cluster.link_for(group_of(laid, call.axes, machine.cluster)).name


def hides(call: Call) -> bool:
    """Whether its lane may run beside compute, where the software does so."""
    return call.site.rpartition(":")[2] in HIDDEN_KINDS


def _beside(
    where: str, lane: str, each: Mapping[str, list[tuple[str, float]]], era: Software
) -> float:
    """Seconds of compute of a block that a lane's collectives may run beside: matmuls for tp (weight
    gradients in backward), attention for the rings of cp, everything for dp; for ep, where a forward runs
    beside the backward of another microbatch, half of what the two compute."""

    def total(parts: tuple[str, ...], *kinds: str) -> float:
        return sum(s for p in parts for kind, s in each[p] if not kinds or kind in kinds)

    parts = ("F",) if where == "F" else ("I", "W", "again")
    if lane == "tp":
        if where == "F":
            return total(parts, "matmul") if era.overlaps_forward else 0.0
        halves = ("W", "I") if era.overlaps_forward else ("W",)
        return total(halves, "matmul") if era.overlaps_backward else 0.0
    if lane == "cp":
        return total(parts, "attention") if era.overlaps_rings else 0.0
    if lane == "ep":
        return total(("F", "I", "W", "again")) / 2 if era.overlaps_exchanges else 0.0
    return total(parts) if lane == "dp" and era.overlaps_gradients else 0.0


def call_seconds(call: Call, laid: Laid, machine: Machine) -> float:
    """Seconds of one call on the group that stands for all; a program that reduces 16-bit gradients sends
    half of the declared bytes."""
    if is_move(call):
        return move_seconds(call, machine)
    if call.lane == "dp" and call.collective in REDUCTIONS:
        size = call.bytes * min(machine.software.gradient_bytes, 4) // 4
        way = "all_reduce" if machine.software.reduces_whole else call.collective
        call = replace(call, bytes=size, collective=way)
    ranks = group_of(laid, call.axes, machine.cluster)
    if len(ranks) <= 1:
        return 0.0
    if machine.class_ == "CPU":
        regrouped = _regrouped(call, machine) if is_exchange(call) else 0.0
        return regrouped + _measured_seconds(call.collective, ranks, call.bytes, laid, machine)
    group = place(ranks, machine)
    if machine.software.leaves_once and group.nodes > 1:
        group = over_one_adapter(group, machine.cluster.devices_per_node)
    once = machine.software.sends_rows_once and is_exchange(call)
    top_k = laid.request.model.top_k if once else 1
    sorts = machine.software.sorts_rows and is_exchange(call) and not once
    regrouped = _regrouped(call, machine) if sorts else 0.0
    return regrouped + group_seconds(call.collective, group, call.bytes, top_k)


def _regrouped(call: Call, machine: Machine) -> float:
    """Seconds to put rows of several ranks by expert where their exchange does not, and back."""
    return PASSES * call.bytes / machine.memory_rate


def _measured_seconds(
    collective: str, ranks: tuple[int, ...], size: float, laid: Laid, machine: Machine
) -> float:
    """Of CPU ranks: as measured by size, or by the link's alpha and beta. Ranks that shared cores while they
    were measured took turns: seconds are those of ranks with a core each."""
    n, cores = len(ranks), machine.cluster.cores_shared or laid.mesh.world_size
    crowded = min(machine.cluster.devices_per_node, laid.mesh.world_size) > cores
    measured = machine.collective(collective, n, crowded)
    if measured is not None:
        return on_curve(size, measured) / max(1.0, n / cores)
    group = place(ranks, machine)
    return seconds(collective, n, size, group.outer if group.nodes > 1 else group.inner)


def send_seconds(laid: Laid, works: Sequence[Work], machine: Machine) -> tuple[float, float]:
    """Of the dearest message between neighbouring stages, as `send_s`."""
    return max(
        (send_s(call, i, laid, machine) for i, work in enumerate(works) for call in work.sends),
        default=(0.0, 0.0),
    )


def send_s(call: Call, stage: int, laid: Laid, machine: Machine) -> tuple[float, float]:
    """Seconds of a message, and those in which the link out of its rank carries nothing else. What tp ranks
    hold alike is sent in shares where the software does so, and gathered over the inner link."""
    places = (laid.stages[s].places[0] for s in (stage, _peer(call, stage)))
    ranks = [laid.mesh.rank_of({"pp": place}) for place in places]
    if ranks[0] == ranks[1]:
        return 0.0, 0.0
    tp, size, pair = laid.sizes["tp"], call.bytes, tuple(sorted(ranks))
    group = place(pair, machine)
    if machine.class_ == "CPU":  # ranks of one host copy in their own time
        told = _measured_seconds("send", pair, size, laid, machine)
        return told, min(told, wire_seconds(group, size)) if group.nodes > 1 else 0.0
    whole = not laid.request.plan.mesh.sp
    if not (machine.software.scatters_sends and tp > 1 and whole and group.nodes > 1):
        return group_seconds("send", group, size), wire_seconds(group, size)
    gathered = group_seconds(
        "all_gather", place(group_of(laid, ("tp",), machine.cluster), machine), size / tp
    )
    return group_seconds("send", group, size / tp) + gathered, wire_seconds(group, size / tp)


def _peer(call: Call, stage: int) -> int:
    return stage + 1 if call.phase == "F" else stage - 1

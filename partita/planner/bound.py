"""Lower bounds of a plan's step time and memory, from the tables and laws that `simulate` itself uses.

    coarse     device-seconds of a sample where microbatches are endless and nothing is recomputed (no
               wave is empty, no weight is read twice, nothing is launched), spread evenly over the ranks
    tokens     the blocks of one microbatch, spread evenly over the stages
    schedule   the balanced stages: of a rank's stages from one on, the first forward waits for all stages
               before it, and all backwards before it follow the last backward

        step >= max over ranks and stages of  head + m * work + tail

    states     the same with ZeRO's collectives of each microbatch, hidden as far as may be
    laid       the same from the laid plan's own stages, and exactly what runs once a step

Memory: states as far as ZeRO may cut them, and the activations of the chunks a schedule holds at once. Block
tables are cached by (tp, sp, cp, method, ep, etp, recompute, micro_batch_size); dp, pp, m only multiply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from partita.base.errors import PartitaError, PlanError, Problem
from partita.cost.comm import Group, group_seconds
from partita.cost.machine import Machine
from partita.parallel.laid import Laid, lay
from partita.parallel.pp.rules import balanced, schedule_of
from partita.parallel.read import flops, gradient_axes, kept_bytes, state_bytes
from partita.parallel.room import Request
from partita.planner.space import Leaf, MeshChoice, Shape, Space, Tokens
from partita.schedule.ir import Schedule
from partita.simulate.groups import place
from partita.simulate.memory import lent_bytes, transient_bytes
from partita.simulate.predict import request_of
from partita.simulate.stage import StageTime, Work, stage_time, works_of
from partita.simulate.step import step_time, update_bytes
from partita.spec.families import program

ENDLESS = 2048  # samples of a microbatch that amortises what a microbatch costs
SLACK = 0.998  # what is left of it
STATES = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a microbatch by part, and bytes: kept activations, states by category."""

    forward: float
    input: float
    weight: float
    kept: int = 0
    states: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.forward + self.input + self.weight

    def __add__(self, other: Cost) -> Cost:
        states = tuple(a + b for a, b in zip(self.states, other.states, strict=True))
        return Cost(
            self.forward + other.forward, self.input + other.input, self.weight + other.weight,
            self.kept + other.kept, states,  # type: ignore[arg-type]
        )  # fmt: skip


NOTHING = Cost(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Table:
    """The blocks of a model in order, each with its cost, and the FLOPs by which stages are balanced."""

    blocks: tuple[Cost, ...]
    flops: tuple[float, ...]
    unit: float = 0.0  # of a layer's weights, in its largest flat unit: what ZeRO lends at once

    @cached_property
    def total(self) -> Cost:
        """All blocks."""
        return sum(self.blocks, NOTHING)

    @cached_property
    def _prefix(self) -> list[Cost]:
        return list(accumulate(self.blocks, initial=NOTHING))

    def stages(self, split: Sequence[int]) -> list[Cost]:
        """The cost of each stage of a split of the layers."""
        found, at = [], 1
        for i, layers in enumerate(split):
            low = 0 if i == 0 else at
            at += layers
            high = at + 1 if i == len(split) - 1 else at
            a, b = self._prefix[low], self._prefix[high]
            states = tuple(y - x for x, y in zip(a.states, b.states, strict=True))
            found.append(
                Cost(
                    b.forward - a.forward, b.input - a.input, b.weight - a.weight,
                    b.kept - a.kept, states,  # type: ignore[arg-type]
                )
            )  # fmt: skip
        return found


@dataclass(frozen=True)
class Probe:
    """What a schedule says of itself on a short step: who holds which stage, chunks held at once."""

    held: tuple[tuple[int, ...], ...]  # stages of each rank
    share: tuple[float, ...]  # of the microbatches, that each of a rank's copies runs
    peaks: tuple[tuple[Counter[int], ...], ...]  # for each rank, chunks of each stage at its peaks
    split: bool  # backward in halves


def _cost(part_time: StageTime) -> Cost:
    t = part_time
    forward = t.forward_s + sum(t.comm_forward_s.values()) + t.host_forward_s
    back = t.input_s + sum(t.comm_backward_s.values()) + t.host_backward_s
    return Cost(forward, back, t.weight_s)


def pipeline_bound(stages: Sequence[Cost], probe: Probe, m: int) -> float:
    """No schedule with these stages on these ranks ends sooner."""
    before_f = list(accumulate((s.forward for s in stages), initial=0.0))
    back = [s.input if probe.split else s.input + s.weight for s in stages]
    before_b = list(accumulate(back, initial=0.0))
    worst = 0.0
    for held, share in zip(probe.held, probe.share, strict=True):
        work = halves = 0.0
        for s in sorted(held, reverse=True):  # this stage and those behind it on the rank
            work += m * share * stages[s].seconds
            halves += m * share * (stages[s].forward + stages[s].input)
            through = before_f[s] + (halves if probe.split else work) + before_b[s]
            worst = max(worst, through, before_f[s] + work)
    return worst


class Bounds:
    """The bounds of one space on one machine; tables are filled as they are asked for."""

    def __init__(self, space: Space, machine: Machine) -> None:
        self.space, self.machine = space, machine
        self._tables: dict[object, Table | Problem] = {}
        self._probes: dict[object, Probe | Problem] = {}
        self._splits: dict[object, tuple[int, ...]] = {}
        self._groups: dict[tuple[int, int], Group] = {}
        self.request = request_of(space.job)

    def table(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """The blocks of a microbatch on a rank, or why they cannot be laid."""
        key = (mesh.tp, mesh.sp, mesh.cp, shape, tokens)
        if key not in self._tables:
            shard = next(
                d for d in range(1, 10**7) if d * mesh.cp * mesh.tp % (shape.ep * shape.etp) == 0
            )
            alone = MeshChoice(1, shard, mesh.cp, mesh.tp, mesh.sp)
            plan = self.space.plan(alone, shape, tokens, Leaf("1f1b", 1, shard, 0))
            plan = plan.with_("pipeline", num_microbatches=1)
            asked = replace(self.request, plan=plan, micro_batch_size=tokens.micro)
            self._tables[key] = _read(asked, self.machine)
        return self._tables[key]

    def probe(self, mesh: MeshChoice, schedule: str, virtual: int, m: int) -> Probe | Problem:
        """The schedule on a short step."""
        short = m if m <= 2 * mesh.pp else 2 * mesh.pp + m % mesh.pp
        key = (mesh.pp, schedule, virtual, short)
        if key not in self._probes:
            mesh = MeshChoice(mesh.pp, 1, 1, 1, False)
            plan = self.space.plan(mesh, Shape(), Tokens(), Leaf(schedule, virtual, 1))
            try:
                self._probes[key] = _probe(
                    schedule_of(plan.with_("pipeline", num_microbatches=short))
                )
            except PartitaError as wrong:
                self._probes[key] = Problem("pp", "schedule", wrong.message)
        return self._probes[key]

    def stages(self, table: Table, count: int) -> list[Cost]:
        """Balanced stages."""
        return table.stages(self.split(table, count))

    def split(self, table: Table, count: int) -> tuple[int, ...]:
        """The layers of balanced stages; only proportions count."""
        layer = table.flops[1]
        key = (tuple(round(f / layer, 9) for f in table.flops), count)
        if key not in self._splits:
            self._splits[key] = balanced(table.flops, count)
        return self._splits[key]

    def coarse(self, mesh: MeshChoice, shape: Shape | None = None) -> float | Problem:
        """Seconds of a step at least, whatever else is chosen."""
        if shape is None:  # without cp and with the experts on one rank
            alone = replace(mesh, cp=1)
            etps = {1, mesh.tp} if self.space.model.experts else {1}
            found = [self.coarse(alone, Shape(etp=e)) for e in etps]
            good = [f for f in found if not isinstance(f, Problem)]
            return min(good) / mesh.cp if good else found[0]
        table = self.table(mesh, shape, Tokens(micro=ENDLESS))
        if isinstance(table, Problem):
            return table
        each = table.total.seconds / ENDLESS * SLACK
        return each * self.space.batch / (mesh.dp * mesh.pp)

    def pipeline(self, stages: Sequence[Cost], probe: Probe, m: int) -> float:
        """The schedule's bound with these stages."""
        return pipeline_bound(stages, probe, m)

    def shards(self, mesh: MeshChoice, shape: Shape, dp_shard: int) -> int:
        """Into how many parts ZeRO cuts states, at most."""
        fold = dp_shard * mesh.cp * mesh.tp
        return max(dp_shard * mesh.cp, fold // (shape.ep * shape.etp))

    def states(self, cost: Cost, zero: int, shards: int) -> tuple[float, float, float]:
        """Parameters, gradients and optimizer of a rank, at least."""
        p, g, o = cost.states
        return (
            p / shards if zero >= 3 else p,
            g / shards if zero >= 2 else g,
            o / shards if zero >= 1 else o,
        )

    def even(self, mesh: MeshChoice, shape: Shape, table: Table) -> tuple[float, float]:
        """Step time and memory where stages are all alike and states cut as far as may be."""
        m_samples = table.total.seconds
        shards = self.shards(mesh, shape, mesh.dp) if mesh.dp > 1 else 1
        total = sum(self.states(table.total, 3, shards)) + table.total.kept
        return m_samples / mesh.pp, total / mesh.pp

    def sharded(
        self, stages: Sequence[Cost], table: Table, mesh: MeshChoice, shard: int, zero: int
    ) -> Sequence[Cost]:
        """The stages with ZeRO's collectives of each microbatch, which hide under compute at best: the
        largest unit of each layer gathered (F, B) and its gradient scattered (B) over dp_shard and cp."""
        if zero < 2 or self.space.model.experts or self.machine.class_ == "CPU":
            return stages
        n = shard * mesh.cp
        key = (mesh.tp, n)
        if key not in self._groups:
            self._groups[key] = place(tuple(range(0, mesh.tp * n, mesh.tp)), self.machine)
        group = self._groups[key]
        weights = table.unit * min(b.states[0] for b in table.blocks[1:-1])
        gradients = table.unit * min(b.states[1] for b in table.blocks[1:-1])
        found = []
        for cost, layers in zip(stages, self.split(table, len(stages)), strict=True):
            gather = group_seconds("all_gather", group, layers * weights / n) if zero == 3 else 0.0
            back = gather + group_seconds("reduce_scatter", group, layers * gradients)
            forward = max(cost.forward, gather)
            found.append(replace(cost, forward=forward, input=max(cost.input, back - cost.weight)))
        return found

    def lent(self, table: Table, zero: int) -> float:
        """Bytes of whole units that come and go, at least: weights of two layers, two gradients."""
        if zero < 2 or len(table.blocks) < 4 or self.space.model.experts:
            return 0.0
        parameters = min(b.states[0] for b in table.blocks[1:-1])
        gradients = min(b.states[1] for b in table.blocks[1:-1])
        return table.unit * (gradients + (parameters if zero == 3 else 0.0))

    def memory(self, stages: Sequence[Cost], probe: Probe, zero: int, shards: int) -> float:
        """Bytes of the fullest rank, at least."""
        worst = 0.0
        for held, peaks in zip(probe.held, probe.peaks, strict=True):
            states = sum(sum(self.states(stages[s], zero, shards)) for s in held)
            most = max(
                (sum(n * stages[s].kept for s, n in peak.items()) for peak in peaks), default=0
            )
            worst = max(worst, states + most)
        return worst

    def update(self, stages: Sequence[Cost], probe: Probe, zero: int, shards: int) -> float:
        """Seconds of the optimizer, at least."""
        moved = 0.0
        for held in probe.held:
            found = [self.states(stages[s], zero, shards) for s in held]
            moved = max(moved, sum(_moved(f) for f in found))
        return moved / self.machine.memory_rate


def _moved(states: tuple[float, float, float]) -> float:
    """Bytes that the update moves."""
    sizes = {name: int(size) for name, size in zip(STATES, states, strict=True)}
    return update_bytes(sizes)


def laid_bound(request: Request, machine: Machine, probe: Probe) -> tuple[float, float]:
    """Step time and memory at least, from the laid plan's own stages. Raises PlanError."""
    laid = lay(request)
    works = works_of(laid)
    times = [stage_time(w, laid, machine) for w in works.stages]
    stages = [_cost(t) for t in times]
    m = request.plan.num_microbatches
    once = step_time(laid, works, times, machine)
    seconds = pipeline_bound(stages, probe, m) + once.seconds
    return seconds, _laid_memory(laid, probe)


def _laid_memory(laid: Laid, probe: Probe) -> float:
    known: dict[int, tuple[int, int, int]] = {}
    for s in laid.stages:
        for b in s.blocks:
            if id(b) not in known:
                own = state_bytes(b, laid.sizes)
                known[id(b)] = (
                    sum(own.values()),
                    kept_bytes(b, laid.sizes),
                    transient_bytes(b, laid.sizes),
                )
    rows = [[known[id(b)] for b in s.blocks] for s in laid.stages]
    kept = [sum(r[1] for r in row) for row in rows]
    worst = 0.0
    for held, peaks in zip(probe.held, probe.peaks, strict=True):
        mine = [r for s in held for r in rows[s]]
        most = max((sum(n * kept[s] for s, n in peak.items()) for peak in peaks), default=0)
        lent = max(lent_bytes(laid.stages[s].blocks, laid.request.plan) for s in held)
        worst = max(worst, sum(r[0] for r in mine) + max(r[2] for r in mine) + most + lent)
    return worst


def _read(request: Request, machine: Machine) -> Table | Problem:
    """The table, from a model of as few layers as differ."""
    layers, period = request.model.layers, request.plan.recompute.every
    blocks = program(request.model, 1, request.seq_len).blocks[1:-1]
    alike = len({id(b) for b in blocks}) == 1 and layers > period
    short = replace(request.model, layers=period) if alike else request.model
    try:
        laid = lay(replace(request, model=short))
    except PlanError as wrong:
        return wrong.problems[0]
    costs, weight = _block_costs(laid, machine)
    unit = _largest_unit(laid)
    if alike:
        costs = [costs[0], *(costs[1 + i % period] for i in range(layers)), costs[-1]]
        weight = [weight[0], *(weight[1 + i % period] for i in range(layers)), weight[-1]]
    return Table(tuple(costs), tuple(weight), unit)


def _largest_unit(laid: Laid) -> float:
    """The least part of a layer's weights, and of those that are trained, that is one unit."""
    shares, layers = [1.0], laid.stages[0].blocks[1:-1]
    for layer in {id(b): b for b in layers}.values():
        every = Counter[tuple[bool, tuple[str, ...]]]()
        for w in layer.weights():
            every[w.frozen, gradient_axes(layer, w, laid.sizes)] += w.local(laid.sizes)
        trained = [n for (frozen, _), n in every.items() if not frozen]
        shares += [max(g) / sum(g) for g in (list(every.values()), trained) if g]
    return min(shares)


def _block_costs(laid: Laid, machine: Machine) -> tuple[list[Cost], list[float]]:
    """The cost and the FLOPs of each block. States go by weights: units may join several blocks."""
    blocks, parts = laid.stages[0].blocks, works_of(laid).stages[0].parts
    total = sum((state_bytes(b, laid.sizes) for b in blocks), Counter[str]())
    tied, seen, elements = set(laid.program.tied), set[str](), list[tuple[int, int]]()
    for b in blocks:
        own = {w.name: (w.local(laid.sizes), w.frozen) for w in b.weights() if w.name not in seen}
        seen |= own.keys() & tied
        elements.append((sum(n for n, _ in own.values()), sum(n for n, f in own.values() if not f)))
    priced = {
        key: _cost(stage_time(Work((replace(part, times=1),), (), Counter()), laid, machine))
        for key, part in zip(dict.fromkeys(map(id, blocks)), parts, strict=True)
    }
    costs = []
    whole, trained = (max(sum(n), 1) for n in zip(*elements, strict=True))
    for b, (n, t) in zip(blocks, elements, strict=True):  # frozen: parameters alone
        share = {"parameters": n / whole}
        states = tuple(total[s] * share.get(s, t / trained) for s in STATES)
        costs.append(replace(priced[id(b)], kept=kept_bytes(b, laid.sizes), states=states))  # type: ignore[arg-type]
    return costs, [float(sum(flops(b, laid.sizes).values())) for b in blocks]


def _probe(schedule: Schedule) -> Probe:
    held, share, peaks = [], [], []
    kinds = {a.kind for a in schedule.actions()}
    for rank, actions in enumerate(schedule.ranks):
        mine = tuple(dict.fromkeys(a.stage for a in actions if a.kind == "F"))
        count = Counter(a.stage for a in actions if a.kind == "F")
        held.append(mine)
        share.append(min(count.values()) / schedule.num_microbatches)
        peaks.append(_peaks(actions))
        assert rank < schedule.num_ranks
    return Probe(tuple(held), tuple(share), tuple(peaks), "W" in kinds)


def _peaks(actions: Sequence[object]) -> tuple[Counter[int], ...]:
    """The chunks a rank holds where it holds most, and the most of each stage."""
    now: Counter[int] = Counter()
    found: list[Counter[int]] = []
    most = 0
    for stage, kind, _ in actions:  # type: ignore[misc]
        if kind == "F":
            now[stage] += 1
            if now.total() > most:
                most, found = now.total(), [Counter(now)]
        elif kind in "BW":
            now[stage] -= 1
    return tuple(found)

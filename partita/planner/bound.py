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
from dataclasses import replace

import numpy as np

from partita.base.errors import PartitaError, PlanError, Problem
from partita.cost.comm import Group, group_seconds
from partita.cost.machine import Machine
from partita.parallel.laid import Laid, lay
from partita.parallel.pp.rules import balanced, schedule_of
from partita.parallel.read import flops, gradient_axes, kept_bytes, state_bytes
from partita.parallel.room import Request
from partita.planner.space import Leaf, MeshChoice, Shape, Space, Tokens
from partita.planner.table import Cost, Probe, Rough, Table, pipeline_bound, probe_of
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule
from partita.simulate.groups import place
from partita.simulate.pipeline import Rehearsal
from partita.simulate.predict import request_of
from partita.simulate.stage import StageTime, Work, stage_time, works_of
from partita.simulate.step import update_bytes
from partita.spec.families import program

ENDLESS = 2048  # samples of a microbatch that amortises what a microbatch costs
SLACK = 0.998  # what is left of it
REHEARSED = 256  # schedules of whole steps that are remembered
STATES = ("parameters", "gradients", "optimizer")


def cost_of(t: StageTime, late: bool = False) -> Cost:
    """The cost of a stage or block. `late`: what backward waits for counts as weight work: what is seen of
    it depends on how long that is, so that of large microbatches only the sum of both bounds that of small
    ones."""
    forward = t.forward_s + sum(t.comm_forward_s.values()) + t.host_forward_s
    waits = sum(t.comm_backward_s.values()) + t.host_backward_s
    back, weight = (0.0, waits) if late else (waits, 0.0)
    return Cost(forward, t.input_s + back, t.weight_s + weight)


class Bounds:
    """The bounds of one space on one machine; tables are filled as they are asked for."""

    def __init__(self, space: Space, machine: Machine) -> None:
        self.space, self.machine = space, machine
        self._tables: dict[object, Table | Problem] = {}
        self._probes: dict[object, Probe | Problem] = {}
        self._splits: dict[object, tuple[int, ...]] = {}
        self._stages: dict[tuple[int, int], list[Cost]] = {}
        self._roughs: dict[object, Rough] = {}
        self._numbers: dict[tuple[int, int], np.ndarray] = {}
        self._steps: dict[object, Rehearsal] = {}
        self._groups: dict[tuple[int, int], Group] = {}
        self.request = request_of(space.job)
        self.limit_bytes: float = space.job.cluster.memory_limit_bytes

    def table(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """The blocks of a microbatch on a rank, or why they cannot be laid."""
        key = (mesh.tp, mesh.sp, mesh.cp, shape, tokens)
        if key not in self._tables:
            make = self._mixed if tokens.every > 1 else self.laid_table
            self._tables[key] = make(mesh, shape, tokens)
        return self._tables[key]

    def laid_table(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """The table of a laid model."""
        fold = mesh.cp * mesh.tp
        shard = next(d for d in range(1, 10**7) if d * fold % (shape.ep * shape.etp) == 0)
        alone = MeshChoice(1, shard, mesh.cp, mesh.tp, mesh.sp)
        plan = self.space.plan(alone, shape, tokens, Leaf("1f1b", 1, shard, 0))
        plan = plan.with_("pipeline", num_microbatches=1)
        asked = replace(self.request, plan=plan, micro_batch_size=tokens.micro)
        return _read(asked, self.machine, tokens.micro == ENDLESS)

    def _mixed(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """Every k-th layer, from the first one on, of the table that recomputes all; the others of that which
        recomputes none."""
        kept, made = (self.table(mesh, shape, Tokens(m, 1, tokens.micro)) for m in ("none", "full"))
        if isinstance(kept, Problem) or isinstance(made, Problem):
            return kept if isinstance(kept, Problem) else made
        last = len(made.blocks) - 1
        of = [made if i % tokens.every == 1 or i in (0, last) else kept for i in range(last + 1)]
        blocks = tuple(t.blocks[i] for i, t in enumerate(of))
        return Table(blocks, tuple(t.flops[i] for i, t in enumerate(of)), made.unit)

    def endless(self, mesh: MeshChoice, shape: Shape, mode: tuple[str, int]) -> Table | Problem:
        """The blocks of so large a microbatch that a sample cannot cost less."""
        return self.table(mesh, shape, Tokens(*mode, ENDLESS))

    def rough(self, mesh: MeshChoice, table: Table, leaf: tuple[str, int]) -> list[float]:
        """From an endless table, seconds of a step at least for each size of a microbatch."""
        key = (mesh.pp, *leaf)
        if key not in self._roughs:
            self._roughs[key] = Rough(leaf[0], mesh.pp, leaf[1])
        rough, samples = self._roughs[key], self.space.batch // mesh.dp
        stages = self._arrays(table, rough.num_stages)
        return rough(stages, np.array(self.space.micros(mesh)), samples).tolist()

    def _arrays(self, table: Table, count: int) -> np.ndarray:
        """[stage, 3]: F, I and W of a sample at least."""
        key = (id(table), count)
        if key not in self._numbers:
            stages = self.stages(table, count)
            rows = [(s.forward, s.input, s.weight) for s in stages]
            self._numbers[key] = np.array(rows) * (SLACK / ENDLESS)
        return self._numbers[key]

    def step(self, mesh: MeshChoice, leaf: tuple[str, int], m: int, stages: int) -> Rehearsal:
        """The schedule of the whole step, to be timed at any costs."""
        key = (mesh.pp, *leaf, m)
        if key not in self._steps:
            if len(self._steps) >= REHEARSED:
                self._steps.pop(next(iter(self._steps)))
            alone = MeshChoice(mesh.pp, 1, 1, 1, False)
            plan = self.space.plan(alone, Shape(), Tokens(), Leaf(*leaf, 1))

            def make(count: int) -> Schedule:
                return schedule_of(plan.with_("pipeline", num_microbatches=count))

            self._steps[key] = Rehearsal(make, mesh.pp, m, stages)
        return self._steps[key]

    def played(
        self, stages: Sequence[Cost], mesh: MeshChoice, leaf: tuple[str, int], m: int
    ) -> float:
        """The schedule's clock at the stages' costs."""
        return self.step(mesh, leaf, m, len(stages)).least(costs_of(stages))

    def probe(self, mesh: MeshChoice, schedule: str, virtual: int, m: int) -> Probe | Problem:
        """The schedule on a short step."""
        short = m if m <= 2 * mesh.pp else 2 * mesh.pp + m % mesh.pp
        key = (mesh.pp, schedule, virtual, short)
        if key not in self._probes:
            mesh = MeshChoice(mesh.pp, 1, 1, 1, False)
            plan = self.space.plan(mesh, Shape(), Tokens(), Leaf(schedule, virtual, 1))
            try:
                self._probes[key] = probe_of(
                    schedule_of(plan.with_("pipeline", num_microbatches=short))
                )
            except PartitaError as wrong:
                self._probes[key] = Problem("pp", "schedule", wrong.message)
        return self._probes[key]

    def stages(self, table: Table, count: int) -> list[Cost]:
        """Balanced stages."""
        key = (id(table), count)  # tables are kept
        if key not in self._stages:
            self._stages[key] = table.stages(self.split(table, count))
        return self._stages[key]

    def split(self, table: Table, count: int) -> tuple[int, ...]:
        """The layers of balanced stages; only proportions count."""
        key = (table.proportions, count)
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

    def ways(self, mesh: MeshChoice, shape: Shape) -> list[tuple[int, int]]:
        """ZeRO stages in force, with the most parts they cut states into."""
        if mesh.dp == 1:
            return [(0, 1)]
        stages = {zero if shard > 1 else 0 for shard, zero in self.space.states(mesh, shape)}
        return [(zero, self.shards(mesh, shape, mesh.dp)) for zero in sorted(stages)]

    def states(self, whole: Sequence[float], zero: int, shards: int) -> tuple[float, float, float]:
        """Parameters, gradients and optimizer of a rank, at least."""
        p, g, o = whole
        return (
            p / shards if zero >= 3 else p,
            g / shards if zero >= 2 else g,
            o / shards if zero >= 1 else o,
        )

    def group(self, stride: int, n: int) -> Group:
        """`n` ranks, each `stride` behind the one before."""
        key = (stride, n)
        if key not in self._groups:
            self._groups[key] = place(tuple(range(0, stride * n, stride)), self.machine)
        return self._groups[key]

    def reduced(
        self,
        stages: Sequence[Cost],
        table: Table,
        probe: Probe,
        mesh: MeshChoice,
        states: tuple[int, int],
    ) -> float:
        """Seconds at least that the step's reductions of gradients, and gathers of parameters, are seen:
        the largest unit of each layer in one call, beyond a whole backward of the rank. `states`: dp_shard,
        and the ZeRO stage in force."""
        (shard, zero), era = states, self.machine.software
        if self.space.model.experts or self.machine.class_ == "CPU":
            return 0.0
        cut, rest = (shard * mesh.cp, mesh.dp // shard) if zero else (1, mesh.dp * mesh.cp)
        inner = self.group(mesh.tp, cut)
        outer = self.group(mesh.tp * cut, rest) if zero else self.group(mesh.tp, rest)
        layers, worst = self.split(table, len(stages)), 0.0
        weights = table.unit * min(b.states[0] for b in table.blocks[1:-1])
        gradients = table.unit * min(b.states[1] for b in table.blocks[1:-1])
        fewer = min(era.gradient_bytes / 4, 1.0)
        for held in probe.held:
            mine = fewer * sum(layers[s] for s in held)
            found = group_seconds("all_reduce", outer, mine * gradients / cut)
            if zero == 1:
                found += group_seconds("reduce_scatter", inner, mine * gradients)
            if zero in (1, 2):
                found += group_seconds("all_gather", inner, mine * weights / cut)
            room = sum(stages[s].input + stages[s].weight for s in held)
            worst = max(worst, found - (room if era.overlaps_gradients else 0.0))
        return worst

    def sharded(
        self, stages: Sequence[Cost], table: Table, mesh: MeshChoice, shard: int, zero: int
    ) -> Sequence[Cost]:
        """The stages with ZeRO's collectives of each microbatch, which hide under compute at best: the
        largest unit of each layer gathered (F, B) and its gradient scattered (B) over dp_shard and cp."""
        if zero < 2 or self.space.model.experts or self.machine.class_ == "CPU":
            return stages
        n = shard * mesh.cp
        group = self.group(mesh.tp, n)
        weights = table.unit * min(b.states[0] for b in table.blocks[1:-1])
        gradients = table.unit * min(b.states[1] for b in table.blocks[1:-1])
        known: dict[int, tuple[float, float]] = {}
        found = []
        for cost, layers in zip(stages, self.split(table, len(stages)), strict=True):
            if layers not in known:
                size = layers * weights / n
                gather = group_seconds("all_gather", group, size) if zero == 3 else 0.0
                scatter = group_seconds("reduce_scatter", group, layers * gradients)
                known[layers] = gather, gather + scatter
            forward, back = known[layers]
            hidden = forward <= cost.forward and back <= cost.input + cost.weight
            waits = max(cost.forward, forward), max(cost.input, back - cost.weight)
            found.append(cost if hidden else Cost(*waits, cost.weight, cost.kept, cost.states))
        return found if found != stages else stages

    def lent(self, table: Table, zero: int) -> float:
        """Bytes of whole units that come and go, at least: weights of two layers, two gradients."""
        if zero < 2 or len(table.blocks) < 4 or self.space.model.experts:
            return 0.0
        parameters = min(b.states[0] for b in table.blocks[1:-1])
        gradients = min(b.states[1] for b in table.blocks[1:-1])
        return table.unit * (gradients + (parameters if zero == 3 else 0.0))

    def memory(
        self, stages: Sequence[Cost], probe: Probe, zero: int, shards: int, scale: float = 1.0
    ) -> float:
        """Bytes of the fullest rank, at least; `scale` of a chunk to that of the stages."""
        worst = 0.0
        for held, peaks in zip(probe.held, probe.peaks, strict=True):
            states = sum(sum(self.states(stages[s].states, zero, shards)) for s in held)
            most = max(
                (sum(n * stages[s].kept for s, n in peak.items()) for peak in peaks), default=0
            )
            worst = max(worst, states + scale * most)
        return worst

    def update(self, stages: Sequence[Cost], probe: Probe, zero: int, shards: int) -> float:
        """Seconds of the optimizer, at least."""
        moved = 0.0
        for held in probe.held:
            found = [self.states(stages[s].states, zero, shards) for s in held]
            moved = max(moved, sum(_moved(f) for f in found))
        return moved / self.machine.memory_rate


def _moved(states: tuple[float, float, float]) -> float:
    """Bytes that the update moves."""
    sizes = {name: int(size) for name, size in zip(STATES, states, strict=True)}
    return update_bytes(sizes)


def costs_of(stages: Sequence[Cost], send: float = 0.0) -> Costs:
    """What the clock is told."""
    return Costs(tuple(StageCosts(s.forward, s.input, s.weight) for s in stages), send)


def _read(request: Request, machine: Machine, late: bool) -> Table | Problem:
    """The table, from a model of as few layers as differ."""
    layers, period = request.model.layers, request.plan.recompute.every
    blocks = program(request.model, 1, request.seq_len).blocks[1:-1]
    alike = len({id(b) for b in blocks}) == 1 and layers > period
    short = replace(request.model, layers=period) if alike else request.model
    try:
        laid = lay(replace(request, model=short))
    except PlanError as wrong:
        return wrong.problems[0]
    costs, weight = _block_costs(laid, machine, late)
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


def _block_costs(laid: Laid, machine: Machine, late: bool) -> tuple[list[Cost], list[float]]:
    """The cost and the FLOPs of each block. States go by weights: units may join several blocks."""
    blocks, parts = laid.stages[0].blocks, works_of(laid).stages[0].parts
    total = sum((state_bytes(b, laid.sizes) for b in blocks), Counter[str]())
    tied, seen, elements = set(laid.program.tied), set[str](), list[tuple[int, int]]()
    for b in blocks:
        own = {w.name: (w.local(laid.sizes), w.frozen) for w in b.weights() if w.name not in seen}
        seen |= own.keys() & tied
        elements.append((sum(n for n, _ in own.values()), sum(n for n, f in own.values() if not f)))
    priced = {
        key: cost_of(
            stage_time(Work((replace(part, times=1),), (), Counter()), laid, machine), late
        )
        for key, part in zip(dict.fromkeys(map(id, blocks)), parts, strict=True)
    }
    costs = []
    whole, trained = (max(sum(n), 1) for n in zip(*elements, strict=True))
    for b, (n, t) in zip(blocks, elements, strict=True):  # frozen: parameters alone
        share = {"parameters": n / whole}
        states = tuple(total[s] * share.get(s, t / trained) for s in STATES)
        costs.append(replace(priced[id(b)], kept=kept_bytes(b, laid.sizes), states=states))  # type: ignore[arg-type]
    return costs, [float(sum(flops(b, laid.sizes).values())) for b in blocks]

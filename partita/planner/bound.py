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

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from partita.base.errors import PartitaError, Problem
from partita.cost.machine import Machine
from partita.parallel.pp.rules import balanced, schedule_of
from partita.parallel.room import Request
from partita.planner.kinds import Kinds
from partita.planner.links import Links, Meeting
from partita.planner.reading import STATES, Reader, on_device
from partita.planner.space import Leaf, MeshChoice, Shape, Space, Tokens
from partita.planner.table import (
    HIDES,
    KEPT,
    READ,
    TIMES,
    TRAVEL,
    UNITS,
    Probe,
    Rough,
    Shards,
    Table,
    probe_of,
    spread,
)
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule
from partita.simulate.moves import STATE_PASSES, host_memory_rate
from partita.simulate.pipeline import Rehearsal
from partita.simulate.predict import request_of
from partita.simulate.step import update_bytes, update_seconds

ENDLESS = 2048  # samples of a microbatch that amortises what a microbatch costs
SLACK = 0.998  # what is left of it
REHEARSED = 256  # schedules of whole steps that are remembered


def _short(mesh: MeshChoice, m: int) -> int:
    """Microbatches of a step that tells what a schedule holds at once."""
    return m if m <= 2 * mesh.pp else 2 * mesh.pp + m % mesh.pp


class Bounds:
    """The bounds of one space on one machine; tables are filled as they are asked for."""

    def __init__(self, space: Space, machine: Machine) -> None:
        self.space, self.machine, self.links = space, machine, Links(machine, space.model)
        self._read = Reader(machine)
        self._tables: dict[object, Table | Problem] = {}
        self._probes: dict[object, Probe | Problem] = {}
        self._splits: dict[object, tuple[int, ...]] = {}
        self._stages: dict[tuple[int, int], np.ndarray] = {}
        self._roughs: dict[object, Rough] = {}
        self._kinds: dict[object, Kinds] = {}
        self._steps: dict[object, Rehearsal] = {}
        self._sizes: dict[int, np.ndarray] = {}
        self.request = request_of(space.job)
        self.limit_bytes: float = space.job.cluster.memory_limit_bytes

    def table(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """The blocks of a microbatch on a rank, or why they cannot be laid."""
        key = (mesh.tp, mesh.sp, mesh.cp, shape, tokens)
        if key not in self._tables:
            make = self._mixed if tokens.every > 1 else self.laid_table
            self._tables[key] = make(mesh, shape, tokens)
        return self._tables[key]

    def knows(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> bool:
        """Whether a table is there."""
        return (mesh.tp, mesh.sp, mesh.cp, shape, tokens) in self._tables

    def laid_table(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """The table of a laid model."""
        found = self._read(self.asked(mesh, shape, tokens), tokens.micro == ENDLESS)
        return on_device(found, self.space.offload)

    def asked(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Request:
        """The plan of a table: one microbatch, no pipeline, states that are not cut."""
        fold = mesh.cp * mesh.tp
        shard = next(d for d in range(1, 10**7) if d * fold % (shape.ep * shape.etp) == 0)
        alone = MeshChoice(1, shard, mesh.cp, mesh.tp, mesh.sp)
        plan = self.space.plan(alone, shape, tokens, Leaf("1f1b", 1, shard, 0))
        plan = plan.with_("pipeline", num_microbatches=1)
        return replace(self.request, plan=plan, micro_batch_size=tokens.micro)

    def _mixed(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """Every k-th layer, from the first one on, of the table that recomputes all; the others of that which
        recomputes none."""
        kept, made = (self.table(mesh, shape, Tokens(m, 1, tokens.micro)) for m in ("none", "full"))
        if isinstance(kept, Problem) or isinstance(made, Problem):
            return kept if isinstance(kept, Problem) else made
        return kept.mixed(made, tokens.every)

    def endless(self, mesh: MeshChoice, shape: Shape, mode: tuple[str, int]) -> Table | Problem:
        """The blocks of so large a microbatch that a sample cannot cost less."""
        return self.table(mesh, shape, Tokens(*mode, ENDLESS))

    def rough(
        self, mesh: MeshChoice, table: Table, leaf: tuple[str, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """From an endless table, the three bounds of a schedule for each size of a microbatch."""
        rough = self.lies(mesh, leaf)
        stages = rough.times(self.stages(table, rough.num_stages))
        stages[:, TIMES] *= SLACK / ENDLESS
        sizes = self.sizes(mesh)
        send = self.links.send(mesh, table.sent / ENDLESS * sizes)
        return rough.bounds(stages, sizes, self.space.batch // mesh.dp, send)

    def sizes(self, mesh: MeshChoice) -> np.ndarray:
        """[sizes]: samples of a microbatch."""
        if mesh.dp not in self._sizes:
            self._sizes[mesh.dp] = np.array(self.space.micros(mesh))
        return self._sizes[mesh.dp]

    def lies(self, mesh: MeshChoice, leaf: tuple[str, int]) -> Rough:
        """Where a schedule's stages lie."""
        key = (mesh.pp, *leaf)
        if key not in self._roughs:
            self._roughs[key] = Rough(leaf[0], mesh.pp, leaf[1])
        return self._roughs[key]

    def pipeline(
        self, stages: np.ndarray, mesh: MeshChoice, leaf: tuple[str, int], m: int, sent: float
    ) -> float:
        """The schedule's bound with stages of these costs, for so many microbatches, of which so many bytes
        are sent from rank to rank."""
        rough = self.lies(mesh, leaf)
        return float(rough(rough.times(stages), np.ones(1), m, self.links.send(mesh, sent))[0])

    def kinds(self, mesh: MeshChoice, table: Table) -> Kinds:
        """Where the stages of all schedules lie, and the layers' splits."""
        key = (mesh.pp, table.proportions)
        if key not in self._kinds:
            roughs = [self.lies(mesh, leaf) for leaf in self.space.schedules(mesh)]
            splits = [self.split(table, r.num_stages) for r in roughs]
            self._kinds[key] = Kinds(roughs, splits)
        return self._kinds[key]

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

    def quick(
        self, table: Table, mesh: MeshChoice, leaf: tuple[str, int], m: int
    ) -> Callable[[Sequence[Meeting], int], float]:
        """Seconds of the schedule at least for a way to cut states, from a rank's own layers alone: what the
        stages cost without ZeRO's collectives, and by how much those make the layers longer that it has."""
        lies = self.lies(mesh, leaf)
        stages = self.stages(table, lies.num_stages)
        found = lies.bounds(lies.times(stages), np.ones(1), m, self.links.send(mesh, table.sent))
        first, whole, halves = (float(x[0]) for x in found)
        second = halves if lies.split else whole
        times = m * lies.fewest(self.split(table, lies.num_stages)) / mesh.pp
        times *= len(table.at) - 2

        def seconds(meetings: Sequence[Meeting], zero: int) -> float:
            if zero < 2 or not self.slows:
                return max(first, second)
            each = [
                b.beside(*self.links.each_s(b.units, meetings, zero, apart=True))
                for b, _ in table.layers
            ]
            there, back = (times * min(x) for x in zip(*each, strict=True))
            return max(first + there + back, second + there + (0.0 if lies.split else back))

        return seconds

    def played(
        self, stages: np.ndarray, mesh: MeshChoice, leaf: tuple[str, int], m: int, sent: float
    ) -> float:
        """The schedule's clock at the stages' costs, and messages of so many bytes."""
        times = self.lies(mesh, leaf).times(stages)[:, TIMES].tolist()
        costs = Costs(tuple(StageCosts(*stage) for stage in times), self.links.send(mesh, sent))
        return self.step(mesh, leaf, m, len(stages)).least(costs)

    def probe(self, mesh: MeshChoice, schedule: str, virtual: int, m: int) -> Probe | Problem:
        """The schedule on a short step."""
        short = _short(mesh, m)
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

    def probed(self, mesh: MeshChoice, schedule: str, virtual: int, m: int) -> bool:
        """Whether that is there."""
        return (mesh.pp, schedule, virtual, _short(mesh, m)) in self._probes

    def stages(self, table: Table, count: int) -> np.ndarray:
        """[stage, numbers] of balanced stages."""
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

    def coarse(
        self, mesh: MeshChoice, shape: Shape | None = None, paired: bool = True
    ) -> float | Problem:
        """Seconds of a step at least, whatever else is chosen. `paired`: of schedules of pairs too."""
        if shape is None:  # without cp and with the experts on one rank
            alone = replace(mesh, cp=1)
            etps = {1, mesh.tp} if self.space.model.experts else {1}
            found = [self.coarse(alone, Shape(etp=e), paired) for e in etps]
            good = [f for f in found if not isinstance(f, Problem)]
            return min(good) / mesh.cp if good else found[0]
        table = self.table(mesh, shape, Tokens(micro=ENDLESS))
        if isinstance(table, Problem):
            return table
        return self.evenly(mesh, table, paired)

    def evenly(self, mesh: MeshChoice, table: Table, paired: bool, parts: int = 1) -> float:
        """Seconds of a step at least, from an endless table of a sequence in so many times fewer parts."""
        whole = table.total[TIMES].sum() - HIDES * (paired and mesh.pp > 1) * table.total[TRAVEL]
        return float(whole) / ENDLESS * SLACK * self.space.batch / (mesh.dp * mesh.pp * parts)

    def shards(self, mesh: MeshChoice, shape: Shape, dp_shard: int) -> Shards:
        """Into how many parts ZeRO cuts the states of experts, and of the rest at most."""
        cut = dp_shard * mesh.cp
        narrow = self.space.dtype not in ("fp64", "fp32")
        return Shards(cut, max(cut * mesh.tp // (shape.ep * shape.etp), 1), narrow)

    def ways(self, mesh: MeshChoice, shape: Shape) -> list[tuple[int, Shards]]:
        """ZeRO stages in force, with the most parts they cut states into."""
        shards = self.shards(mesh, shape, mesh.dp)
        stages = {zero if shard > 1 else 0 for shard, zero, _ in self.space.states(mesh, shape)}
        return [(zero, shards) for zero in sorted(stages)]

    def reduced(
        self, stages: np.ndarray, held: np.ndarray, meetings: Sequence[Meeting], zero: int
    ) -> float:
        """Seconds at least that the step's reductions of gradients, and gathers of parameters, are seen: the
        largest units of a rank's layers in one call, beyond a whole backward of the rank."""
        if self.machine.class_ == "CPU":
            return 0.0
        ranks = stages[held].sum(1)
        room = (
            ranks[:, 1] + ranks[:, 2]
            if self.machine.software.overlaps_gradients
            else 0.0 * ranks[:, 0]
        )
        units: dict[tuple[float, ...], float] = {}
        for row, hidden in zip(ranks[:, UNITS].tolist(), room.tolist(), strict=True):
            units[tuple(row)] = min(hidden, units.get(tuple(row), hidden))
        seen = (self.links.once_s(row, meetings, zero) - hidden for row, hidden in units.items())
        return max(0.0, *seen)

    @property
    def slows(self) -> bool:
        """Whether what is hidden of ZeRO's collectives slows the compute beside it."""
        return self.machine.class_ != "CPU" and self.machine.software.overlaps_gradients

    def sharded(
        self, table: Table, count: int, meetings: Sequence[Meeting], zero: int
    ) -> np.ndarray:
        """Balanced stages with ZeRO's collectives of each microbatch: layer by layer, and at least under all
        of a stage's compute."""
        stages = self.stages(table, count)
        if zero < 2 or self.machine.class_ == "CPU":
            return stages
        units = [tuple(row) for row in stages[:, UNITS].tolist()]
        known = {row: self.links.each_s(row, meetings, zero) for row in set(units)}
        found, (forward, back) = stages.copy(), np.array([known[row] for row in units]).T
        if self.slows:
            longer = [
                b.beside(*self.links.each_s(b.units, meetings, zero, apart=True))
                for b in table.kinds
            ]
            found[:, :2] += spread(np.array(longer)[table.at], self.split(table, count))
        found[:, 0] = np.maximum(found[:, 0], forward)
        found[:, 1] = np.maximum(found[:, 1], back - stages[:, 2])
        return found

    def beside(
        self, table: Table, zero: int, shards: Shards, scale: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Bytes that come and go, at least, of a rank with a layer: what lives inside an op, `scale` of that
        of the table; whole units, the weights of a layer and the gradients of one."""
        units = table.units @ shards.whole(zero)
        return (np.multiply.outer(table.inside, scale).T + units).min(-1)

    def memory(
        self, stages: np.ndarray, probe: Probe, zero: int, shards: Shards, scale: float = 1.0
    ) -> float:
        """Bytes of the fullest rank, at least; `scale` of a chunk to that of the stages."""
        parameters, gradients, optimizer = shards.states(stages, zero)[probe.held].sum(1).T
        coming = gradients * (zero >= 2)
        most = probe.most(scale * stages[:, KEPT], scale * stages[:, READ], coming)
        return float((parameters + gradients - coming + optimizer + most).max())

    def update(self, stages: np.ndarray, held: np.ndarray, zero: int, shards: Shards) -> float:
        """Seconds of the optimizer, at least; `held` as a probe says."""
        return self.updated(stages[held].sum(1), zero, shards)

    def updated(self, ranks: np.ndarray, zero: int, shards: Shards) -> float:
        """The same of [rank, numbers]: on the device, or what passes through the memory of its host."""
        states = dict(zip(STATES, shards.states(ranks, zero).T, strict=True))
        here = update_seconds(float(np.max(update_bytes(states))), self.machine)  # type: ignore[arg-type]
        passes = STATE_PASSES * float(shards.away(ranks, zero).max())
        return max(here, passes / host_memory_rate(self.machine))

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
tables are cached by (tp, sp, split, cp, method, ep, etp, recompute, micro_batch_size); dp, pp, m multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from partita.base.errors import Problem
from partita.cost.machine import Machine
from partita.parallel.pp.rules import balanced, schedule_of
from partita.parallel.room import Request
from partita.planner.bounds.columns import KEPT, READ, TIMES, TRAVEL, UNITS
from partita.planner.bounds.cuts import Cuts
from partita.planner.bounds.holds import Holds, alone, made_probe, short_step
from partita.planner.bounds.kinds import Kinds
from partita.planner.bounds.links import Links, Meeting
from partita.planner.bounds.reading import STATES, Reader, on_device
from partita.planner.bounds.rings import Rings
from partita.planner.bounds.rough import HIDES, Rough
from partita.planner.bounds.shared import Sharing
from partita.planner.bounds.table import Probe, Shards, Table, spread
from partita.planner.space import Leaf, MeshChoice, Shape, Space, Tokens
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule
from partita.simulate.moves import STATE_PASSES, host_memory_rate
from partita.simulate.pipeline import Rehearsal
from partita.simulate.predict import request_of
from partita.simulate.step import update_bytes, update_seconds

ENDLESS = 2048  # samples of a microbatch that amortises what a microbatch costs
SLACK = 0.998  # what is left of it
EAGER = 8192  # forwards of a schedule that is soon made
REORDERED = ("v_half", "v_min")  # whose orders are searched for, and which hold little
REHEARSED = 256  # schedules of whole steps that are remembered


class Bounds:
    """The bounds of one space on one machine; tables are filled as they are asked for."""

    def __init__(self, space: Space, machine: Machine) -> None:
        self.space, self.machine = space, machine
        self.links = Links(machine, space.model, bool(space.job.frozen))
        self.read = Reader(machine)
        self.tables: dict[object, Table | Problem] = {}
        self._probes: dict[object, dict[int, Probe | Problem]] = {}
        self._made: dict[tuple[int, str, int, int], Probe | Problem] = {}
        self._holds: dict[object, tuple[int, Holds | None, list[tuple[int, Problem]]]] = {}
        self._splits: dict[object, tuple[int, ...]] = {}
        self._stages: dict[tuple[int, int], np.ndarray] = {}
        self._inside: dict[tuple[int, int, bool], np.ndarray] = {}
        self._roughs: dict[object, Rough] = {}
        self._kinds: dict[object, Kinds] = {}
        self._steps: dict[object, Rehearsal] = {}
        self._sizes: dict[int, np.ndarray] = {}
        self.cuts, self.rings = Cuts(space), Rings(self.tables)
        self.turns = Sharing(space, machine)
        self.shards, self.ways = self.cuts.shards, self.cuts.ways
        self._asked: tuple[tuple[object, ...], tuple[np.ndarray, ...]] = ((None,) * 3, ())
        self.request = request_of(space.job)
        self.limit_bytes: float = space.job.cluster.memory_limit_bytes

    def share(self, other: Bounds) -> None:
        """Takes what those of another space of the same job, precision and machine know of blocks and
        schedules."""
        self.remember(other)
        self.tables, self._probes, self._stages = other.tables, other._probes, other._stages
        self._inside, self.rings = other._inside, other.rings

    def remember(self, other: Bounds) -> None:
        """Takes what those of any other space of the same job have laid and made, to make nothing twice: what
        is asked of it is asked anew."""
        self.read.remember(other.read)
        self._made, self._steps = other._made, other._steps
        self._splits, self._roughs = other._splits, other._roughs

    def table(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """The blocks of a microbatch on a rank, or why they cannot be laid."""
        key = (mesh.tp, mesh.sp, mesh.split, mesh.cp, shape, tokens)
        if key not in self.tables:
            make = self._mixed if tokens.every > 1 else self.laid_table
            made = make(mesh, shape, tokens)
            plain = self.tables.get((*key[:-1], tokens._replace(mode="none")))
            if isinstance(plain, Table) and plain.is_like(made):
                made = plain  # nothing is made again
            self.tables[key] = made
            if isinstance(made, Table) and tokens.micro == ENDLESS:
                self.rings.learn(mesh, shape, tokens, made)
        return self.tables[key]

    def knows(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> bool:
        """Whether a table is there."""
        return (mesh.tp, mesh.sp, mesh.split, mesh.cp, shape, tokens) in self.tables

    def laid_table(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | Problem:
        """The table of a laid model."""
        found = self.read(self.asked(mesh, shape, tokens), tokens.micro == ENDLESS)
        return on_device(found, self.space.offload)

    def asked(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Request:
        """The plan of a table: one microbatch, no pipeline, states that are not cut."""
        fold = mesh.cp * mesh.inner
        shard = next(d for d in range(1, 10**7) if d * fold % (shape.ep * shape.etp) == 0)
        alone = mesh._replace(pp=1, dp=shard)
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
        seconds = float(rough(stages, np.ones(1), m, self.links.send(mesh, sent))[0])
        return self.turns.least(mesh, seconds, stages, m, rough.paired)

    def kinds(self, mesh: MeshChoice, table: Table, schedules: Sequence[tuple[str, int]]) -> Kinds:
        """Where the stages of some schedules lie, and the layers' splits."""
        key = (mesh.pp, table.proportions, schedules[0], len(schedules))
        if key not in self._kinds:
            roughs = [self.lies(mesh, leaf) for leaf in schedules]
            splits = [self.split(table, r.num_stages) for r in roughs]
            self._kinds[key] = Kinds(roughs, splits, table.at)
        return self._kinds[key]

    def step(self, mesh: MeshChoice, leaf: tuple[str, int], m: int, stages: int) -> Rehearsal:
        """The schedule of the whole step, to be timed at any costs."""
        key = (mesh.pp, *leaf, m)
        if key not in self._steps:
            if len(self._steps) >= REHEARSED:
                self._steps.pop(next(iter(self._steps)))
            plan = alone(self.space, mesh.pp, leaf)

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
        found = lies.bounds(stages, np.ones(1), m, self.links.send(mesh, table.sent))
        path = self.turns(mesh).path
        first, whole, split = (path * float(x[0]) for x in found)
        second = split if lies.split else whole
        times = path * m * lies.fewest(self.split(table, lies.num_stages)) / mesh.pp
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
        """The schedule's clock at the stages' costs, and messages of so many bytes: rows of experts travel
        under compute in the backwards alone that stand beside a forward."""
        rows = zip(stages[:, TIMES].tolist(), (HIDES * stages[:, TRAVEL]).tolist(), strict=True)
        each = tuple(StageCosts(*times, hidden=hidden) for times, hidden in rows)
        costs = Costs(each, self.links.send(mesh, sent), self.links.wire(mesh, sent))
        seconds = self.step(mesh, leaf, m, len(stages)).least(costs)
        return self.turns.least(mesh, seconds, stages, m, self.lies(mesh, leaf).paired)

    def probe(self, mesh: MeshChoice, schedule: str, virtual: int, m: int) -> Probe | Problem:
        """The schedule on a short step."""
        short = short_step(schedule, mesh.pp, m)
        probes = self._probes_of(mesh, schedule, virtual)
        if short not in probes:
            key = mesh.pp, schedule, virtual, short
            if key not in self._made:
                lies = self.lies(mesh, (schedule, virtual))
                self._made[key] = made_probe(self.space, lies, mesh.pp, (schedule, virtual), short)
            probes[short] = self._made[key]
        return probes[short]

    def probed(self, mesh: MeshChoice, schedule: str, virtual: int, m: int) -> bool:
        """Whether that is there."""
        return short_step(schedule, mesh.pp, m) in self._probes_of(mesh, schedule, virtual)

    def _probes_of(
        self, mesh: MeshChoice, schedule: str, virtual: int
    ) -> dict[int, Probe | Problem]:
        """By the microbatches of a short step."""
        return self._probes.setdefault((mesh.pp, schedule, virtual), {})

    def prepare(self, mesh: MeshChoice, leaf: tuple[str, int], sizes: np.ndarray) -> None:
        """Makes the probes of some sizes of a microbatch where that is soon done."""
        if leaf[0] in REORDERED:
            return
        most = EAGER // self.lies(mesh, leaf).num_stages
        for micro in sizes.tolist():
            m = self.space.batch // mesh.dp // micro
            if short_step(leaf[0], mesh.pp, m) <= most:
                self.probe(mesh, *leaf, m)

    def holds(
        self, mesh: MeshChoice, leaf: tuple[str, int]
    ) -> tuple[Holds | None, list[tuple[int, Problem]]]:
        """What the schedule holds of each size of a microbatch, as far as its probes are there; and of which,
        by their place, it cannot be made."""
        key, probes = (mesh.pp, mesh.dp, *leaf), self._probes_of(mesh, *leaf)
        known, found, wrong = self._holds.get(key, (0, None, []))
        if known < len(probes):
            counts = [self.space.batch // mesh.dp // b for b in self.space.micros(mesh)]
            told = [probes.get(short_step(leaf[0], mesh.pp, m)) for m in counts]
            there = [p if isinstance(p, Probe) else None for p in told]
            found = Holds.of(there, self.lies(mesh, leaf).held)
            wrong = [(i, p) for i, p in enumerate(told) if isinstance(p, Problem)]
            self._holds[key] = len(probes), found, wrong
        return found, wrong

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
            alone = mesh._replace(cp=1)
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
        seconds, travel = table.even
        whole = seconds - (HIDES * travel if paired and mesh.pp > 1 else 0.0)
        ranks, work = mesh.dp * mesh.pp * parts, self.turns(mesh).work
        return work * whole / ENDLESS * SLACK * self.space.batch / ranks

    def reduced(
        self, stages: np.ndarray, held: np.ndarray, meetings: Sequence[Meeting], zero: int
    ) -> float:
        """Seconds at least that the step's reductions of gradients, and gathers of parameters, are seen: the
        largest units of a rank's layers in one call, beyond a whole backward of the rank."""
        if self.machine.class_ == "CPU":
            return 0.0
        ranks = np.add.reduce(stages[held], 1)
        room = (ranks[:, 1] + ranks[:, 2]) * self.machine.software.overlaps_gradients
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

    def inside(self, table: Table, held: np.ndarray, halves: bool) -> np.ndarray:
        """[rank] bytes of a microbatch beyond what is kept of it, at least; `held` as a probe says, `halves`
        of backward."""
        count = int(np.maximum.reduce(held, None)) + 1
        key = id(table), count, halves
        if key not in self._inside:
            self._inside[key] = table.worst(self.split(table, count), halves)
        return np.maximum.reduce(self._inside[key][held], 1)

    def whole(
        self, table: Table, held: np.ndarray, ways: Sequence[tuple[int, Shards]]
    ) -> np.ndarray:
        """[way, rank] bytes of a layer's units that come and go, at least: its weights and its gradients."""
        parts = np.array([shards.whole(zero) for zero, shards in ways])
        if not parts.any():
            return np.zeros((len(parts), len(held)))
        count = int(np.maximum.reduce(held, None)) + 1
        return np.maximum.reduce(table.whole(self.split(table, count), parts)[:, held], 2)

    def memory(
        self, table: Table, probe: Probe, zero: int, shards: Shards, scale: float = 1.0
    ) -> float:
        """Bytes of the fullest rank, at least; `scale` of a microbatch to that of the table."""
        held, stages = probe.held, self.stages(table, probe.chunks.shape[-1])
        parameters, gradients, optimizer = np.add.reduce(shards.states(stages, zero)[held], 1).T
        coming = gradients * (zero >= 2)
        now, later, inside = self._kept(table, probe, scale)
        most = np.maximum(now, coming + later) + inside
        stays = parameters + gradients - coming + optimizer
        whole = self.whole(table, held, [(zero, shards)])[0]
        return float(np.maximum.reduce(stays + most + whole))

    def _kept(self, table: Table, probe: Probe, scale: float) -> tuple[np.ndarray, ...]:
        """[rank] bytes of activations as `Probe.most` says them, and inside one op: the same of all ways to
        cut states, which are asked one behind the other."""
        mine, known = (table, probe, scale), self._asked[0]
        if any(a is not b for a, b in zip(mine, known, strict=True)):
            stages = self.stages(table, probe.chunks.shape[-1])
            most = probe.most(scale * stages[:, KEPT], scale * stages[:, READ])
            self._asked = mine, (*most, scale * self.inside(table, probe.held, probe.split))
        return self._asked[1]

    def update(self, stages: np.ndarray, held: np.ndarray, zero: int, shards: Shards) -> float:
        """Seconds of the optimizer, at least; `held` as a probe says."""
        return self.updated(np.add.reduce(stages[held], 1), zero, shards)

    def updated(self, ranks: np.ndarray, zero: int, shards: Shards) -> float:
        """The same of [rank, numbers]: on the device, or what passes through the memory of its host."""
        states = dict(zip(STATES, shards.states(ranks, zero).T, strict=True))
        here = update_seconds(float(np.max(update_bytes(states))), self.machine)  # type: ignore[arg-type]
        if self.space.offload.to == "none":
            return here
        passes = STATE_PASSES * float(shards.away(ranks, zero).max())
        return max(here, passes / host_memory_rate(self.machine))

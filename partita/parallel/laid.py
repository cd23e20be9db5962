"""A plan laid on a model: all rooms in order, and the readings everything else is built from.

    ORDER  split, dp, cp, tp, sp, ep, recompute, dp.reduce, the step's sums, offload, precision; pp on the
           result; dp.Joins, offload.moves

cp comes before sp (they nest on seq), and so does tp (sp turns tp's regions); ep after what cuts tokens;
every cut before dp.reduce (it needs gradient axes); pp reads only block inputs, outputs and tied names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from partita.base.errors import PlanError, Problem
from partita.parallel.cp import rules as cp
from partita.parallel.cp.halo import with_rows
from partita.parallel.dp import rules as dp
from partita.parallel.dp.rules import Flat
from partita.parallel.ep import rules as ep
from partita.parallel.ep.counts import Routing
from partita.parallel.laid_whole import before_stages
from partita.parallel.offload import rules as offload
from partita.parallel.pp import rules as pp
from partita.parallel.pp.rules import Stage
from partita.parallel.precision import rules as precision
from partita.parallel.read import Call, local_shape, tensor_bytes, traffic
from partita.parallel.recompute import rules as recompute
from partita.parallel.room import ARENAS, Request, axis_name, axis_size
from partita.parallel.sp import rules as sp
from partita.parallel.split import rules as split
from partita.parallel.tp import rules as tp
from partita.record.transfer import TrafficLine
from partita.schedule.ir import Action, Schedule
from partita.schedule.passes import with_communication
from partita.schedule.residence import with_offload
from partita.schedule.versions import anew
from partita.spec.layout import Layout, Piece, flat_unit, layout_of
from partita.spec.mesh import Mesh
from partita.spec.program import Block, Dim, Op, Program, Tensor, distinct

ROOMS = (split, dp, cp, tp, sp, ep, pp, recompute, offload, precision)


@dataclass(frozen=True)
class Unit:
    """Weights that lie in one flat buffer: parameters, gradients, optimizer states.

    `axes`: the gradient is partial over them; `shard`: those of them over which the states are cut as ZeRO's
    `stage` says (dp/rules.py), the gradient where `cuts_gradient`. `blocks`: the names of its holders on this
    place of pp, the first of which names it. `across`: the gradient is then summed between the places of pp
    that hold it, two by two: 'pp/copy', then 'tied' (none where one holds it). `weights`: (full name, laid
    tensor, layout), in storage order. `frozen`: none of them has a gradient.
    """

    name: str  # 'blocks.3.unit[dp_replicate]' or 'embedding.table'
    axes: tuple[str, ...]
    weights: tuple[tuple[str, Tensor, Layout], ...]
    blocks: tuple[str, ...]
    shard: tuple[str, ...] = ()
    stage: int = 0
    cuts_gradient: bool = False
    across: tuple[str, ...] = ()
    frozen: bool = False


@dataclass(frozen=True)
class Laid:
    """Everything that follows from a plan, a model and a batch; readers take it from here."""

    request: Request
    program: Program
    stages: tuple[Stage, ...]
    flats: tuple[tuple[Flat, ...], ...]  # of each stage
    rows: Mapping[str, int] = field(
        default_factory=dict
    )  # of dims whose size is data; even where left out

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> size, and `rows`."""
        return {**self.request.plan.sizes, **self.rows} if self.rows else self.request.plan.sizes

    @cached_property
    def mesh(self) -> Mesh:
        """The ranks."""
        return Mesh(self.sizes, self.request.plan.mesh.order)

    @property
    def samples(self) -> int:
        """Sequences of a step."""
        plan = self.request.plan
        return self.request.micro_batch_size * plan.data_parallel_size * plan.num_microbatches

    @property
    def replicates_tokens(self) -> bool:
        """Whether the ranks of tp hold the same tokens outside attention and mlp."""
        return self.sizes["tp"] > 1 and not self.request.plan.mesh.sp

    @cached_property
    def schedule(self) -> Schedule:
        """Who computes which stage of which microbatch, in which order."""
        return pp.schedule_of(self.request.plan)

    @cached_property
    def actions(self) -> tuple[tuple[Action, ...], ...]:
        """What each place of pp runs: the schedule with its messages, and what leaves between F and B."""
        program = with_communication(self.schedule)
        kept = offload.arena_of(self.request.plan, "activations") != "device"
        return with_offload(program) if kept and not self.schedule.is_asynchronous else program

    @cached_property
    def leaving(self) -> frozenset[tuple[int, int]]:
        """(stage, microbatch) of which nothing stays on the device between F and B."""
        if offload.arena_of(self.request.plan, "activations") == "device":
            return frozenset()
        every = (a for actions in self.actions for a in actions)
        return frozenset((a.stage, a.microbatch) for a in every if a.kind == "OFFLOAD")

    def stages_of(self, place: int) -> list[Stage]:
        """The stages that lie on a place of pp, in the order of their index."""
        return [self.stages[i] for i in self.schedule.stages_of(place)]

    @property
    def sums_loss_over_stages(self) -> bool:
        """Whether all stages take part in the sum of the loss."""
        return any(
            op.name == "step.loss:reduce_from" and "pp" in op.axes for op in self.program.step
        )

    def holds_loss(self, place: int) -> bool:
        """Whether a place of pp runs the last stage."""
        return place in self.stages[-1].places

    @cached_property
    def pairs(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """The places of pp that hold one weight, by the name of their group: 'tied', 'pp/copy'."""
        copies = 1 + (self.schedule.direction is not None)
        held = [h for n in self.program.tied if len(h := self.holders(n)) == 2 * copies]
        ends = (zip(h[:copies], h[copies:], strict=True) for h in held)
        found = {"tied": {tuple(sorted(pair)) for pairs in ends for pair in pairs}}
        found["pp/copy"] = {tuple(sorted(s.places)) for s in self.stages if len(s.places) == 2}
        return {name: tuple(sorted(places)) for name, places in found.items()}

    @property
    def norm_axes(self) -> tuple[str, ...]:
        """Axes over which ranks count other elements of the gradient."""
        return tuple(
            a for op in self.program.step if op.name == "step.norm:reduce_from" for a in op.axes
        )

    def holders(self, full_name: str) -> tuple[int, ...]:
        """Places of pp that hold a weight; the first is primary."""
        return self._holders[full_name]

    @cached_property
    def _holders(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, dict[int, None]] = {}
        for stage in self.stages:
            for name, block in zip(stage.names, stage.blocks, strict=True):
                for w in block.weights():
                    held = found.setdefault(self.full_name(name, w.name), {})
                    held |= dict.fromkeys(stage.places)
        return {n: tuple(s) for n, s in found.items()}

    def full_name(self, block: str, weight: str) -> str:
        """'blocks.3.attention.wq'; embedding's and head's weights, and tied ones, as they stand."""
        if weight in self.program.tied or weight.startswith(f"{block}."):
            return weight
        return f"{block}.{weight}"

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Full weight name -> layout in its unit's buffer."""
        found: dict[str, Layout] = {}
        for units in self._units:
            for unit in units:
                for name, _, layout in unit.weights:
                    found.setdefault(name, layout)
        return found

    def pieces(self, name: str, rank: int) -> list[Piece]:
        """What a rank stores of a weight in its unit's buffer."""
        if (name, rank) not in self._pieces:
            self._pieces[name, rank] = self.layouts[name].pieces(self.mesh, rank)
        return self._pieces[name, rank]

    @cached_property
    def _pieces(self) -> dict[tuple[str, int], list[Piece]]:
        return {}

    def units(self, place: int) -> list[Unit]:
        """The flat units that a rank at a place of pp stores, each once."""
        return self._units[place]

    @cached_property
    def _units(self) -> list[list[Unit]]:
        places = []
        for place in range(self.sizes["pp"]):
            found: dict[str, Unit] = {}
            for stage in self.stages_of(place):
                for flat in self.flats[stage.index]:
                    unit = self._unit(stage, flat)
                    known = found.get(unit.name)
                    if known is not None:  # a tied weight of two stages
                        unit = replace(known, blocks=(*known.blocks, *unit.blocks))
                    found[unit.name] = unit
            places.append(list(found.values()))
        return places

    def _unit(self, stage: Stage, flat: Flat) -> Unit:
        tied = self.program.tied
        held: dict[str, Tensor] = {}
        for at, names in zip(flat.blocks, flat.weights, strict=True):
            tensors = stage.blocks[at].tensors
            held |= {self.full_name(stage.names[at], n): tensors[n] for n in names}
        layouts = [layout_of(w, self.sizes, self.holders(n)) for n, w in held.items()]
        first = stage.names[flat.blocks[0]]
        return Unit(
            flat.name if flat.name in tied else f"{first}.{flat.name}",
            flat.axes,
            tuple(zip(held, held.values(), flat_unit(layouts, flat.shard), strict=True)),
            tuple(stage.names[at] for at in flat.blocks),
            flat.shard,
            dp.zero_stage(self.request.plan) if flat.shard else 0,
            bool(flat.shard) and dp.cuts_gradients(self.request.plan),
            () if flat.frozen else self._across(self.holders(next(iter(held)))),
            flat.frozen,
        )

    def _across(self, holders: tuple[int, ...]) -> tuple[str, ...]:
        copied = self.schedule.direction is not None
        return ("pp/copy",) * copied + ("tied",) * (len(holders) > 1 + copied)

    def traffic(self, rank: int, routing: Routing | None = None) -> list[TrafficLine]:
        """What the rank sends in one step, exactly; where experts are, for what the routers chose. Without
        `routing` every expert has its even share."""
        place = self.mesh.coords(rank)["pp"]
        found: dict[tuple[str, str, str, str], list[int]] = {}
        every = [(c, c.site, {"step": 1}) for c in self.step_calls(place)]
        for stage in self.stages_of(place):
            every += self._declared(rank, stage, routing)
        for call, site, done in every:
            for phase in (call.phase, call.half) if call.phase == "B" else (call.phase,):
                times = done.get(phase, 0) * call.times
                if times and not self._alone(call):
                    key = axis_name(call.axes), call.collective, site, phase
                    entry = found.setdefault(key, [0, 0])
                    entry[0] += times * call.parts
                    entry[1] += times * call.bytes
        return sorted(TrafficLine(rank, *key, *n) for key, n in found.items())

    def _declared(
        self, rank: int, stage: Stage, routing: Routing | None
    ) -> Iterator[tuple[Call, str, dict[str, int]]]:
        """Calls of a stage's blocks, and how often the rank is in each phase of them: microbatch by
        microbatch where a block's bytes depend on what its router chose."""
        place = self.mesh.coords(rank)["pp"]
        mine = [a for a in self.schedule.ranks[place] if a.stage == stage.index]
        all_done = {**Counter(a.kind for a in mine)}
        all_done["step"] = all_done.get("U", 1)  # once a step, or at each update under way
        sizes = with_rows(self.sizes, self.request.model.image, self.mesh.coords(rank)["cp"])
        once = {id(b): traffic(b, sizes) for b, _ in distinct(stage.blocks)}
        for name, block in zip(stage.names, stage.blocks, strict=True):
            if routing is None or (name, mine[0].microbatch) not in routing.counts:
                yield from self._counted(once[id(block)], name, all_done, place, mine)
                continue
            for i in sorted({a.microbatch for a in mine}):
                own = [a for a in mine if a.microbatch == i]
                done = {
                    **Counter(a.kind for a in own),
                    "step": all_done["step"] * (own[0] is mine[0]),
                }
                calls = traffic(block, self.sizes | routing.rows(name, i, rank))
                yield from self._counted(calls, name, done, place, own)

    def _counted(
        self,
        calls: Iterable[Call],
        block: str,
        done: dict[str, int],
        place: int,
        mine: list[Action],
    ) -> Iterator[tuple[Call, str, dict[str, int]]]:
        """What is not in the first backward, of a step or since an update, is left out there: the first of
        all holders of a unit on the place, where microbatches go two ways."""
        for call in calls:
            site = self.site(block, call.site)
            if call.apart:
                gone = (a.kind for a in mine if (a.stage, a.microbatch) in self.leaving)
                yield call, site, Counter(gone)
                continue
            if not call.again:
                yield call, site, {**done, "step": min(done["step"], 1)} if call.once else done
                continue
            holding, unit = {mine[0].stage}, site.rpartition(":")[0]
            if unit in self.program.tied and self.schedule.direction:
                holding |= {s.index for s in self.stages_of(place) if s.holds(unit)}
            every = [a for a in self.schedule.ranks[place] if a.stage in holding]
            new = Counter(a.kind for a in anew(every) if a in mine)
            yield call, site, {**done, **{kind: done[kind] - n for kind, n in new.items()}}

    def stage_calls(self, index: int) -> list[tuple[Call, str]]:
        """Every call of a stage's blocks with its full site; F and B are of one microbatch."""
        s, found = self.stages[index], []
        once = {id(b): traffic(b, self.sizes) for b, _ in distinct(s.blocks)}
        for name, block in zip(s.names, s.blocks, strict=True):
            found += [(call, self.site(name, call.site)) for call in once[id(block)]]
        return found

    def calls(self, place: int) -> list[tuple[Call, str]]:
        """Every call of a rank at a place of pp, as `stage_calls`, and those of the step."""
        found = [c for s in self.stages_of(place) for c in self.stage_calls(s.index)]
        return found + [(c, c.site) for c in self.step_calls(place)]

    def site(self, block: str, region: str) -> str:
        """Full site of a block's region: 'blocks.3' and 'attention.wo:reduce_from' joined; what is named
        after its block, and a tied weight's unit, stand as they are."""
        writer, _, kind = region.partition(":")
        if region == "send":
            return f"{block}:send"
        own = writer.partition(".")[0] == block or writer in self.program.tied
        return region if own else f"{block}.{writer}:{kind}"

    def step_calls(self, place: int) -> list[Call]:
        """Calls of the step that belong to no block, of a rank at a place of pp."""
        tensors = self.program.tensors
        return [
            Call(
                op.axes,
                e.collective,
                op.name,
                "step",
                tensor_bytes(tensors[e.of], self.sizes),
                op.lane,
            )
            for op in self.step_ops(place)
            for e in op.events
        ]

    def step_ops(self, place: int) -> list[Op]:
        """The step's sums that a place of pp takes part in; the last one has nobody to hand on to."""
        last, end = self.holds_loss(place), place == self.sizes["pp"] - 1
        found = [op for op in self.program.step if last or "pp" in op.axes]
        return [op for op in found if not (end and op.kind == "hand_on")]

    def _alone(self, call: Call) -> bool:
        kv = self.request.model.kv_heads
        return all(axis_size(a, self.sizes, kv) == 1 for a in call.axes)

    @cached_property
    def groups(self) -> list[tuple[tuple[str, ...], str]]:
        """Every (axes, lane) that some rank's regions speak on, in one order on all ranks."""
        found: dict[tuple[tuple[str, ...], str], None] = {}
        for place in range(self.sizes["pp"]):
            for call, _ in self.calls(place):
                if not self._alone(call) and not set(call.axes) & set(ARENAS):
                    found[call.axes, call.lane] = None
        return sorted(found)


def problems(request: Request) -> list[Problem]:
    """What every room finds wrong with the plan, all at once."""
    return [p for room in ROOMS for p in room.problems(request)]


def lay(request: Request) -> Laid:
    """Lays the plan. Raises PlanError with every problem at once."""
    found = [p for p in problems(request) if p.severity == "error"]
    if found:
        noun = "problem" if len(found) == 1 else "problems"
        raise PlanError(f"{request.plan} cannot run this model ({len(found)} {noun})", found)
    request = replace(request, plan=(plan := pp.in_force(request.plan)))
    two_ways = pp.schedule_of(plan).direction is not None
    program = before_stages(request, two_ways)
    parts = pp.stages(request, program)
    stages, flats = [], []
    join, moved = dp.Joins(program.tied, plan.sizes), offload.Made()
    joined: dict[tuple[int, ...], tuple[tuple[Flat, ...], tuple[Block, ...]]] = {}
    for stage in parts:
        key = tuple(map(id, stage.blocks))
        if key not in joined:  # stages of equal blocks are cut into the same units
            found_flats = dp.flats(stage.blocks, program.tied, plan, request.model.kv_heads)
            blocks = join(stage.blocks, found_flats)
            blocks = offload.moves(blocks, program.tied if two_ways else (), plan, moved)
            joined[key] = found_flats, blocks
        flats.append(joined[key][0])
        stages.append(replace(stage, blocks=joined[key][1]))
    return Laid(request, program, tuple(stages), tuple(flats))


__all__ = ["Call", "Dim", "Laid", "Request", "Stage", "Unit", "lay", "local_shape", "problems"]

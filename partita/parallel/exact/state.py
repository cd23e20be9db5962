"""What ranks store of a laid plan's flat units, and how it moves: gathered, scattered, reduced as the
regions on weights declare, and not otherwise. Part of execute.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from partita.parallel.exact.algebra import ExecuteError, Local, P, Values, noise
from partita.parallel.exact.block import BlockRun, World
from partita.parallel.laid import Laid, Unit, local_shape
from partita.parallel.read import BYTES
from partita.parallel.room import ACROSS
from partita.spec.layout import Layout, product_coordinate
from partita.spec.program import Block, Event, Op


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a layout: where it is stored, the global indices there, and whether it counts."""

    at: slice
    spans: tuple[range, ...]
    shape: tuple[int, ...]
    primary: bool


@dataclass
class Stored:
    """One flat unit on one rank. `boxes`: where each weight begins in the whole, and the indices held;
    `shapes`: as it is laid, padding counted.

    `whole` has the unit's parameters and gradients as long as they are there; `shard` what the rank updates:
    parameters, gradients and momentum, `part` of the whole or beside it.
    """

    unit: Unit
    size: int
    part: slice
    boxes: dict[str, tuple[int, tuple[range, ...]]]
    shapes: dict[str, tuple[int, ...]]
    whole: dict[str, Values] = field(default_factory=dict)
    shard: dict[str, Values] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dims = {n: tuple(d.name for d in t.dims) for n, t, _ in self.unit.weights}
        self.real = {n: tuple(slice(len(s)) for s in x) for n, (_, x) in self.boxes.items()}
        self.ends = {n: x + prod(self.shapes[n]) for n, (x, _) in self.boxes.items()}

    def view(self, name: str, role: str) -> Local:
        """A weight's part of the whole, without its padding; writing to it writes to the buffer."""
        start, spans = self.boxes[name]
        flat = self.whole[role][start : self.ends[name]]
        return Local(self.dims[name], spans, flat.reshape(self.shapes[name])[self.real[name]])

    def held(self, name: str, role: str, pieces: list[Part]) -> tuple[Local, ...]:
        """What is stored of a weight, copied."""
        dims, shard = self.dims[name], self.shard[role]
        return tuple([Local(dims, p.spans, shard[p.at].reshape(p.shape).copy()) for p in pieces])

    def fresh_gradient(self, key: str) -> Values:
        """A whole gradient of zeros, other numbers where nothing lies."""
        self.whole["gradient"] = noise(f"padding {key}", (range(self.size),)).copy()
        for name in self.boxes:
            self.view(name, "gradient").values[...] = 0
        return self.whole["gradient"]


class States:
    """All ranks' stored units."""

    def __init__(self, laid: Laid, world: World) -> None:
        self.laid, self.world = laid, world
        self._pieces: dict[tuple[int, int], list[Part]] = {}  # by layout, which the plan holds
        self.units = {
            (r, u.name): self._store(r, u)
            for place in range(laid.sizes["pp"])
            for u in laid.units(place)
            for r in world.ranks(place)
        }
        self.home = {(r, n): b for (r, _), b in self.units.items() for n in b.boxes}

    def _store(self, rank: int, unit: Unit) -> Stored:
        """Weights are drawn by name and place; padding holds other numbers on every rank."""
        boxes, start = {}, 0
        shapes = {name: local_shape(t, self.laid.sizes) for name, t, _ in unit.weights}
        for name, tensor, _ in unit.weights:
            boxes[name] = (start, self.world.share(tensor, rank))
            start += prod(shapes[name])
        ways, mine = product_coordinate(self.laid.sizes, self.world.at[rank], unit.shard)
        each = -(-start // ways)
        found = Stored(unit, each * ways, slice(mine * each, (mine + 1) * each), boxes, shapes)
        found.whole["parameter"] = noise(f"padding parameter {rank}", (range(found.size),)).copy()
        for name, (_, spans) in boxes.items():
            found.view(name, "parameter").values[...] = noise(name, spans)
        found.shard["parameter"] = found.whole["parameter"][found.part]
        if unit.stage == 3:
            found.shard["parameter"] = found.whole.pop("parameter")[found.part].copy()
        if unit.frozen:
            return self._checked(rank, found)
        found.shard["momentum"] = np.zeros(each, np.int64)
        found.shard["gradient"] = np.zeros(each, np.int64)
        if not unit.cuts_gradient:
            found.shard["gradient"] = found.fresh_gradient(f"{rank}")[found.part]
        return self._checked(rank, found)

    def pieces(self, layout: Layout, rank: int) -> list[Part]:
        """What the layout says of a rank, found once."""
        found = self._pieces.get((id(layout), rank))
        if found is None:
            found = []
            for p in layout.pieces(self.laid.mesh, rank):
                spans = tuple([range(a, b) for a, b in p.box])
                at = slice(p.start, p.start + p.numel())
                found.append(Part(at, spans, tuple(map(len, spans)), p.primary))
            self._pieces[id(layout), rank] = found
        return found

    def _checked(self, rank: int, found: Stored) -> Stored:
        """The layouts say of the shard what was stored there."""
        for name, _, layout in found.unit.weights:
            for p in self.pieces(layout, rank):
                there = found.shard["parameter"][p.at]
                if not np.array_equal(there, noise(name, p.spans).ravel()):
                    raise ExecuteError(f"{name} does not lie where its layout says on rank {rank}")
        return found

    # A microbatch

    def regions(self, name: str, block: Block, kind: str) -> Iterator[tuple[str, Op]]:
        """(unit, region) of one kind of a block."""
        for op in block.regions:
            if op.kind == kind:
                yield self.laid.site(name, op.name).rpartition(":")[0], op

    def fetch(
        self, ranks: Sequence[int], name: str, block: Block, phase: str, told: str = ""
    ) -> None:
        """The gathers of a block in a phase: before F, before B (in its input half), or of a step."""
        for unit, op in self.regions(name, block, "gather"):
            for event in (e for e in op.events if e.phase == phase):
                made = {}
                for r in ranks:
                    group = self.group(r, op.axes)
                    parts = [self.units[q, unit].shard["parameter"] for q in group]
                    made[r] = np.concatenate(parts)
                    self._record(r, (name, op, event), block, parts[0].size, told or phase)
                for r, whole in made.items():
                    self.units[r, unit].whole["parameter"] = whole
                    if self.units[r, unit].unit.stage < 3:
                        mine = self.units[r, unit]
                        mine.shard["parameter"] = whole[mine.part]

    def drop(self, ranks: Sequence[int], name: str, block: Block, phase: str) -> None:
        """Lets go of what was gathered for a phase."""
        for unit, op in self.regions(name, block, "gather"):
            if any(e.phase == phase for e in op.events):
                for r in ranks:
                    if self.units[r, unit].unit.stage == 3:
                        self.units[r, unit].whole.pop("parameter", None)

    def weights(self, name: str, block: Block, rank: int) -> dict[str, Local]:
        """A block's weights as far as they are there."""
        found = {}
        for w in block.weights():
            full = self.laid.full_name(name, w.name)
            if "parameter" in self.home[rank, full].whole:
                found[w.name] = self.home[rank, full].view(full, "parameter")
        return found

    def collect(self, run: BlockRun, told: str) -> None:
        """Weight gradients are added to the whole ones; then the block's reductions of every B, or W."""
        for r in run.ranks:
            for w in run.block.weights():
                full = self.laid.full_name(run.name, w.name)
                home = self.home[r, full]
                if w.frozen:
                    continue
                if "gradient" not in home.whole:
                    home.fresh_gradient(f"{r} {run.first}")
                if w.name in run.grads[r]:
                    view = home.view(full, "gradient").values
                    view[...] = (view + run.grads[r][w.name].values) % P
        self._scatter(run.ranks, run.name, run.block, "B", told)

    def _scatter(
        self, ranks: Sequence[int], name: str, block: Block, phase: str, told: str = ""
    ) -> None:
        for unit, op in self.regions(name, block, "scatter"):
            for event in (e for e in op.events if e.phase == phase):
                summed = {}
                for r in ranks:
                    every = [self.units[q, unit].whole["gradient"] for q in self.group(r, op.axes)]
                    summed[r] = sum(every) % P
                    self._record(r, (name, op, event), block, every[0].size, told or phase)
                for r, whole in summed.items():
                    mine = self.units[r, unit]
                    if not mine.unit.cuts_gradient:
                        mine.shard["gradient"][:] = whole[mine.part]
                        continue
                    held = mine.shard["gradient"]
                    held[:] = (held + whole[mine.part]) % P
                    del mine.whole["gradient"]

    # Once a step

    def reduce(self) -> None:
        """Every unit's reductions, then what two places of pp that hold a weight add up."""
        for kinds in (("scatter",), ("reduce",), ("copies",), ("tied",)):
            summed: dict[tuple[int, str], Values] = {}
            for ranks, name, block in self.each_block():
                if kinds == ("scatter",):
                    self._scatter(ranks, name, block, "step")
                    continue
                for unit, op in (x for kind in kinds for x in self.regions(name, block, kind)):
                    for event in op.events:
                        summed |= self._sum(ranks, (name, op, event), block, unit)
                    if kinds == ("reduce",):
                        self._settle(summed)
            self._settle(summed)  # between places of pp all hand in first

    def each_block(self) -> Iterator[tuple[Sequence[int], str, Block]]:
        """The ranks of each place of pp, and the blocks that lie there."""
        for place in range(self.laid.sizes["pp"]):
            for stage in self.laid.stages_of(place):
                for name, block in zip(stage.names, stage.blocks, strict=True):
                    yield self.world.ranks(place), name, block

    def _sum(
        self, ranks: Sequence[int], call: tuple[str, Op, Event], block: Block, unit: str
    ) -> dict[tuple[int, str], Values]:
        found = {}
        for r in ranks:
            axes = call[1].axes
            group = self._pair(axes[0], r) if axes[0] in ACROSS else self.world.group(r, axes)
            every = [self.units[q, unit] for q in group]
            mine = self.units[r, unit]
            if any((x.boxes, x.part) != (mine.boxes, mine.part) for x in every):
                raise ExecuteError(f"{unit}: ranks {group} hold other elements")
            found[r, unit] = sum(x.shard["gradient"] for x in every) % P
            self._record(r, call, block, found[r, unit].size, "step")
        return found

    def _settle(self, summed: dict[tuple[int, str], Values]) -> None:
        for key, gradient in summed.items():
            self.units[key].shard["gradient"][:] = gradient
        summed.clear()

    def _pair(self, axis: str, rank: int) -> tuple[int, ...]:
        at = self.world.at[rank]
        pair = next(places for places in self.laid.pairs[axis] if at["pp"] in places)
        return tuple(self.laid.mesh.rank_of({**at, "pp": p}) for p in pair)

    def group(self, rank: int, axes: tuple[str, ...]) -> list[int]:
        """Ranks that meet on a product of axes, in the order of their shards."""
        sizes, at = self.laid.sizes, self.world.at
        return sorted(
            self.world.group(rank, axes), key=lambda q: product_coordinate(sizes, at[q], axes)
        )

    def _record(
        self, rank: int, call: tuple[str, Op, Event], block: Block, size: int, phase: str
    ) -> None:
        name, op, event = call
        tensor = block.tensors[event.of]
        if size != tensor.local(self.laid.sizes):
            raise ExecuteError(f"{name}.{op.name}: not what is declared is handed in")
        site = self.laid.site(name, op.name)
        self.world.record(rank, op, event, site, phase, size * BYTES[tensor.dtype])

    def square(self, rank: int, axes: tuple[str, ...]) -> int:
        """The squares of the elements that this rank's place on `axes` counts; replicas alike."""
        at, found = self.world.at[rank], 0
        home = self.laid.mesh.rank_of({a: at[a] for a in axes})
        for (r, _), stored in self.units.items():
            for _, _, layout in stored.unit.weights if r == rank and not stored.unit.frozen else ():
                for p in self.pieces(layout, home):
                    g = stored.shard["gradient"][p.at]
                    found += int((g * g % P).sum()) if p.primary else 0
        return found % P

    def update(self, norms: Mapping[int, int]) -> dict[tuple[int, str], tuple[Local, ...]]:
        """SGD with momentum on what each rank stores; returns the gradients by (rank, weight)."""
        found = self.held("gradient")
        for (r, _), stored in self.units.items():
            if stored.unit.frozen:
                continue
            v = stored.shard
            v["momentum"][:] = (3 * v["momentum"] + v["gradient"] * norms[r]) % P
            v["parameter"][:] = (v["parameter"] - 7 * v["momentum"]) % P
            v["gradient"][:] = 0
            if not stored.unit.cuts_gradient:
                v["gradient"] = stored.fresh_gradient(f"{r}")[stored.part]
            stored.whole.pop("gradient" if stored.unit.cuts_gradient else "", None)
        return found

    def held(self, role: str) -> dict[tuple[int, str], tuple[Local, ...]]:
        """What every rank stores, by (rank, weight)."""
        return {
            (r, name): stored.held(name, role, self.pieces(layout, r))
            for (r, _), stored in self.units.items()
            if role in stored.shard
            for name, _, layout in stored.unit.weights
        }

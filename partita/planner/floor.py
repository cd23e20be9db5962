"""What states cost at least, before a schedule is chosen: of the ways to cut them that memory allows, the one
whose collectives are seen least.

    zero 0, 1   gradients reduced once a step (and parameters gathered), beyond one backward of the rank
    zero 2      gradients scattered in each microbatch, which hides under its backward at best
    zero 3      parameters gathered too, under forward and backward at best

Stages are taken as all alike, from an endless table; of each group of ranks the cheapest that may be.
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.cost.comm import group_seconds
from partita.planner.bound import ENDLESS, SLACK, Bounds
from partita.planner.space import MeshChoice, Shape
from partita.planner.table import Table

ROOM = 2.0  # a sample's backward takes at most so many times what it does in an endless microbatch


@dataclass(frozen=True)
class Floor:
    """For each size of a microbatch: seconds of a step at least, and of those what follows the schedule;
    None where memory allows no way."""

    seconds: tuple[float, ...]
    once: tuple[float, ...]


@dataclass(frozen=True)
class _Way:
    """A way to cut states: seconds of a layer's collectives in a microbatch, forward and backward, and of
    all of a rank's once a step."""

    forward: float
    backward: float
    once: float


def floor(b: Bounds, mesh: MeshChoice, shape: Shape, table: Table) -> Floor | None:
    """The least over all ways that fit with the smallest microbatch."""
    micros, total = b.space.micros(mesh), table.total
    kept = total.kept * min(micros, default=0) / ENDLESS / mesh.pp
    fit = {
        zero
        for zero, shards in b.ways(mesh, shape)
        if sum(b.states(total.states, zero, shards)) / mesh.pp + b.lent(table, zero) + kept
        <= b.limit_bytes
    }
    if not fit:
        return None
    if b.space.model.experts or b.machine.class_ == "CPU":
        return Floor((0.0,) * len(micros), (0.0,) * len(micros))
    found = [_way(b, mesh, shape, table, zero) for zero in sorted(fit)]
    rows = [_at(b, mesh, table, found, micro) for micro in micros]
    return Floor(tuple(r[0] for r in rows), tuple(r[1] for r in rows))


def _way(b: Bounds, mesh: MeshChoice, shape: Shape, table: Table, zero: int) -> _Way:
    """The cheapest group for each collective."""
    layers = table.blocks[1:-1]
    weights = table.unit * min(x.states[0] for x in layers)
    gradients = table.unit * min(x.states[1] for x in layers)
    mine = min(b.machine.software.gradient_bytes / 4, 1.0) * len(layers) / mesh.pp
    shards = [s for s, z in b.space.states(mesh, shape) if (z if s > 1 else 0) == zero]
    forward, backward, once = [], [], []
    for shard in shards:
        cut, rest = (shard * mesh.cp, mesh.dp // shard) if zero else (1, mesh.dp * mesh.cp)
        inner, outer = b.group(mesh.tp, cut), b.group(mesh.tp * cut, rest)
        gather = group_seconds("all_gather", inner, weights / cut) if zero == 3 else 0.0
        scatter = group_seconds("reduce_scatter", inner, gradients) if zero >= 2 else 0.0
        step = group_seconds("all_reduce", outer, mine * gradients / cut)
        step += group_seconds("reduce_scatter", inner, mine * gradients) if zero == 1 else 0.0
        step += group_seconds("all_gather", inner, mine * weights / cut) if zero in (1, 2) else 0.0
        forward.append(gather)
        backward.append(gather + scatter)
        once.append(step)
    return _Way(min(forward), min(backward), min(once))


def _at(
    b: Bounds, mesh: MeshChoice, table: Table, ways: list[_Way], micro: int
) -> tuple[float, float]:
    """Seconds of a step with microbatches of this size, and those that follow the schedule."""
    scale = micro * SLACK / ENDLESS
    layers = table.blocks[1:-1]
    forward = scale * min(x.forward for x in layers)
    backward = scale * min(x.input + x.weight for x in layers)
    ends = scale * (table.blocks[0].seconds + table.blocks[-1].seconds)
    room = (
        ROOM * scale / SLACK * (table.total.input + table.total.weight) / mesh.pp + ROOM * backward
    )
    room = room if b.machine.software.overlaps_gradients else 0.0
    times = b.space.batch // mesh.dp // micro / mesh.pp
    seconds, once = [], []
    for way in ways:
        each = max(forward, way.forward) + max(backward, way.backward)
        once.append(max(way.once - room, 0.0))
        seconds.append(times * (len(layers) * each + ends) + once[-1])
    return min(seconds), min(once)

"""What states cost at least, before a schedule is chosen: of the ways to cut them that memory allows, the one
whose collectives are seen least.

    zero 0, 1   gradients reduced once a step (and parameters gathered), beyond one backward of the rank
    zero 2      gradients scattered in each microbatch, which hides under its backward at best
    zero 3      parameters gathered too, under forward and backward at best

Stages are taken as all alike, from an endless table; of each group of ranks the cheapest that may be.
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.planner.bound import ENDLESS, SLACK, Bounds
from partita.planner.space import MeshChoice, Shape
from partita.planner.table import Table

ROOM, SPARSE_ROOM = (
    2.0,
    16.0,
)  # a sample's backward takes at most so many times what it does endlessly


@dataclass(frozen=True)
class Floor:
    """For each size of a microbatch: seconds of a step at least, and of those what follows the schedule;
    None where memory allows no way."""

    seconds: tuple[float, ...]
    once: tuple[float, ...]


@dataclass(frozen=True)
class _Way:
    """A way to cut states: seconds of each kind of layer's collectives in a microbatch, forward and backward,
    and of all of a rank's once a step."""

    each: tuple[tuple[float, float], ...]
    once: float


def floor(b: Bounds, mesh: MeshChoice, shape: Shape, table: Table) -> Floor | None:
    """The least over all ways that fit with the smallest microbatch."""
    micros, total = b.space.micros(mesh), table.total
    kept = total.kept * min(micros, default=0) / ENDLESS / mesh.pp
    fit = {
        zero
        for zero, shards in b.ways(mesh, shape)
        if sum(shards.states(total, zero)) / mesh.pp + b.lent(table, zero, shards) + kept
        <= b.limit_bytes
    }
    if not fit:
        return None
    if b.machine.class_ == "CPU":
        return Floor((0.0,) * len(micros), (0.0,) * len(micros))
    found = [_way(b, mesh, shape, table, zero) for zero in sorted(fit)]
    rows = [_at(b, mesh, table, found, micro) for micro in micros]
    return Floor(tuple(r[0] for r in rows), tuple(r[1] for r in rows))


def _way(b: Bounds, mesh: MeshChoice, shape: Shape, table: Table, zero: int) -> _Way:
    """The cheapest groups for each collective."""
    states = b.space.states(mesh, shape)
    shards = [s for s, z in states if (z if s > 1 else 0) == zero]
    mine = [sum(n * u[i] for u, n in _units(table)) / mesh.pp for i in range(4)]
    ways = [b.meetings(mesh, shape, s, zero) for s in shards]
    once = min(b.once_s(mine, at, zero) for at in ways)
    if zero < 2:
        return _Way(((0.0, 0.0),) * len(table.layers), once)
    rows = [[b.each_s(u, at, zero) for u, _ in _units(table)] for at in ways]
    return _Way(
        tuple(
            (min(x[0] for x in kind), min(x[1] for x in kind)) for kind in zip(*rows, strict=True)
        ),
        once,
    )


def _units(table: Table) -> list[tuple[tuple[float, ...], int]]:
    return [(layer.units, n) for layer, n in table.layers]


def _at(
    b: Bounds, mesh: MeshChoice, table: Table, ways: list[_Way], micro: int
) -> tuple[float, float]:
    """Seconds of a step with microbatches of this size, and those that follow the schedule."""
    scale = micro * SLACK / ENDLESS
    costs = [(scale * x.forward, scale * (x.input + x.weight), n) for x, n in table.layers]
    ends = scale * (table.blocks[0].seconds + table.blocks[-1].seconds)
    most = SPARSE_ROOM if b.space.model.experts else ROOM
    total = scale / SLACK * (table.total.input + table.total.weight) / mesh.pp
    room = most * (total + max(back for _, back, _ in costs))
    room = room if b.machine.software.overlaps_gradients else 0.0
    times = b.space.batch // mesh.dp // micro / mesh.pp
    seconds, once = [], []
    for way in ways:
        layers = sum(
            n * (max(f, way_f) + max(back, way_b))
            for (f, back, n), (way_f, way_b) in zip(costs, way.each, strict=True)
        )
        once.append(max(way.once - room, 0.0))
        seconds.append(times * (layers + ends) + once[-1])
    return min(seconds), min(once)

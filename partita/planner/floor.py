"""What states cost at least, before a schedule is chosen: of the ways to cut them that memory allows, the one
whose collectives are seen least.

    zero 0, 1   gradients reduced once a step (and parameters gathered), beyond one backward of the rank
    zero 2      gradients scattered in each microbatch, which hides under its backward at best
    zero 3      parameters gathered too, under forward and backward at best

Stages are taken as all alike, from an endless table; of each group of ranks the cheapest that may be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from partita.planner.bound import ENDLESS, SLACK, Bounds
from partita.planner.space import MeshChoice, Shape
from partita.planner.table import HIDES, KEPT, Table
from partita.simulate.links import SLOW

ROOM, SPARSE_ROOM = (
    2.0,
    16.0,
)  # a sample's backward takes at most so many times what it does endlessly


@dataclass(frozen=True)
class Floor:
    """For each size of a microbatch: seconds of a step at least, infinite where memory allows no way; of them
    what follows the schedule; and bytes of the fullest rank at least."""

    seconds: np.ndarray
    once: np.ndarray
    num_bytes: np.ndarray


@dataclass(frozen=True)
class _Way:
    """A way to cut states: seconds of each kind of layer's collectives in a microbatch, forward and backward,
    and of all of a rank's once a step."""

    each: tuple[tuple[float, float], ...]
    once: float


class Floors:
    """The floors of a space; ways are kept by mesh and experts."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.space = bounds, bounds.space
        self._ways: dict[object, _Way] = {}

    def __call__(
        self, mesh: MeshChoice, shape: Shape, table: Table, cp: int = 1, paired: bool = False
    ) -> Floor:
        """The least over all ways that fit. `cp`: into how many parts ranks cut the tokens of the table;
        `paired`: of schedules of pairs, whose rows travel under compute."""
        b, total = self.bounds, table.total
        micros = np.array(self.space.micros(mesh))
        samples = micros / (ENDLESS * cp)
        kept = samples * total[KEPT] / mesh.pp
        seconds, once, least = (np.full(len(micros), np.inf) for _ in range(3))
        for zero, shards in b.ways(mesh, shape):
            states = shards.standing(total, zero) / mesh.pp
            beside = b.beside(table, zero, shards, samples)
            num_bytes = states + kept + beside
            np.minimum(least, num_bytes, out=least)
            fits = num_bytes <= b.limit_bytes
            if not fits.any():
                continue
            way = self._way(mesh, shape, table, zero)
            found = self._seconds(mesh, table, way, samples, paired)
            for known, new in zip((seconds, once), found, strict=True):
                np.minimum(known, new, out=known, where=fits)
        return Floor(seconds, once, least)

    def _way(self, mesh: MeshChoice, shape: Shape, table: Table, zero: int) -> _Way:
        """The cheapest groups for each collective."""
        if self.bounds.machine.class_ == "CPU":
            return _Way(((0.0, 0.0),) * len(table.layers), 0.0)
        kinds = tuple(layer.units for layer, _ in table.layers)
        key = (replace(mesh, sp=False), shape.ep, shape.etp, zero, kinds)
        if key not in self._ways:
            self._ways[key] = self._cheapest(mesh, shape, table, zero)
        return self._ways[key]

    def _cheapest(self, mesh: MeshChoice, shape: Shape, table: Table, zero: int) -> _Way:
        b, states = self.bounds, self.space.states(mesh, shape)
        mine = [sum(n * layer.units[i] for layer, n in table.layers) / mesh.pp for i in range(4)]
        shards = {s for s, z in states if (z if s > 1 else 0) == zero}
        ways = [b.meetings(mesh, shape, s, zero) for s in shards]
        once = min(b.once_s(mine, at, zero) for at in ways)
        if zero < 2:
            return _Way(((0.0, 0.0),) * len(table.layers), once)
        each = []
        for layer, _ in table.layers:
            found = [b.each_s(layer.units, at, zero, apart=True) for at in ways]
            each.append((min(f for f, _ in found), min(back for _, back in found)))
        return _Way(tuple(each), once)

    def _seconds(
        self, mesh: MeshChoice, table: Table, way: _Way, samples: np.ndarray, paired: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a step with microbatches of each size, and those that follow the schedule."""
        scale, longest = samples * SLACK, 0.0
        layers = scale * (table.blocks[0].seconds + table.blocks[-1].seconds)
        for (layer, n), (forward, backward) in zip(table.layers, way.each, strict=True):
            back = layer.input + layer.weight
            longest = max(longest, back)
            hides = HIDES * layer.travel if paired else 0.0
            there, here = scale * layer.forward, scale * (back - hides)
            if self.bounds.slows:  # what is hidden slows what it hides under
                compute_f, path_f, compute_b, path_b = layer.rooms
                slower = scale * path_f + SLOW * np.minimum(forward, scale * compute_f)
                there = np.maximum(there, slower)
                slower = scale * (path_b - hides) + SLOW * np.minimum(backward, scale * compute_b)
                here = np.maximum(here, slower)
            layers += n * np.maximum(there, forward)
            layers += n * np.maximum(here, 0.0 if paired else backward)
        most = SPARSE_ROOM if self.space.model.experts else ROOM
        hidden = most * samples * (table.total[1:3].sum() / mesh.pp + longest)
        overlaps = self.bounds.machine.software.overlaps_gradients
        once = np.maximum(way.once - (hidden if overlaps else 0.0), 0.0)
        times = self.space.batch // mesh.dp / np.array(self.space.micros(mesh)) / mesh.pp
        return times * layers + once, once

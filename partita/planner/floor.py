"""What states cost at least, before a schedule is chosen: of the ways to cut them that memory allows, the one
whose collectives are seen least.

    zero 0, 1   gradients reduced once a step (and parameters gathered), beyond one backward of the rank
    zero 2      gradients scattered in each microbatch, which hides under its backward at best
    zero 3      parameters gathered too, under forward and backward at best

Stages are taken as all alike, from an endless table; of each group of ranks the cheapest that may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from partita.base.errors import Problem
from partita.planner.bound import ENDLESS, SLACK, Bounds
from partita.planner.space import MeshChoice, Shape, Tokens
from partita.planner.table import HIDES, KEPT, Cost, Table
from partita.simulate.links import SLOW

ROOM, SPARSE_ROOM = (
    2.0,
    16.0,
)  # a sample's backward takes at most so many times what it does endlessly


@dataclass(frozen=True)
class Slower:
    """A way to cut states, for each size of a microbatch: whether it fits; by how much a rank's forwards and
    backwards of one are longer, where layers lie evenly; what follows the schedule."""

    fits: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    once: np.ndarray


@dataclass(frozen=True)
class Floor:
    """For each size of a microbatch: seconds of a step at least, infinite where memory allows no way; of them
    what follows the schedule; and bytes of the fullest rank at least. `slower`: the same of each way."""

    seconds: np.ndarray
    once: np.ndarray
    num_bytes: np.ndarray
    slower: tuple[Slower, ...] = ()

    def behind(self, both: Sequence[np.ndarray], halves: bool, times: np.ndarray) -> np.ndarray:
        """Seconds of a step at least, from both bounds of a schedule at stages without ZeRO's collectives;
        so many `times` a rank runs its share of the layers. Where weight `halves` are apart, the second bound
        has none of what makes backwards longer."""
        found = np.full(len(times), np.inf)
        for way in self.slower:
            first = both[0] + times * (way.forward + way.backward)
            second = both[1] + times * (way.forward if halves else way.forward + way.backward)
            np.minimum(found, np.maximum(first, second) + way.once, out=found, where=way.fits)
        return found


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
        slower: list[Slower] = []
        for zero, shards in b.ways(mesh, shape):
            states = shards.standing(total, zero) / mesh.pp
            beside = b.beside(table, zero, shards, samples)
            num_bytes = states + kept + beside
            np.minimum(least, num_bytes, out=least)
            fits = num_bytes <= b.limit_bytes
            if not fits.any():
                continue
            way = self._way(mesh, shape, table, zero)
            found, (forward, backward, new) = self._seconds(mesh, table, way, samples, paired)
            slower.append(Slower(fits, forward, backward, new))
            np.minimum(seconds, found, out=seconds, where=fits)
            np.minimum(once, new, out=once, where=fits)
        return Floor(seconds, once, least, tuple(slower))

    def behind(
        self, mesh: MeshChoice, table: Table, leaf: tuple[str, int], least: Floor
    ) -> np.ndarray:
        """Seconds of a step at least for each size of a microbatch, under a schedule and what states cost at
        least: a rank's share of the layers is that of the rank with fewest."""
        b, micros = self.bounds, np.array(self.space.micros(mesh))
        lies = b.lies(mesh, leaf)
        fewest = lies.fewest(b.split(table, lies.num_stages))
        times = fewest * (self.space.batch // mesh.dp) / micros
        return least.behind(b.rough(mesh, table, leaf, micros), lies.split, times)

    def fewer_parts(
        self, mesh: MeshChoice, shape: Shape, mode: tuple[str, int], paired: bool, cut: float
    ) -> float:
        """Seconds of a step at least, as a sequence cut into fewer parts tells: cut further, a sample takes
        its devices no fewer seconds (more is sent, over links no faster). From the most parts that a table is
        known of, until they tell `cut` or more; infinite where memory allows no way."""
        b, seconds = self.bounds, 0.0
        parts = [(replace(mesh, cp=c), s) for c, s in shape.narrower(mesh.cp)]
        known = [i for i, (m, s) in enumerate(parts) if b.knows(m, s, Tokens(*mode, ENDLESS))]
        for narrow, alike in parts[max(known, default=0) :] if cut < np.inf else ():
            table = b.endless(narrow, alike, mode)
            if isinstance(table, Problem):
                continue
            seconds = b.evenly(mesh, table, paired, fewer := mesh.cp // narrow.cp)
            if seconds < cut:
                seconds = float(self(mesh, shape, table, fewer, paired).seconds.min())
            if seconds >= cut:
                break
        return seconds

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
        shards = {s for s, z, _ in states if (z if s > 1 else 0) == zero}
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
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Seconds of a step with microbatches of each size; by how much a rank's forwards and backwards of
        one are longer for the way, and what follows the schedule."""
        scale, longest = samples * SLACK, 0.0
        layers = scale * (table.blocks[0].seconds + table.blocks[-1].seconds)
        more_f, more_b = np.full(len(samples), np.inf), np.full(len(samples), np.inf)
        for (layer, n), (forward, backward) in zip(table.layers, way.each, strict=True):
            longest = max(longest, layer.input + layer.weight)
            alone, there = self._forward(layer, scale, forward)
            more_f = np.minimum(more_f, there - alone)
            back, here = self._backward(layer, scale, backward, paired)
            more_b = np.minimum(more_b, here - back)
            layers += n * (there + here)
        most = SPARSE_ROOM if self.space.model.experts else ROOM
        hidden = most * samples * (table.total[1:3].sum() / mesh.pp + longest)
        overlaps = self.bounds.machine.software.overlaps_gradients
        once = np.maximum(way.once - (hidden if overlaps else 0.0), 0.0)
        times = self.space.batch // mesh.dp / np.array(self.space.micros(mesh)) / mesh.pp
        share = (len(table.blocks) - 2) / mesh.pp
        return times * layers + once, (share * more_f, share * more_b, once)

    def _forward(
        self, layer: Cost, scale: np.ndarray, seconds: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """A layer's forward alone, and beside collectives that take so long."""
        compute, path = layer.rooms[:2]
        alone = np.maximum(scale * layer.forward, layer.least[0])
        found = np.maximum(alone, seconds)
        if self.bounds.slows:  # what is hidden slows what it hides under
            found = np.maximum(found, scale * path + SLOW * np.minimum(seconds, scale * compute))
        return alone, found

    def _backward(
        self, layer: Cost, scale: np.ndarray, seconds: float, paired: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same of its backward, which in a pair hides what rows travel."""
        hides = HIDES * layer.travel if paired else 0.0
        compute, path = layer.rooms[2:]
        alone = scale * (layer.input + layer.weight - hides)
        if not hides:
            alone = np.maximum(
                np.maximum(alone, layer.least[1]), scale * layer.input + layer.least[2]
            )
        found = alone if paired else np.maximum(alone, seconds)
        if self.bounds.slows:
            slower = scale * (path - hides) + SLOW * np.minimum(seconds, scale * compute)
            found = np.maximum(found, slower)
        return alone, found

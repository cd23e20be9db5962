"""What states cost at least, before a schedule is chosen: of the ways to cut them that memory allows, the one
whose collectives are seen least.

    zero 0, 1   gradients reduced once a step (and parameters gathered), beyond one backward of the rank
    zero 2      gradients scattered in each microbatch, which hides under its backward at best
    zero 3      parameters gathered too, under forward and backward at best

Stages are taken as all alike, from an endless table; of each group of ranks the cheapest that may be.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """[way to cut states, size of a microbatch]: whether it fits; by how much a rank's forwards and
    backwards of one are longer, where layers lie evenly; what follows the schedule."""

    fits: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    once: np.ndarray


@dataclass(frozen=True)
class Floor:
    """For each size of a microbatch: seconds of a step at least, infinite where memory allows no way; of them
    what follows the schedule; and bytes of the fullest rank at least. `slower`: of each way, if any fits."""

    seconds: np.ndarray
    once: np.ndarray
    num_bytes: np.ndarray
    slower: Slower | None = None

    def behind(
        self, bounds: Sequence[np.ndarray], times: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a step at least where backwards are whole, and where weight halves are apart, from the
        bounds of a schedule at stages without ZeRO's collectives; so many `times` a rank runs its share of
        the layers. The bound of halves has none of what makes backwards longer."""
        way, (first, whole, halves) = self.slower, bounds
        if way is None:
            return self.seconds, self.seconds
        forward = times * way.forward
        longer = forward + times * way.backward + way.once
        split = np.maximum(first + longer, halves + forward + way.once)
        return _least(whole + longer, way.fits), _least(split, way.fits)


def _least(found: np.ndarray, fits: np.ndarray) -> np.ndarray:
    """Of the ways that fit."""
    return np.where(fits, found, np.inf).min(-2)


@dataclass(frozen=True)
class _Ways:
    """The ways to cut states. `standing` [way, numbers]: what share of each number of a table is there all
    the time; `units` [way, kind of layer]: bytes that come and go; `forward`, `backward` [kind of layer, way,
    1]: seconds of a layer's collectives in a microbatch; `once` [way, 1]: of all of a rank's in a step;
    `update` [way, 1]: of the optimizer."""

    standing: np.ndarray
    units: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    once: np.ndarray
    update: np.ndarray


class Floors:
    """The floors of a space; ways are kept by mesh and experts."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.space = bounds, bounds.space
        self._known: dict[object, _Ways] = {}

    def __call__(
        self, mesh: MeshChoice, shape: Shape, table: Table, cp: int = 1, paired: bool = False
    ) -> Floor:
        """The least over all ways that fit. `cp`: into how many parts ranks cut the tokens of the table;
        `paired`: of schedules of pairs, whose rows travel under compute."""
        b, ways = self.bounds, self._ways(mesh, shape, table)
        samples = b.sizes(mesh) / (ENDLESS * cp)
        states = (ways.standing @ table.total / mesh.pp)[:, None]
        beside = (samples * table.inside[:, None] + ways.units[..., None]).min(1)
        num_bytes = states + beside + samples * (table.total[KEPT] / mesh.pp)
        least, fits = num_bytes.min(0, initial=np.inf), num_bytes <= b.limit_bytes
        if not fits.any():
            none = np.full(len(samples), np.inf)
            return Floor(none, none, least)
        found, forward, backward, once = self._seconds(mesh, table, ways, samples, paired)
        slower = Slower(fits, forward, backward, once)
        return Floor(_least(found, fits), _least(once, fits), least, slower)

    def behind(
        self, mesh: MeshChoice, table: Table, leaf: tuple[str, int], least: Floor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a step at least for each size of a microbatch, under a schedule with whole backwards or
        with weight halves, and what states cost at least: a rank's share of the layers is that of the rank
        with fewest."""
        b = self.bounds
        lies = b.lies(mesh, leaf)
        fewest = lies.fewest(b.split(table, lies.num_stages))
        times = fewest * (self.space.batch // mesh.dp) / b.sizes(mesh)
        return least.behind(b.rough(mesh, table, leaf), times)

    def kinds(
        self, mesh: MeshChoice, table: Table, least: Floor
    ) -> tuple[Mapping[object, int], tuple[np.ndarray, np.ndarray]]:
        """The same of all schedules at once, as the last rank alone tells: the row of each kind, and [kind,
        size]."""
        b = self.bounds
        kinds, sizes, samples = b.kinds(mesh, table), b.sizes(mesh), self.space.batch // mesh.dp
        send = b.links.send(mesh, table.sent / ENDLESS * sizes)
        found = kinds(table, SLACK / ENDLESS, sizes, samples, send)
        times = kinds.fewest * samples / sizes
        return kinds.place, least.behind([x[:, None] for x in found], times[:, None])

    def fewer_parts(
        self, mesh: MeshChoice, shape: Shape, mode: tuple[str, int], paired: bool, cut: float
    ) -> float:
        """Seconds of a step at least, as a sequence cut into fewer parts tells: cut further, a sample takes
        its devices no fewer seconds (more is sent, over links no faster). From the most parts that a table is
        known of, until they tell `cut` or more; infinite where memory allows no way."""
        b, seconds = self.bounds, 0.0
        if cut == np.inf:
            return seconds
        parts, tokens = [(c, s) for c, s in shape.narrower(mesh.cp)], Tokens(*mode, ENDLESS)
        meshes = [MeshChoice(mesh.pp, mesh.dp, c, mesh.tp, mesh.sp) for c, _ in parts]
        known = [i for i, (_, s) in enumerate(parts) if b.knows(meshes[i], s, tokens)]
        first = max(known, default=0)
        for narrow, (_, alike) in zip(meshes[first:], parts[first:], strict=True):
            table = b.endless(narrow, alike, mode)
            if isinstance(table, Problem):
                continue
            seconds = b.evenly(mesh, table, paired, fewer := mesh.cp // narrow.cp)
            if seconds < cut:
                seconds = float(self(mesh, shape, table, fewer, paired).seconds.min())
            if seconds >= cut:
                break
        return seconds

    def _ways(self, mesh: MeshChoice, shape: Shape, table: Table) -> _Ways:
        key = (mesh.pp, mesh.dp, mesh.cp, mesh.tp, shape.ep, shape.etp, table.largest)
        if key not in self._known:
            ways = self.bounds.ways(mesh, shape)
            each = np.eye(len(table.total))
            standing = [shards.standing(each, zero) for zero, shards in ways]
            units = [table.units @ shards.whole(zero) for zero, shards in ways]
            seconds = [self._cheapest(mesh, shape, table, zero) for zero, _ in ways]
            even = table.total[None] / mesh.pp
            update = [self.bounds.updated(even, zero, shards) for zero, shards in ways]
            layers, shape_of = len(table.layers), (len(ways), len(table.layers), 2)
            found = (
                np.array([s for s, _ in seconds]).reshape(shape_of).transpose(2, 1, 0)[..., None]
            )
            self._known[key] = _Ways(
                np.array(standing).reshape(len(ways), len(each)),
                np.array(units).reshape(len(ways), layers),
                found[0],
                found[1],
                np.array([s for _, s in seconds]).reshape(len(ways), 1),
                np.array(update).reshape(len(ways), 1),
            )
        return self._known[key]

    def _cheapest(
        self, mesh: MeshChoice, shape: Shape, table: Table, zero: int
    ) -> tuple[list[tuple[float, float]], float]:
        """The cheapest groups for each collective: seconds of each kind of layer's in a microbatch, forward
        and backward, and of all of a rank's once a step."""
        b, states, none = self.bounds, self.space.states(mesh, shape), (0.0, 0.0)
        if b.machine.class_ == "CPU":
            return [none] * len(table.layers), 0.0
        mine = [sum(n * layer.units[i] for layer, n in table.layers) / mesh.pp for i in range(4)]
        shards = {s for s, z, _ in states if (z if s > 1 else 0) == zero}
        ways = [b.links.meetings(mesh, shape, s, zero) for s in shards]
        once = min(b.links.once_s(mine, at, zero) for at in ways)
        if zero < 2:
            return [none] * len(table.layers), once
        each = []
        for layer, _ in table.layers:
            found = [b.links.each_s(layer.units, at, zero, apart=True) for at in ways]
            each.append((min(f for f, _ in found), min(back for _, back in found)))
        return each, once

    def _seconds(
        self, mesh: MeshChoice, table: Table, ways: _Ways, samples: np.ndarray, paired: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """[way, size]: seconds of a step; by how much a rank's forwards and backwards of a microbatch are
        longer for the way, and what follows the schedule."""
        scale, longest = samples * SLACK, 0.0
        layers = scale * sum(b.seconds for b in table.ends)
        more_f, more_b = [], []
        seconds = zip(table.layers, ways.forward, ways.backward, strict=True)
        for (layer, n), forward, backward in seconds:
            longest = max(longest, layer.input + layer.weight)
            alone, there = self._forward(layer, scale, forward)
            more_f.append(there - alone)
            back, here = self._backward(layer, scale, backward, paired)
            more_b.append(here - back)
            layers = layers + n * (there + here)
        most = SPARSE_ROOM if self.space.model.experts else ROOM
        hidden = most * samples * (table.total[1:3].sum() / mesh.pp + longest)
        overlaps = self.bounds.machine.software.overlaps_gradients
        once = np.maximum(ways.once - (hidden if overlaps else 0.0 * hidden), 0.0) + ways.update
        times = self.space.batch // mesh.dp / self.bounds.sizes(mesh) / mesh.pp
        share = (len(table.at) - 2) / mesh.pp
        longer_f, longer_b = (share * functools.reduce(np.minimum, x) for x in (more_f, more_b))
        return times * layers + once, longer_f, longer_b, once

    def _forward(
        self, layer: Cost, scale: np.ndarray, seconds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """A layer's forward alone, and beside collectives that take so long."""
        compute, path = layer.rooms[:2]
        alone = np.maximum(scale * layer.forward, layer.least[0])
        found = np.maximum(alone, seconds)
        if self.bounds.slows:  # what is hidden slows what it hides under
            found = np.maximum(found, scale * path + SLOW * np.minimum(seconds, scale * compute))
        return alone, found

    def _backward(
        self, layer: Cost, scale: np.ndarray, seconds: np.ndarray, paired: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same of its backward, which in a pair hides what rows travel."""
        hides = HIDES * layer.travel if paired else 0.0
        compute, path = layer.rooms[2:]
        alone = scale * (layer.input + layer.weight - hides)
        if not hides:
            alone = np.maximum(
                np.maximum(alone, layer.least[1]), scale * layer.input + layer.least[2]
            )
        found = np.maximum(alone, 0.0 * seconds if paired else seconds)
        if self.bounds.slows:
            slower = scale * (path - hides) + SLOW * np.minimum(seconds, scale * compute)
            found = np.maximum(found, slower)
        return alone, found

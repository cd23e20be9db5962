"""What states cost at least, before a schedule: of the ways to cut them that fit, the one seen least.

    zero 0, 1   gradients reduced once a step (and parameters gathered), beyond one backward of the rank
    zero 2      gradients scattered in each microbatch, which hides under its backward at best
    zero 3      parameters gathered too, under forward and backward at best

Stages are taken as all alike, from an endless table; of each group of ranks the cheapest that may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from partita.base.errors import Problem
from partita.cost.empirical import SLOW
from partita.planner.bounds.bound import ENDLESS, SLACK, Bounds
from partita.planner.bounds.columns import KEPT, READ, TRAVEL
from partita.planner.bounds.rough import HIDES, PAIRED, Halves, Rough, halves
from partita.planner.bounds.table import Shards, Table
from partita.planner.space import MeshChoice, Shape, Tokens

# a sample's backward takes at most so many times what it does endlessly
ROOM, SPARSE_ROOM = 2.0, 16.0
NEAR = 0.9  # of the best seen: a bound below that is seldom raised to it by where stages lie


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
        self, bounds: Sequence[np.ndarray], times: np.ndarray, fits: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds of a step at least where backwards are whole, and where weight halves are apart, from the
        bounds of a schedule at stages without ZeRO's collectives; so many `times` a rank runs its share of
        the layers. The bound of halves has none of what makes backwards longer. `fits`: the ways that do
        under the schedule."""
        way, (first, whole, halves) = self.slower, bounds
        if way is None:
            return self.seconds, self.seconds
        forward = times * way.forward
        longer = forward + times * way.backward + way.once
        split = np.maximum(first + longer, halves + forward + way.once)
        fits = way.fits if fits is None else fits
        return _least(whole + longer, fits), _least(split, fits)


def _least(found: np.ndarray, fits: np.ndarray) -> np.ndarray:
    """Of the ways that fit."""
    return np.minimum.reduce(np.where(fits, found, np.inf), -2)


@dataclass(frozen=True)
class Kind:
    """What schedules hold whose stages lie alike: bytes of states [way, 1, rank], `standing` and `coming`; of
    a chunk those kept, and what its weight half reads beyond, [rank, stage of its own], and the most `inside`
    one [rank], of so many samples as the table has, whose part `samples` [size, 1] is; and bytes of whole
    `units` [way, 1, rank]."""

    standing: np.ndarray
    coming: np.ndarray
    chunks: tuple[np.ndarray, np.ndarray]
    inside: np.ndarray
    samples: np.ndarray
    units: np.ndarray


@dataclass(frozen=True)
class Told:
    """What all kinds of schedules take: the `row` of each in what follows; their three `bounds` for each size
    of a microbatch, and how many `times` the rank with fewest layers runs its share of them, [row, size], as
    `Floor.behind` takes them; and `seconds` [whole or halves, row, size] of a step at least."""

    row: Mapping[object, int]
    bounds: Sequence[np.ndarray]
    times: np.ndarray
    seconds: np.ndarray

    def under(self, lies: Rough, least: Floor, fits: np.ndarray) -> np.ndarray:
        """[size]: seconds of a step at least of one of them, where these ways to cut states fit."""
        at = self.row[lies.kind]
        return least.behind([x[at] for x in self.bounds], self.times[at], fits)[lies.split]


@dataclass(frozen=True)
class _Ways:
    """The ways to cut states. `standing` [way, numbers]: what share of each number of a table is there all
    the time, `coming` what comes with a first backward; `units` [way, kind of layer]: bytes that come and
    go; `forward`, `backward` [kind of layer, way, 1]: seconds of a layer's collectives in a microbatch;
    `once` [way, 1]: of all of a rank's in a step; `update` [way, 1]: of the optimizer."""

    standing: np.ndarray
    coming: np.ndarray
    units: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    once: np.ndarray
    update: np.ndarray


@lru_cache(maxsize=4096)
def _shares(shards: Shards, zero: int, numbers: int) -> tuple[np.ndarray, np.ndarray]:
    """[numbers]: what share of each number of a row is there all the time; what comes with a backward."""
    each = np.eye(numbers)
    return shards.standing(each, zero), shards.states(each, zero)[:, 1] * (zero > 1)


class Floors:
    """The floors of a space; ways are kept by mesh and experts."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.space = bounds, bounds.space
        self._known: dict[object, _Ways] = {}
        self._kept: dict[object, Floor] = {}
        self.begins = False  # what the first beam asks the search asks again

    def __call__(
        self,
        mesh: MeshChoice,
        shape: Shape,
        table: Table,
        cp: int = 1,
        paired: bool = False,
        keep: bool = False,
    ) -> Floor:
        """The least over all ways that fit. `cp`: into how many parts ranks cut the tokens of the table;
        `paired`: of schedules of pairs, whose rows travel under compute; `keep`: it is asked for again."""
        key = (mesh, shape.ep, shape.etp, id(table), cp, paired, self.bounds.limit_bytes)
        found = self._kept.pop(key, None) or self._least(mesh, shape, table, cp, paired)
        if self.begins or keep:
            self._kept[key] = found
        return found

    def _least(self, mesh: MeshChoice, shape: Shape, table: Table, cp: int, paired: bool) -> Floor:
        b, ways = self.bounds, self._ways(mesh, shape, table)
        samples = b.sizes(mesh) / (ENDLESS * cp)
        states = (ways.standing @ table.total / mesh.pp)[:, None]
        units = ways.units[..., None]
        layer, last = (np.minimum.reduce(samples * x[:, None] + units, 1) for x in table.inside)
        beside = last + (layer - last) * (1 - 1 / mesh.pp)  # of the mean rank
        if self.space.uneven:  # two ranks may have no layer
            beside = layer * max(1 - 2 / mesh.pp, 0.0)
        num_bytes = states + beside + samples * (table.total[KEPT] / mesh.pp)
        least = np.minimum.reduce(num_bytes, 0, initial=np.inf)
        fits = num_bytes <= b.limit_bytes
        if not np.logical_or.reduce(fits, None):
            none = np.full(len(samples), np.inf)
            return Floor(none, none, least)
        found, forward, backward, once = self._seconds(mesh, table, ways, samples, paired)
        slower = Slower(fits, forward, backward, once)
        return Floor(_least(found, fits), _least(once, fits), least, slower)

    def kind(
        self, mesh: MeshChoice, shape: Shape, table: Table, leaf: tuple[str, int], parts: int = 1
    ) -> Kind:
        """What is the same of all schedules whose stages lie alike, from a table of fewer parts."""
        b = self.bounds
        lies = b.lies(mesh, leaf)
        ways, stages = self._ways(mesh, shape, table), b.stages(table, lies.num_stages)
        ranks = np.add.reduce(stages[lies.held], 1)
        samples = b.sizes(mesh)[:, None] / (ENDLESS * parts)
        standing, coming = ((x @ ranks.T)[:, None] for x in (ways.standing, ways.coming))
        kept, read = stages[:, KEPT], stages[:, READ]
        chunks = kept[lies.held], np.maximum(read - kept, 0.0)[lies.held]
        inside = b.inside(table, lies.held, lies.split)
        units = b.whole(table, lies.held, b.ways(mesh, shape))[:, None]
        return Kind(standing, coming, chunks, inside, samples, units)

    def held(
        self, mesh: MeshChoice, leaf: tuple[str, int], kind: Kind, least: Floor
    ) -> np.ndarray | None:
        """[way, size]: bytes of the fullest rank at least, as far as the schedule's probes are there."""
        holds, _ = self.bounds.holds(mesh, leaf)
        if holds is None or least.slower is None:
            return None
        chunks, later = (kind.samples * x for x in holds.most(*kind.chunks))
        most = np.maximum(chunks, kind.coming + later) + kind.samples * kind.inside
        return np.maximum.reduce(kind.standing + most + kind.units, -1)

    def kinds(
        self,
        mesh: MeshChoice,
        table: Table,
        least: Floor,
        schedules: Sequence[tuple[str, int]],
        parts: int = 1,
    ) -> Told:
        """What time schedules take, by where their stages lie, from an endless table of a sequence in so many
        times fewer parts."""
        b, scale = self.bounds, 1 / (ENDLESS * parts)
        kinds, sizes = b.kinds(mesh, table, schedules), b.sizes(mesh)
        samples = self.space.batch // mesh.dp
        send = b.links.send(mesh, table.sent * scale * sizes)
        bounds = kinds(table, SLACK * scale, sizes, samples, send)
        if (path := b.turns(mesh).path) != 1.0:
            bounds = tuple(path * x for x in bounds)
        times = kinds.fewest * samples / sizes
        seconds = least.behind([x[:, None] for x in bounds], times[:, None])
        return Told(kinds.place, bounds, times, np.array(seconds))

    def least(
        self, mesh: MeshChoice, shape: Shape, table: Table, parts: int, paired: bool, cut: float
    ) -> float:
        """Seconds of a step at least with any schedule, from an endless table of a sequence in so many times
        fewer parts: of the mean rank, and where that is just below `cut`, by where balanced stages lie."""
        found = self(mesh, shape, table, parts, paired)
        seconds = float(np.minimum.reduce(found.seconds))
        if self.space.uneven or seconds >= cut or seconds < NEAR * cut:
            return seconds
        b, schedules = self.bounds, self.schedules(mesh, paired)
        told = self.kinds(mesh, table, found, schedules, parts)
        each = np.minimum.reduce(np.maximum(told.seconds, found.seconds), -1)
        lies = [b.lies(mesh, leaf) for leaf in schedules]
        return min(float(each[int(x.split), told.row[x.kind]]) for x in lies)

    def _alone(self, table: Table, scale: np.ndarray, paired: bool) -> Halves:
        """What each kind of block takes; in a pair rows travel under compute."""
        rows = table.rows
        return halves(rows, scale, HIDES * (rows[:, TRAVEL] > 0) if paired else 0.0)

    def schedules(self, mesh: MeshChoice, paired: bool) -> list[tuple[str, int]]:
        """Those of a mesh; with experts those of pairs alone, or all others."""
        found = self.space.schedules(mesh)
        if self.space.model.experts:
            found = [x for x in found if (x[0] in PAIRED) == paired]
        return found

    def fewer_parts(
        self, mesh: MeshChoice, shape: Shape, mode: tuple[str, int], paired: bool, cut: float
    ) -> float:
        """Seconds of a step at least, as a sequence cut into fewer parts tells: cut further, a sample takes
        its devices no fewer seconds (more is sent, over links no faster). From the most parts that a table is
        known of, until they tell `cut` or more; infinite where memory allows no way. What is known of none
        made again tells first: it takes no longer; and what another way to lay experts tells of this cut."""
        b, seconds = self.bounds, 0.0
        if cut == np.inf:
            return seconds
        parts, tokens = shape.narrower(mesh.cp), Tokens(*mode, ENDLESS)
        meshes = [mesh._replace(cp=c) for c, _ in parts]
        if mode[0] != "none":
            cuts = [*zip(meshes, (s for _, s in parts), strict=True), (mesh, shape)]
            seconds = self._plain(mesh, paired, cuts)
            if seconds >= cut:
                return seconds
        told = b.rings.told(mesh, shape, tokens)
        if told is not None:  # what else it tells is asked of its schedules
            return max(seconds, b.evenly(mesh, told, paired, mesh.cp))
        known = [i for i, (_, s) in enumerate(parts) if b.knows(meshes[i], s, tokens)]
        first = max(known, default=0)
        if self.space.model.experts:  # a table of its own is worth laying: it tells others
            parts = parts[: first + 1 if known else 0]
        for narrow, (_, alike) in zip(meshes[first:], parts[first:], strict=False):
            table = b.endless(narrow, alike, mode)
            if isinstance(table, Problem):
                continue
            seconds = b.evenly(mesh, table, paired, fewer := mesh.cp // narrow.cp)
            if seconds < cut:
                seconds = self.least(mesh, shape, table, fewer, paired, cut)
            if seconds >= cut:
                break
        return seconds

    def _plain(
        self, mesh: MeshChoice, paired: bool, cuts: Sequence[tuple[MeshChoice, Shape]]
    ) -> float:
        """Seconds of a step at least, as the last known of the tables where nothing is made again tells."""
        b, tokens = self.bounds, Tokens(micro=ENDLESS)
        told = b.rings.told(*cuts[-1], tokens)
        if told is not None:
            return b.evenly(mesh, told, paired, mesh.cp)
        for narrow, alike in reversed(cuts):
            if b.knows(narrow, alike, tokens):
                table = b.table(narrow, alike, tokens)
                known = isinstance(table, Table)
                return b.evenly(mesh, table, paired, mesh.cp // narrow.cp) if known else 0.0
        return 0.0

    def _ways(self, mesh: MeshChoice, shape: Shape, table: Table) -> _Ways:
        key = (*mesh, shape.ep, shape.etp, table.largest)
        if key not in self._known:
            ways = self.bounds.ways(mesh, shape)
            numbers = len(table.total)
            shares = [_shares(s, zero, numbers) for zero, s in ways]
            standing, coming = np.array(shares).reshape(len(ways), 2, numbers).swapaxes(0, 1)
            units = [table.units @ shards.whole(zero) for zero, shards in ways]
            seconds = [self._cheapest(mesh, shape, table, zero) for zero, _ in ways]
            even = table.total[None] / mesh.pp
            turns = self.bounds.turns(mesh).once
            update = [turns * self.bounds.updated(even, zero, shards) for zero, shards in ways]
            layers, shape_of = len(table.layers), (len(ways), len(table.layers), 2)
            found = np.array([s for s, _ in seconds]).reshape(shape_of).T[..., None]
            self._known[key] = _Ways(
                standing,
                coming,
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
        scale, rows, at = samples * SLACK, table.rows, table.layers_at
        alone = self._alone(table, scale, paired)
        both = alone.forward + alone.whole
        mine = alone.at(at)
        there = self._forward(table, mine, scale, ways.forward)
        here = self._backward(table, mine, scale, ways.backward, paired)
        most = SPARSE_ROOM if self.space.model.experts else ROOM
        longest = np.maximum.reduce(rows[at, 1] + rows[at, 2])
        back = samples * (
            table.total[1:3].sum() / mesh.pp + longest
        )  # or what kernels' starts take
        ends = alone.whole[table.at[0]] + alone.whole[table.at[-1]]
        started = (table.counts @ mine.whole + ends) / mesh.pp + np.maximum.reduce(mine.whole)
        hidden = most * np.maximum(back, started)
        overlaps = self.bounds.machine.software.overlaps_gradients
        once = np.maximum(ways.once - (hidden if overlaps else 0.0 * hidden), 0.0) + ways.update
        times = self.space.batch // mesh.dp / self.bounds.sizes(mesh) / mesh.pp
        layers = both[table.at[0]] + both[table.at[-1]]
        layers = layers + np.einsum("l,lws->ws", table.counts, there + here)
        share = (len(table.at) - 2) / mesh.pp
        path, work, _ = self.bounds.turns(mesh)
        times, share = times * work, share * path
        longer_f = share * np.minimum.reduce(there - mine.forward[:, None], 0)
        longer_b = share * np.minimum.reduce(here - mine.whole[:, None], 0)
        return times * layers + once, longer_f, longer_b, once

    def _forward(
        self, table: Table, alone: Halves, scale: np.ndarray, seconds: np.ndarray
    ) -> np.ndarray:
        """[kind of layer, way, size]: its forward beside collectives that take so long."""
        compute, path = table.rooms[:2]
        found = np.maximum(alone.forward[:, None], seconds)
        if self.bounds.slows:  # what is hidden slows what it hides under
            least = np.maximum(scale * path, alone.lines[0])[:, None]
            longer = SLOW * np.minimum(seconds, (scale * compute)[:, None])
            found = np.maximum(found, least + longer)
        return found

    def _backward(
        self, table: Table, alone: Halves, scale: np.ndarray, seconds: np.ndarray, paired: bool
    ) -> np.ndarray:
        """The same of its backward, which in a pair hides what rows travel."""
        compute, path = table.rooms[2:]
        found = np.maximum(alone.whole[:, None], 0.0 * seconds if paired else seconds)
        if self.bounds.slows:
            hides = HIDES * table.rows[table.layers_at, TRAVEL][:, None] if paired else 0.0
            least = np.maximum(scale * (path - hides), alone.lines[1])[:, None]
            longer = SLOW * np.minimum(seconds, (scale * compute)[:, None])
            found = np.maximum(found, least + longer)
        return found

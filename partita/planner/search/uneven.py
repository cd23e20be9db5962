"""Layer splits beside every other choice: a space of plans with the layers split in any way but the balanced
one, on few devices.

The bounds of coarse tables and floors are of the mean rank, and hold for every split. From the blocks of a
microbatch on all splits are weighed at once: of each the same bound as of the balanced stages, of which the
least stands for all until the states are chosen. Where there are more than ALL splits of so many stages,
those one layer away from the balanced one are meant.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import comb

import numpy as np

from partita.base.errors import Problem
from partita.cost.machine import Machine
from partita.planner.bounds.columns import KEPT, READ
from partita.planner.bounds.links import Meeting
from partita.planner.bounds.rough import HIDES, PAIRED, Rough, halves
from partita.planner.bounds.table import Probe, Table
from partita.planner.search.elsewhere import ways_of
from partita.planner.search.levels import Levels
from partita.planner.search.nodes import Found, Goal, Node
from partita.planner.search.search import Search
from partita.planner.space import Leaf, MeshChoice, Space

Split = tuple[int, ...]
ALL = 300  # splits of which all are meant
FEW = 16  # devices
SUMMED = 32  # tables whose splits are kept


def count_splits(layers: int, stages: int) -> int:
    """Splits in which only an end may have no layer."""
    return comb(layers + 1, stages - 1)


def every_split(layers: int, stages: int) -> Iterator[Split]:
    """All of them."""

    def rest(left: int, at: int) -> Iterator[Split]:
        if at == stages - 1:
            yield (left,)
            return
        for n in range(0 if at == 0 else 1, left + 1):
            yield from ((n, *others) for others in rest(left - n, at + 1))

    return rest(layers, 0)


def moved(at: Split) -> Iterator[Split]:
    """One layer of one stage given to another."""
    for giver, taker in ((i, j) for i in range(len(at)) for j in range(len(at)) if i != j):
        if at[giver] > (0 if giver in (0, len(at) - 1) else 1):
            given = list(at)
            given[giver], given[taker] = given[giver] - 1, given[taker] + 1
            yield tuple(given)


@lru_cache(maxsize=1024)
def other_splits(balanced: Split) -> tuple[Split, ...]:
    """The splits that are meant: all but the balanced one, or those next to it."""
    layers, stages = sum(balanced), len(balanced)
    many = count_splits(layers, stages) > ALL
    found = moved(balanced) if many else every_split(layers, stages)
    return tuple(s for s in found if s != balanced)


@lru_cache(maxsize=1024)
def filled(layers: int, stages: int) -> tuple[Split, ...]:
    """All splits, of more stages than layers: the balanced one is none of theirs."""
    return tuple(every_split(layers, stages))


def _ends(splits: tuple[Split, ...]) -> np.ndarray:
    """[split, stage + 1]: where the blocks of each stage begin."""
    found = np.cumsum(np.array([(1, *s) for s in splits]), 1)
    found[:, 0] = 0
    found[:, -1] += 1
    return found


def stages_of(table: Table, splits: tuple[Split, ...]) -> np.ndarray:
    """[split, stage, numbers]."""
    sums = table.prefix[_ends(splits)]
    return sums[:, 1:] - sums[:, :-1]


class _Sums:
    """What some splits make of a table: `ends` as above, `stages` [split, stage, numbers], and of each stage
    the `halves` of a microbatch [split, stage], forward, the input half of backward, both halves."""

    def __init__(self, table: Table, splits: tuple[Split, ...]) -> None:
        self.of = table, splits
        self.ends, self.stages = _ends(splits), stages_of(table, splits)
        self._halves: dict[bool, list[np.ndarray]] = {}

    def halves(self, paired: bool) -> list[np.ndarray]:
        """Of schedules of pairs, or of others."""
        if paired not in self._halves:
            count, each, numbers = self.stages.shape
            told = halves(self.stages.reshape(-1, numbers), np.ones(1), HIDES * paired)
            self._halves[paired] = [x.reshape(count, each) for x in told[:3]]
        return self._halves[paired]

    def longer(self, each: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
        """[split, stage]: by how much forwards and backwards are longer, where blocks of each kind are so."""
        rows = np.cumsum(np.array(each)[self.of[0].at], 0)
        sums = np.concatenate([np.zeros((1, 2)), rows]).T[:, self.ends]
        forward, backward = sums[..., 1:] - sums[..., :-1]
        return forward, backward


def least_seconds(
    rough: Rough,
    sums: _Sums,
    longer: tuple[np.ndarray, np.ndarray] | None,
    m: int,
    send: float,
) -> np.ndarray:
    """[split]: the bound of `Rough` at stages of these costs; `longer`: as `_Sums` says it."""
    forward, back, whole = sums.halves(rough.paired)
    if longer is not None:
        forward, back, whole = forward + longer[0], back + longer[1], whole + longer[1]
    messages = rough.hops[:, 0] * send
    held, times = rough.held, m * rough.share
    head = (forward.cumsum(1) - forward + messages)[:, held]
    first = times * (forward + whole)[:, held].cumsum(2) + head
    if not rough.split:
        tail = (whole.cumsum(1) - whole + messages)[:, held]
        return (first + tail).max((1, 2))
    tail = (back.cumsum(1) - back + messages)[:, held]
    second = times * (forward + back)[:, held].cumsum(2) + head + tail
    return np.maximum(first, second).max((1, 2))


def least_bytes(probe: Probe, stages: np.ndarray, states: np.ndarray, zero: int) -> np.ndarray:
    """[split]: bytes of the fullest rank, but for what lives inside one op; `states` [split, stage, 3]."""
    parameters, gradients, optimizer = np.moveaxis(states[:, probe.held].sum(2), -1, 0)
    kept, more = stages[..., KEPT], np.maximum(stages[..., READ] - stages[..., KEPT], 0.0)
    most = np.einsum("mrs,ns->nmr", probe.chunks, kept)
    most = (most + np.einsum("mrs,ns->nmr", probe.wait, more)).max(1)
    coming = gradients * (zero >= 2)
    most = np.maximum(most, coming + np.einsum("rs,ns->nr", probe.later, kept))
    return (parameters + gradients - coming + optimizer + most).max(1)


class UnevenSpace(Space):
    """The plans of a space, in its order of axes or `turned`, with every other split of the layers: also on
    one or two stages more than there are layers."""

    uneven, spare = True, 2

    def __init__(self, space: Space, turned: bool = False) -> None:
        super().__init__(space.job, space.words, space.dtype, space.offload, turned)
        self._counts: dict[tuple[int, str, int], int] = {}

    def times(self, mesh: MeshChoice, schedule: tuple[str, int]) -> int:
        """The other splits of its stages."""
        key = (mesh.pp, *schedule)
        if key not in self._counts:
            stages = Rough(schedule[0], mesh.pp, schedule[1]).num_stages
            every, layers = count_splits(self.model.layers, stages), self.model.layers
            others = every - (stages <= layers)  # of more stages no split is the balanced one
            self._counts[key] = others if every <= ALL else stages * (stages - 1)
        return self._counts[key]

    def _all_schedules(self, mesh: MeshChoice) -> list[tuple[str, int]]:
        return super()._all_schedules(mesh) if mesh.pp > 1 else []


def spread_out(
    search: Search, goal: Goal, top: int, found: Found, budget_s: float, first: bool = False
) -> Found:
    """What was found, and with layers split in every other way on few devices, axes in any order, as one
    answer; `first`: any plan that fits, in the search's order of axes."""
    space, cluster, start = search.space, search.job.cluster, time.perf_counter()
    if cluster.devices > FEW or not space.words.admit("split", "uneven"):
        return found
    wanted = not space.stated and space.words.admit("order", "another") and len(cluster.links) > 1
    wanted = wanted and not first  # an order holds what another does
    for offload in ways_of(space, found):
        base = Space(space.job, space.words, space.dtype, offload)
        for turned in (False, True) if wanted else (False,):
            left = budget_s - (time.perf_counter() - start)
            more = Search(UnevenSpace(base, turned), Uneven, search)
            if offload == space.offload and not turned and not space.turned:
                more.bounds.share(search.bounds)
            there = more.best(goal, top, max(left, 0.0), first, found.plans)
            found.join_other("other splits of layers", there)
            if not there.complete:
                return found
    return found


class Uneven(Levels):
    """The steps down to a plan with a split of its own: the bound of all splits, then of each."""

    begins = False

    def __init__(self, space: Space, machine: Machine) -> None:
        super().__init__(space, machine)
        self._sums: dict[tuple[int, int], _Sums] = {}
        self._clocks: dict[object, float] = {}

    def rough(self, node: Node, only: tuple[str, ...] = ()) -> Iterator[Node]:
        """Schedules, each with its sizes of microbatches, by what the mean rank takes."""
        mesh, mode = node.mesh, (node.tokens.mode, node.tokens.every)
        table = self.bounds.endless(mesh, node.shape, mode)
        if isinstance(table, Problem):
            self.refuse(table, node.leaves)
            return
        if self.bounds.evenly(mesh, table, node.paired) >= self.cut:
            return
        if mode[0] != "none" and self._same(node, table):
            self.refuse("recompute changes nothing", node.leaves)
            return
        states = len(self.space.states(mesh, node.shape))
        least = self.floors(mesh, node.shape, table, paired=node.paired)
        bound = np.maximum(least.seconds, node.seconds)
        good = ((bound < self.cut) & (least.num_bytes <= self.cut_bytes)).nonzero()[0]
        sizes = self.bounds.sizes(mesh)
        rows = tuple(
            sorted(zip(*(x[good].tolist() for x in (bound, least.once, sizes)), strict=True))
        )
        for leaf in self.space.schedules(mesh):
            if self.space.model.experts and (leaf[0] in PAIRED) != node.paired:
                continue
            plans = states * self.space.times(mesh, leaf)
            self.refuse("memory", int(np.isinf(least.seconds).sum()) * plans)
            yield from self._next(node, Leaf(*leaf), rows, plans)

    def scheduled(self, node: Node) -> Iterator[Node]:
        """A schedule with one size of microbatch, by its best split; then the others."""
        mesh, b, m = node.mesh, self.bounds, self._microbatches(node)
        plans, named = node.leaves // (1 + len(node.rest)), (node.leaf.schedule, node.leaf.virtual)
        yield from self._next(node, node.leaf, node.rest, plans)
        probe, table = b.probe(mesh, *named, m), b.table(mesh, node.shape, node.tokens)
        if isinstance(probe, Problem) or isinstance(table, Problem):
            self.refuse(probe if isinstance(probe, Problem) else table, plans)  # type: ignore[arg-type]
            return
        splits = self._splits(node, table)
        states = len(self.space.states(mesh, node.shape))
        self.refuse("no layer to give", plans - states * len(splits))
        if splits:
            seconds = self._seconds(node, table, splits, 0, None).min() + node.once
            yield node._replace(
                level=4, seconds=max(node.seconds, seconds), leaves=states * len(splits), rest=()
            )

    def states(self, node: Node) -> Iterator[Node]:
        """How states are cut, and layers."""
        (table, _, probe), b, mesh = self._parts(node), self.bounds, node.mesh
        splits = self._splits(node, table)
        stages = self._summed(table, splits).stages
        for dp_shard, zero, order in self.space.states(mesh, node.shape):
            cut, shards = zero if dp_shard > 1 else 0, b.shards(mesh, node.shape, dp_shard)
            at = b.links.meetings(mesh, node.shape, dp_shard, cut)
            num_bytes = least_bytes(probe, stages, shards.states(stages, cut), cut)
            fits = num_bytes <= b.limit_bytes
            self.refuse("memory", int((~fits).sum()))
            seconds = self._seconds(node, table, splits, cut, at) + node.once
            seconds = np.maximum(seconds, node.seconds)
            good = fits & (seconds < self.cut) & (num_bytes <= self.cut_bytes)
            leaf = node.leaf._replace(dp_shard=dp_shard, zero=zero, order=order)
            for i in good.nonzero()[0].tolist():
                yield node._replace(
                    level=5,
                    leaf=leaf._replace(split=splits[i]),
                    leaves=1,
                    seconds=float(seconds[i]),
                    num_bytes=max(node.num_bytes, float(num_bytes[i])),
                )

    def played(self, node: Node) -> Iterator[Node]:
        """The schedule's clock at what the stages cost at least: ways to cut states that slow nothing ask it
        once, in whatever order of axes."""
        leaf, b, mesh = node.leaf, self.bounds, node.mesh
        table = b.table(mesh, node.shape, node.tokens)
        assert isinstance(table, Table)
        cut, m = leaf.zero if leaf.dp_shard > 1 else 0, self._microbatches(node)
        slows = cut >= 2 and b.slows
        at = b.links.meetings(mesh, node.shape, leaf.dp_shard, cut) if slows else None
        key = mesh, id(table), leaf.schedule, leaf.virtual, m, leaf.split, slows and (cut, at)
        if key not in self._clocks:
            sums = _Sums(table, (leaf.split,))
            stages, longer = sums.stages[0].copy(), self._longer(table, sums, cut, at)
            if longer is not None:
                stages[:, 0] += longer[0][0]
                stages[:, 1] += longer[1][0]
            self._clocks[key] = b.played(stages, mesh, leaf[:2], m, table.sent)
        yield node._replace(level=6, seconds=max(self._clocks[key] + node.once, node.seconds))

    def _splits(self, node: Node, table: Table) -> tuple[Split, ...]:
        stages = self.bounds.lies(node.mesh, (node.leaf.schedule, node.leaf.virtual)).num_stages
        layers = len(table.at) - 2
        if stages > layers:
            return filled(layers, stages)
        return other_splits(self.bounds.split(table, stages))

    def _parts(self, node: Node) -> tuple[Table, np.ndarray, Probe]:
        """Of a node whose table and schedule are there: the stages of its split, or of the first of all."""
        table = self.bounds.table(node.mesh, node.shape, node.tokens)
        named = (node.leaf.schedule, node.leaf.virtual)
        probe = self.bounds.probe(node.mesh, *named, self._microbatches(node))
        assert isinstance(table, Table) and isinstance(probe, Probe)
        split = node.leaf.split or self._splits(node, table)[0]
        return table, stages_of(table, (split,))[0], probe

    def _seconds(
        self,
        node: Node,
        table: Table,
        splits: tuple[Split, ...],
        cut: int,
        at: Sequence[Meeting] | None,
    ) -> np.ndarray:
        """[split]: seconds of the schedule at least."""
        b, named = self.bounds, (node.leaf.schedule, node.leaf.virtual)
        sums, send = self._summed(table, splits), b.links.send(node.mesh, table.sent)
        longer = self._longer(table, sums, cut, at)
        lies, m = b.lies(node.mesh, named), self._microbatches(node)
        path, work, _ = b.turns(node.mesh)
        found = path * least_seconds(lies, sums, longer, m, send)
        if work > path:  # all splits have the same work
            found = np.maximum(found, b.turns.least(node.mesh, 0.0, sums.stages[0], m, lies.paired))
        return found

    def _summed(self, table: Table, splits: tuple[Split, ...]) -> _Sums:
        """Of the splits of a table; those of the last that were asked for are kept."""
        key = id(table), id(splits)
        if key not in self._sums:
            if len(self._sums) >= SUMMED:
                self._sums.pop(next(iter(self._sums)))
            self._sums[key] = _Sums(table, splits)
        return self._sums[key]

    def _longer(
        self, table: Table, sums: _Sums, cut: int, at: Sequence[Meeting] | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """By how much ZeRO's collectives make forwards and backwards longer, layer by layer, if they do."""
        b = self.bounds
        if at is None or cut < 2 or not b.slows:
            return None
        each = [x.beside(*b.links.each_s(x.units, at, cut, apart=True)) for x in table.kinds]
        return sums.longer(each)

"""What follows from a node of the search, level by level: its parts, or itself with a better bound.

folds      where experts lie, what is recomputed       scheduled  a schedule at one size of microbatch
methods    how attention sees a cut sequence           states     how states are cut
rough      schedules, with sizes of microbatches       played     the schedule's clock
                                                           laid       the laid plan's own
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from partita.base.errors import PlanError, Problem
from partita.cost.machine import Machine
from partita.parallel.laid import lay
from partita.planner.bounds.bound import ENDLESS, REORDERED, Bounds
from partita.planner.bounds.exact import laid_memory, laid_seconds
from partita.planner.bounds.floor import Floor, Floors, Kind
from partita.planner.bounds.holds import least_probe
from partita.planner.bounds.links import Meeting
from partita.planner.bounds.rough import PAIRED
from partita.planner.bounds.table import Probe, Shards, Table
from partita.planner.orders import nearest
from partita.planner.search.nodes import INF, Node
from partita.planner.space import Leaf, Shape, Space, State, Tokens
from partita.simulate.predict import request_of
from partita.spec.plan import Plan


class Way(NamedTuple):
    """A way to cut states: as the space names it, the ZeRO stage in force, the parts, who meets; seconds of
    the schedule at least, and of what follows it."""

    state: State
    cut: int
    shards: Shards
    at: Sequence[Meeting]
    least: float
    once: float


class Levels:
    """The steps down from a mesh to a plan. `cut`: seconds from which on nothing is looked for, `cut_bytes`:
    bytes of the fullest rank beyond which nothing is; `refused`: how many plans were, and why. `begins`:
    whether plans as they are usually made are among them."""

    begins = True

    def __init__(self, space: Space, machine: Machine) -> None:
        self.space, self.job, self.machine = space, space.job, machine
        turned = space.turned or space.stated is not None
        self.bounds = Bounds(space, nearest(machine, space.model) if turned else machine)
        self.floors = Floors(self.bounds)
        self.refused: Counter[str] = Counter()
        self.cut = self.cut_bytes = INF

    def refuse(self, why: Problem | str, leaves: int) -> None:
        """Counts plans that cannot be."""
        self.refused[why if isinstance(why, str) else f"{why.room} {why.rule}"] += leaves

    def expand(self, node: Node) -> Iterator[Node]:
        """What follows from a node: its parts, or itself with a better bound."""
        s = self
        steps = (s.folds, s.each_method, s.rough, s.scheduled, s.states, s.played, s.laid)
        return steps[node.level](node)

    def folds(self, node: Node) -> Iterator[Node]:
        """Where experts lie and what is recomputed, as if a sequence were cut for nothing."""
        mesh, space = node.mesh, self.space
        kinds = Counter[bool]()
        for name, virtual in space.schedules(mesh):
            paired = name in PAIRED and bool(space.model.experts)
            kinds[paired] += space.times(mesh, (name, virtual))
        sizes = len(space.methods(mesh)) * len(space.micros(mesh))
        for shape in (Shape(ep=ep, etp=etp) for ep, etp in space.folds(mesh)):
            states = sizes * len(space.states(mesh, shape))
            for paired, schedules in kinds.items() if states else ():
                yield from self._modes(
                    node._replace(shape=shape, paired=paired), states * schedules
                )

    def _modes(self, node: Node, leaves: int) -> Iterator[Node]:
        """What is recomputed; so many plans lie below each."""
        mesh, modes = node.mesh, self.space.modes()
        if self.floors.begins:
            modes = [m for m in modes if m[1] == 1]
        alone = mesh._replace(cp=1)
        least = self.bounds.coarse(alone, node.shape, node.paired)
        if isinstance(least, Problem):
            self.refuse(least, leaves * len(modes))
        elif least / mesh.cp < self.cut:
            known = dict[int, Floor]()
            for mode in modes:
                table = self.bounds.endless(alone, node.shape, mode)
                assert isinstance(table, Table)
                if self.bounds.evenly(mesh, table, node.paired, mesh.cp) >= self.cut:
                    continue
                if id(table) not in known:
                    known[id(table)] = self.floors(
                        mesh, node.shape, table, mesh.cp, node.paired, True
                    )
                least = known[id(table)]
                seconds = max(float(least.seconds.min()), node.seconds)
                if seconds == INF:
                    self.refuse("memory", leaves)
                    continue
                yield node._replace(
                    level=1,
                    seconds=seconds,
                    num_bytes=float(least.num_bytes.min()),
                    leaves=leaves,
                    tokens=Tokens(*mode, 0),
                )

    def each_method(self, node: Node) -> Iterator[Node]:
        """What follows from its methods, of which none has a better bound than a sequence that is cut for
        nothing, wherever stages lie."""
        if node.mesh.cp > 1 and self.cut < INF:
            mode = (node.tokens.mode, node.tokens.every)
            table = self.bounds.endless(node.mesh._replace(cp=1), node.shape, mode)
            assert isinstance(table, Table)
            parts, paired = node.mesh.cp, node.paired
            least = self.floors.least(node.mesh, node.shape, table, parts, paired, self.cut)
            if least >= self.cut:
                return
            node = node._replace(seconds=max(node.seconds, least))
        for child in self.methods(node):
            yield from self.rough(child)

    def methods(self, node: Node) -> Iterator[Node]:
        """How attention sees a cut sequence: children that are not looked at yet."""
        for method, ulysses in (methods := self.space.methods(node.mesh)):
            shape = node.shape._replace(method=method, ulysses=ulysses)
            yield node._replace(level=2, shape=shape, leaves=node.leaves // len(methods))

    def rough(self, node: Node, only: tuple[str, ...] = ()) -> Iterator[Node]:
        """Schedules, each with its sizes of microbatches, by what a sample costs at least."""
        mesh, mode, b = node.mesh, (node.tokens.mode, node.tokens.every), self.bounds
        told = self.floors.fewer_parts(mesh, node.shape, mode, node.paired, self.cut)
        if told >= self.cut:
            self.refuse("memory", node.leaves if told == INF else 0)
            return
        sketch = b.rings.told(mesh, node.shape, Tokens(*mode, ENDLESS)) if self.cut < INF else None
        if sketch is not None:
            counted, self.refused = self.refused, Counter[str]()
            found = next(self._schedules(node, sketch, only, mesh.cp), None)
            counted, self.refused = self.refused, counted
            if found is None:
                self.refused.update(counted)
                return
        table = b.endless(mesh, node.shape, mode)
        if isinstance(table, Problem):
            self.refuse(table, node.leaves)
            return
        if b.evenly(mesh, table, node.paired) >= self.cut:
            return
        if mode[0] != "none" and self._same(node, table):
            self.refuse("recompute changes nothing", node.leaves)
            return
        yield from self._schedules(node, table, only)

    def _schedules(
        self, node: Node, table: Table, only: tuple[str, ...], parts: int = 1
    ) -> Iterator[Node]:
        """The same from an endless table of a sequence in so many times fewer parts."""
        mesh = node.mesh
        sizes, states = self.bounds.sizes(mesh), len(self.space.states(mesh, node.shape))
        least = self.floors(mesh, node.shape, table, parts, node.paired)
        schedules = self.floors.schedules(mesh, node.paired)
        self.refuse("memory", int(np.isinf(least.seconds).sum()) * states * len(schedules))
        if np.minimum.reduce(least.seconds, initial=INF) >= self.cut:
            return
        bound, known = np.maximum(least.seconds, node.seconds), dict[object, Kind]()
        told = self.floors.kinds(mesh, table, least, schedules, parts)
        every = np.maximum(told.seconds, bound)
        cut = np.minimum.reduce(every, -1) >= self.cut  # [halves, kind]
        for leaf in schedules:
            lies = self.bounds.lies(mesh, leaf)
            split, row = int(lies.split), told.row[lies.kind]
            if (only and leaf[0] not in only) or cut[split, row]:
                continue
            seconds = every[split, row]
            self.bounds.prepare(mesh, leaf, sizes[seconds < self.cut])
            held = fits = None
            holds, wrong = self.bounds.holds(mesh, leaf)
            if holds is not None:
                if (lies.kind, lies.split) not in known:
                    made = self.floors.kind(mesh, node.shape, table, leaf, parts)
                    known[lies.kind, lies.split] = made
                held = self.floors.held(mesh, leaf, known[lies.kind, lies.split], least)
            if held is not None:
                fits = held <= self.bounds.limit_bytes
                if not np.logical_and.reduce(fits, None):
                    seconds = np.maximum(told.under(lies, least, fits), bound)
            most = least.num_bytes if held is None else np.minimum.reduce(held)
            may = (seconds < self.cut) & (most <= self.cut_bytes)
            for i, why in wrong:
                self.refuse(why, states * int(may[i]))
                may[i] = False
            good = may.nonzero()[0]
            if fits is not None:
                none = np.isfinite(least.seconds) & ~np.logical_or.reduce(fits)
                self.refuse("memory", int(np.count_nonzero(none)) * states)
            if not len(good):
                continue
            rows = zip(*(x[good].tolist() for x in (seconds, least.once, sizes)), strict=True)
            here = node._replace(num_bytes=max(node.num_bytes, float(most[good].min())))
            yield from self._next(here, Leaf(*leaf), tuple(sorted(rows)), states)

    def _next(
        self, node: Node, leaf: Leaf, rest: tuple[tuple[float, float, int], ...], states: int
    ) -> Iterator[Node]:
        """A node of the most promising of some sizes of microbatches, which keeps the others."""
        if rest and rest[0][0] < INF:
            (seconds, once, micro), *others = rest
            tokens = Tokens(node.tokens.mode, node.tokens.every, micro)
            at = node.num_bytes, states * len(rest), node.mesh, node.shape, tokens, leaf
            yield Node(3, seconds, *at, once, node.paired, tuple(others))

    def _same(self, node: Node, table: Table) -> bool:
        """Whether the blocks cost what they do without recomputation, which is then among the choices."""
        if not self.space.words.admit("recompute", "none"):
            return False
        plain = self.bounds.endless(node.mesh, node.shape, ("none", 1))
        return isinstance(plain, Table) and plain.layers == table.layers

    def scheduled(self, node: Node) -> Iterator[Node]:
        """A schedule with one size of microbatch; then the others."""
        mesh, tokens, b, m = node.mesh, node.tokens, self.bounds, self._microbatches(node)
        states = node.leaves // (1 + len(node.rest))
        yield from self._next(node, node.leaf, node.rest, states)
        named = (node.leaf.schedule, node.leaf.virtual)
        num_stages = b.lies(mesh, named).num_stages
        cheap = b.knows(mesh, node.shape, tokens) or not b.probed(mesh, *named, m)
        if cheap and self._slow(node, num_stages) >= self.cut:  # a table is made sooner
            return
        if not b.probed(mesh, *named, m) and self._slower(node, num_stages) >= self.cut:
            return
        probe = b.probe(mesh, *named, m)
        if isinstance(probe, Problem):
            self.refuse(probe, states)
            return
        endless = b.endless(mesh, node.shape, (tokens.mode, tokens.every))
        assert isinstance(endless, Table)
        scale = tokens.micro / ENDLESS  # what a chunk keeps grows with its samples
        num_bytes = min(b.memory(endless, probe, *way, scale) for way in b.ways(mesh, node.shape))
        if num_bytes > self.bounds.limit_bytes:
            self.refuse("memory", states)
            return
        if num_bytes > self.cut_bytes:
            return
        if tokens.every > 1 and self.plain(node, endless, num_stages) >= self.cut:
            return
        table = b.table(mesh, node.shape, tokens)
        if isinstance(table, Problem):
            self.refuse(table, states)
            return
        seconds = self._slow(node, num_stages)
        if seconds < self.cut:
            yield node._replace(
                level=4, seconds=seconds, num_bytes=num_bytes, leaves=states, rest=()
            )

    def plain(self, node: Node, endless: Table, num_stages: int) -> float:
        """Seconds of a step at least where some layers run again, as the same stages tell without: a table
        that is wanted anyway."""
        tokens = node.tokens._replace(mode="none", every=1)
        table, b = self.bounds.table(node.mesh, node.shape, tokens), self.bounds
        if isinstance(table, Problem):
            return node.seconds
        named, m = (node.leaf.schedule, node.leaf.virtual), self._microbatches(node)
        stages = table.stages(b.split(endless, num_stages))
        return b.pipeline(stages, node.mesh, named, m, table.sent) + node.once

    def _slow(self, node: Node, num_stages: int) -> float:
        """Seconds of a step at least, where its table is there."""
        table = self.bounds.table(node.mesh, node.shape, node.tokens)
        if isinstance(table, Problem):
            return node.seconds
        named, m = (node.leaf.schedule, node.leaf.virtual), self._microbatches(node)
        stages = self.bounds.stages(table, num_stages)
        told = self.bounds.pipeline(stages, node.mesh, named, m, table.sent)
        return max(told + node.once, node.seconds)

    def _slower(self, node: Node, num_stages: int) -> float:
        """The same with the best way to cut states that one microbatch leaves room; infinite for none."""
        b, named = self.bounds, (node.leaf.schedule, node.leaf.virtual)
        table = b.table(node.mesh, node.shape, node.tokens)
        if isinstance(table, Problem):
            return node.seconds
        ways = self._ways(node, table, b.stages(table, num_stages))
        if named[0] in REORDERED and self.cut < INF:
            least = least_probe(b.lies(node.mesh, named), 1)
            ways = (w for w in ways if b.memory(table, least, w.cut, w.shards) <= b.limit_bytes)
        return min((w.least + w.once for w in ways), default=INF)

    def _ways(self, node: Node, table: Table, stages: np.ndarray) -> Iterator[Way]:
        """The ways to cut states that are below the cut."""
        b, m = self.bounds, node.mesh
        named, count = (node.leaf.schedule, node.leaf.virtual), self._microbatches(node)
        quick, held = b.quick(table, m, named, count), b.lies(m, named).held
        turns = b.turns(m).once
        for state in self.space.states(m, node.shape):
            cut = state[1] if state[0] > 1 else 0
            shards = b.shards(m, node.shape, state[0])
            at = b.links.meetings(m, node.shape, state[0], cut)
            least = quick(at, cut)
            if least >= self.cut:
                continue
            once = turns * b.update(stages, held, cut, shards) + b.reduced(stages, held, at, cut)
            if least + once < self.cut:
                yield Way(state, cut, shards, at, least, once)

    def _microbatches(self, node: Node) -> int:
        return self.space.batch // node.mesh.dp // node.tokens.micro

    def _parts(self, node: Node) -> tuple[Table, np.ndarray, Probe]:
        """Of a node whose table and schedule are there."""
        leaf, m = node.leaf, self._microbatches(node)
        table = self.bounds.table(node.mesh, node.shape, node.tokens)
        probe = self.bounds.probe(node.mesh, leaf.schedule, leaf.virtual, m)
        assert isinstance(table, Table) and isinstance(probe, Probe)
        return table, self.bounds.stages(table, probe.chunks.shape[-1]), probe

    def states(self, node: Node) -> Iterator[Node]:
        """How states are cut."""
        (table, stages, probe), b, m = self._parts(node), self.bounds, node.mesh
        named, count = (node.leaf.schedule, node.leaf.virtual), self._microbatches(node)
        for (dp_shard, zero, order), cut, shards, at, least, once in self._ways(
            node, table, stages
        ):
            num_bytes = b.memory(table, probe, cut, shards)
            if num_bytes > self.bounds.limit_bytes:
                self.refuse("memory", 1)
                continue
            if num_bytes > self.cut_bytes:
                continue
            seconds = least
            if cut > 1:
                slower = b.sharded(table, len(stages), at, cut)
                seconds = b.pipeline(slower, m, named, count, table.sent)
            yield node._replace(
                level=5,
                leaf=node.leaf._replace(dp_shard=dp_shard, zero=zero, order=order),
                leaves=1,
                seconds=max(node.seconds, least + once, seconds + once),
                once=once,
                num_bytes=num_bytes,
            )

    def played(self, node: Node) -> Iterator[Node]:
        """The schedule's clock at what the stages cost at least."""
        (table, stages, _), leaf, b = self._parts(node), node.leaf, self.bounds
        cut = leaf.zero if leaf.dp_shard > 1 else 0
        at = b.links.meetings(node.mesh, node.shape, leaf.dp_shard, cut)
        slower, m = b.sharded(table, len(stages), at, cut), self._microbatches(node)
        seconds = b.played(slower, node.mesh, leaf[:2], m, table.sent) + node.once
        yield node._replace(level=6, seconds=max(seconds, node.seconds))

    def laid(self, node: Node) -> Iterator[Node]:
        """The laid plan's own time and memory."""
        _, stages, probe = self._parts(node)
        named = (node.leaf.schedule, node.leaf.virtual)
        job = self.job.with_plan(self.plan(node))
        wrong = [p for p in job.problems() if p.severity == "error"]
        try:
            if wrong:
                raise PlanError("", wrong)
            laid = lay(request_of(job))
        except PlanError as refused:
            self.refuse(refused.problems[0], 1)
            return
        num_bytes = laid_memory(laid, probe, job.cluster)
        if num_bytes > self.bounds.limit_bytes:
            self.refuse("memory", 1)
            return
        if num_bytes > self.cut_bytes:
            return
        m = self._microbatches(node)
        step = self.bounds.step(node.mesh, named, m, len(stages))
        seconds = laid_seconds(laid, self.machine, step, m, self.bounds.turns(node.mesh))
        yield node._replace(
            level=7,
            seconds=max(seconds, node.seconds),
            num_bytes=max(num_bytes, node.num_bytes),
        )

    def plan(self, node: Node) -> Plan:
        """The plan of a leaf."""
        plan = self.space.plan(node.mesh, node.shape, node.tokens, node.leaf)
        return replace(plan, offload=self.space.offload)

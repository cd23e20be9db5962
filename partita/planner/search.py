"""The search: nodes of the space in order of their bound, until no bound is below the best plan that
`simulate` has seen.

Two heaps hold the same nodes. One is ordered by the bound: when its first is not better than the best plan,
the best is proven. The other adds what a level usually still hides, so that good plans are simulated soon.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from partita.base.errors import PlanError, Problem
from partita.cost.machine import machine_of
from partita.planner.bound import ENDLESS, Bounds
from partita.planner.exact import laid_bound
from partita.planner.floor import Floors
from partita.planner.nodes import ANY, HIDDEN, INF, Found, Goal, Node, Queue, beam, measures
from partita.planner.orders import nearest
from partita.planner.space import Leaf, Shape, Space, Tokens, Words, default_dtype
from partita.planner.table import PAIRED, Probe, Table
from partita.simulate.predict import Prediction, request_of, simulate
from partita.spec.job import Job
from partita.spec.plan import OffloadPlan, Plan

USUAL = ("1f1b", "interleaved_1f1b", "interleaved_zb", "zb_v", "dualpipev")
METHODS = ("ring", "all_gather")


class Search:
    """One search of a job's space; tables are shared by all goals."""

    def __init__(self, space: Space) -> None:
        self.space, self.job = space, space.job
        self.machine = machine_of(self.job.cluster)
        turned = space.turned or space.stated is not None
        self.bounds = Bounds(space, nearest(self.machine, space.model) if turned else self.machine)
        self.floors = Floors(self.bounds)
        self._refused: Counter[str] = Counter()
        self._cut = float("inf")  # a plan that takes longer is not looked for
        self.predictions: dict[str, Prediction] = {}

    def best(
        self,
        goal: Goal = ANY,
        top: int = 1,
        budget_s: float = 20.0,
        first: bool = False,
        seen: Sequence[Prediction] = (),
    ) -> Found:
        """Searches for the best `top` plans within so many seconds; `first`: any that fits. `seen`: plans
        of another space, which they must beat."""
        start, found = time.perf_counter(), Found()
        self._refused = found.rejected
        queue, self._cut = Queue(goal, self._refused, top, seen), float("inf")
        best = queue.best
        for node in self._meshes(found):
            queue.push(node)
        for node in self._usual(queue.roots, start + budget_s / 2):
            prediction = self.predict(self.plan(node))
            if prediction.fits and queue.keep(prediction, measures(prediction)):
                found.first_s = time.perf_counter() - start
        while queue and not (first and best):
            if time.perf_counter() - start > budget_s:
                found.complete = False
                break
            self._cut = queue.cut
            node = queue.pop()
            if node.level < len(HIDDEN) - 1:
                for child in self._expand(node):
                    queue.push(child)
                continue
            prediction = self._simulate(node)
            if prediction is None:
                continue
            found.simulated += 1
            if queue.keep(prediction, measures(prediction)):
                found.first_s = time.perf_counter() - start
        found.plans = [p for _, p in best]
        found.seconds = time.perf_counter() - start
        return found

    def _usual(self, roots: list[Node], until: float) -> list[Node]:
        """The most promising of plans as they are usually made (all devices, tp within a node and with sp,
        four parts of a sequence at most): they give the search a best plan to begin with."""
        wide = max((n.mesh.world for n in roots), default=0)
        most = self.job.cluster.devices_per_node
        counted, self._refused = self._refused, Counter()
        nodes: list[Node] = []
        for root in sorted(roots, key=lambda n: n.seconds):
            m = root.mesh
            common = m.world == wide and m.tp <= most and m.cp <= 4 and (m.sp or m.tp == 1)
            if common and time.perf_counter() < until:
                nodes += [n for n in self._folds(root) if n.tokens.every == 1]
        found = beam(
            nodes,
            (
                (lambda n: (x for x in self._methods(n) if x.shape.method in METHODS), 9999, 9999),
                (lambda n: self._rough(n, USUAL), 999, 400),
                (lambda n: (x for x in self._scheduled(n) if x.level == 4), 999, 50),
                (self._states, 60, 9999),
                (self._played, 60, 9999),
                (self._laid, 9, 2),
            ),
            until,
        )
        self._refused = counted
        return found[:1]

    def _refuse(self, why: Problem | str, leaves: int) -> None:
        self._refused[why if isinstance(why, str) else f"{why.room} {why.rule}"] += leaves

    def _meshes(self, found: Found) -> Iterator[Node]:
        for mesh in self.space.meshes():
            leaves = self.space.leaves(mesh)
            found.considered += leaves
            seconds = self.bounds.coarse(mesh)
            if isinstance(seconds, Problem):
                self._refuse(seconds, leaves)
            elif leaves:
                yield Node(0, seconds, 0.0, leaves, mesh)

    def _expand(self, node: Node) -> Iterator[Node]:
        """What follows from a node: its parts, or itself with a better bound."""
        steps = (
            self._folds,
            self._methods,
            self._rough,
            self._scheduled,
            self._states,
            self._played,
            self._laid,
        )
        return steps[node.level](node)

    def _folds(self, node: Node) -> Iterator[Node]:
        """Where experts lie and what is recomputed, as if a sequence were cut for nothing."""
        mesh, space = node.mesh, self.space
        kinds = Counter(n in PAIRED and bool(space.model.experts) for n, _ in space.schedules(mesh))
        sizes = len(space.methods(mesh)) * len(space.micros(mesh))
        for shape in (Shape(ep=ep, etp=etp) for ep, etp in space.folds(mesh)):
            states = sizes * len(space.states(mesh, shape))
            for paired, schedules in kinds.items() if states else ():
                yield from self._modes(
                    replace(node, shape=shape, paired=paired), states * schedules
                )

    def _modes(self, node: Node, leaves: int) -> Iterator[Node]:
        """What is recomputed; so many plans lie below each."""
        mesh, modes = node.mesh, self.space.modes()
        alone = replace(mesh, cp=1)
        least = self.bounds.coarse(alone, node.shape, node.paired)
        if isinstance(least, Problem):
            self._refuse(least, leaves * len(modes))
        elif least / mesh.cp < self._cut:
            for mode in modes:
                table = self.bounds.endless(alone, node.shape, mode)
                assert isinstance(table, Table)
                least = self.floors(mesh, node.shape, table, mesh.cp, node.paired)
                seconds = max(float(least.seconds.min()), node.seconds)
                if seconds == INF:
                    self._refuse("memory", leaves)
                    continue
                yield replace(
                    node,
                    level=1,
                    seconds=seconds,
                    num_bytes=float(least.num_bytes.min()),
                    leaves=leaves,
                    tokens=Tokens(*mode, 0),
                )

    def _methods(self, node: Node) -> Iterator[Node]:
        """Children that are not looked at yet: a table is laid only for what comes to its turn."""
        methods = self.space.methods(node.mesh)
        for method, ulysses in methods:
            shape = replace(node.shape, method=method, ulysses=ulysses)
            yield replace(node, level=2, shape=shape, leaves=node.leaves // len(methods))

    def _rough(self, node: Node, only: tuple[str, ...] = ()) -> Iterator[Node]:
        """Schedules, each with its sizes of microbatches, by what a sample costs at least."""
        mesh, mode = node.mesh, (node.tokens.mode, node.tokens.every)
        told = self.floors.fewer_parts(mesh, node.shape, mode, node.paired, self._cut)
        if told >= self._cut:
            self._refuse("memory", node.leaves if told == INF else 0)
            return
        table = self.bounds.endless(mesh, node.shape, mode)
        if isinstance(table, Problem):
            self._refuse(table, node.leaves)
            return
        if self.bounds.evenly(mesh, table, node.paired) >= self._cut:
            return
        if mode[0] != "none" and self._same(node, table):
            self._refuse("recompute changes nothing", node.leaves)
            return
        sizes, states = self.bounds.sizes(mesh), len(self.space.states(mesh, node.shape))
        least = self.floors(mesh, node.shape, table, paired=node.paired)
        schedules = self.space.schedules(mesh)
        if self.space.model.experts:
            schedules = [x for x in schedules if (x[0] in PAIRED) == node.paired]
        self._refuse("memory", int(np.isinf(least.seconds).sum()) * states * len(schedules))
        if least.seconds.min(initial=INF) >= self._cut:
            return
        bound = np.maximum(least.seconds, node.seconds)
        known: dict[object, tuple[np.ndarray, np.ndarray]] = {}
        for leaf in schedules:
            if only and leaf[0] not in only:
                continue
            lies = self.bounds.lies(mesh, leaf)
            if lies.kind not in known:
                known[lies.kind] = self.floors.behind(mesh, table, leaf, least)
            seconds = np.maximum(known[lies.kind][lies.split], bound)
            good = (seconds < self._cut).nonzero()[0]
            if not len(good):
                continue
            rows = zip(*(x[good].tolist() for x in (seconds, least.once, sizes)), strict=True)
            yield from self._next(node, Leaf(*leaf), tuple(sorted(rows)), states)

    def _next(
        self, node: Node, leaf: Leaf, rest: tuple[tuple[float, float, int], ...], states: int
    ) -> Iterator[Node]:
        """A node of the most promising of some sizes of microbatches, which keeps the others."""
        if rest and rest[0][0] < INF:
            (seconds, once, micro), *others = rest
            tokens = replace(node.tokens, micro=micro)
            yield replace(
                node,
                level=3,
                seconds=seconds,
                leaves=states * len(rest),
                tokens=tokens,
                leaf=leaf,
                once=once,
                rest=tuple(others),
            )

    def _same(self, node: Node, table: Table) -> bool:
        """Whether the blocks cost what they do without recomputation, which is then among the choices."""
        if not self.space.words.admit("recompute", "none"):
            return False
        plain = self.bounds.endless(node.mesh, node.shape, ("none", 1))
        return isinstance(plain, Table) and plain.layers == table.layers

    def _scheduled(self, node: Node) -> Iterator[Node]:
        """A schedule with one size of microbatch; then the others."""
        mesh, tokens, b, m = node.mesh, node.tokens, self.bounds, self._microbatches(node)
        states = node.leaves // (1 + len(node.rest))
        yield from self._next(node, node.leaf, node.rest, states)
        named = (node.leaf.schedule, node.leaf.virtual)
        num_stages = b.lies(mesh, named).num_stages
        cheap = b.knows(mesh, node.shape, tokens) or not b.probed(mesh, *named, m)
        if cheap and self._slow(node, num_stages) >= self._cut:  # a table is made sooner
            return
        probe = b.probe(mesh, *named, m)
        if isinstance(probe, Problem):
            self._refuse(probe, states)
            return
        endless = b.endless(mesh, node.shape, (tokens.mode, tokens.every))
        assert isinstance(endless, Table)
        stages, scale = b.stages(endless, num_stages), tokens.micro / ENDLESS
        num_bytes = min(  # what a chunk keeps grows with its samples
            b.memory(stages, probe, *way, scale=scale) + b.beside(endless, *way, scale)
            for way in b.ways(mesh, node.shape)
        )
        if num_bytes > self.bounds.limit_bytes:
            self._refuse("memory", states)
            return
        table = b.table(mesh, node.shape, tokens)
        if isinstance(table, Problem):
            self._refuse(table, states)
            return
        seconds = self._slow(node, num_stages)
        if seconds < self._cut:
            yield replace(
                node, level=4, seconds=seconds, num_bytes=num_bytes, leaves=states, rest=()
            )

    def _slow(self, node: Node, num_stages: int) -> float:
        """Seconds of a step at least, where its table is there."""
        table = self.bounds.table(node.mesh, node.shape, node.tokens)
        if isinstance(table, Problem):
            return node.seconds
        named, m = (node.leaf.schedule, node.leaf.virtual), self._microbatches(node)
        stages = self.bounds.stages(table, num_stages)
        return max(self.bounds.pipeline(stages, node.mesh, named, m) + node.once, node.seconds)

    def _microbatches(self, node: Node) -> int:
        return self.space.batch // node.mesh.dp // node.tokens.micro

    def _parts(self, node: Node) -> tuple[Table, np.ndarray, Probe]:
        """Of a node whose table and schedule are there."""
        leaf, m = node.leaf, self._microbatches(node)
        table = self.bounds.table(node.mesh, node.shape, node.tokens)
        probe = self.bounds.probe(node.mesh, leaf.schedule, leaf.virtual, m)
        assert isinstance(table, Table) and isinstance(probe, Probe)
        return table, self.bounds.stages(table, probe.chunks.shape[1]), probe

    def _states(self, node: Node) -> Iterator[Node]:
        """How states are cut."""
        (table, stages, probe), b, m = self._parts(node), self.bounds, node.mesh
        named, count = (node.leaf.schedule, node.leaf.virtual), self._microbatches(node)
        quick = b.quick(table, m, named, count)
        for dp_shard, zero, order in self.space.states(m, node.shape):
            cut = zero if dp_shard > 1 else 0
            shards = b.shards(m, node.shape, dp_shard)
            at = b.meetings(m, node.shape, dp_shard, cut)
            least = quick(at, cut)
            if least >= self._cut:
                continue
            once = b.update(stages, probe, cut, shards) + b.reduced(stages, probe, at, cut)
            if least + once >= self._cut:
                continue
            num_bytes = b.memory(stages, probe, cut, shards) + b.beside(table, cut, shards)
            if num_bytes > self.bounds.limit_bytes:
                self._refuse("memory", 1)
                continue
            seconds = least
            if cut > 1:
                seconds = b.pipeline(b.sharded(table, len(stages), at, cut), m, named, count)
            yield replace(
                node,
                level=5,
                leaf=replace(node.leaf, dp_shard=dp_shard, zero=zero, order=order),
                leaves=1,
                seconds=max(node.seconds, least + once, seconds + once),
                once=once,
                num_bytes=num_bytes,
            )

    def _played(self, node: Node) -> Iterator[Node]:
        """The schedule's clock at what the stages cost at least."""
        (table, stages, _), leaf, b = self._parts(node), node.leaf, self.bounds
        cut = leaf.zero if leaf.dp_shard > 1 else 0
        at = b.meetings(node.mesh, node.shape, leaf.dp_shard, cut)
        named, m = (leaf.schedule, leaf.virtual), self._microbatches(node)
        slower = b.sharded(table, len(stages), at, cut)
        seconds = b.played(slower, node.mesh, named, m) + node.once
        yield replace(node, level=6, seconds=max(seconds, node.seconds))

    def _laid(self, node: Node) -> Iterator[Node]:
        _, stages, probe = self._parts(node)
        named = (node.leaf.schedule, node.leaf.virtual)
        step = self.bounds.step(node.mesh, named, self._microbatches(node), len(stages))
        job = self.job.with_plan(self.plan(node))
        wrong = [p for p in job.problems() if p.severity == "error"]
        try:
            if wrong:
                raise PlanError("", wrong)
            seconds, num_bytes = laid_bound(request_of(job), self.machine, probe, step)
        except PlanError as refused:
            self._refuse(refused.problems[0], 1)
            return
        if num_bytes > self.bounds.limit_bytes:
            self._refuse("memory", 1)
            return
        yield replace(
            node,
            level=7,
            seconds=max(seconds, node.seconds),
            num_bytes=max(num_bytes, node.num_bytes),
        )

    def plan(self, node: Node) -> Plan:
        """The plan of a leaf."""
        plan = self.space.plan(node.mesh, node.shape, node.tokens, node.leaf)
        return replace(plan, offload=self.space.offload)

    def _simulate(self, node: Node) -> Prediction | None:
        plan = self.plan(node)
        prediction = self.predict(plan)
        if prediction.step_time_s is None or measures(prediction)[1] > self.bounds.limit_bytes:
            wrong = [p for p in prediction.problems if p.severity == "error"]
            self._refuse(wrong[0] if wrong else "memory", 1)
        elif not prediction.fits and measures(prediction)[1] <= prediction.limit_bytes:
            self._refuse("memory of the host or its disk", 1)
        else:
            return prediction
        return None

    def predict(self, plan: Plan) -> Prediction:
        """`simulate`, each plan once."""
        line = str(plan)
        if line not in self.predictions:
            self.predictions[line] = simulate(self.job.with_plan(plan), self.machine)
        return self.predictions[line]


def searcher(job: Job, fix: tuple[str, ...] = (), forbid: tuple[str, ...] = ()) -> Search:
    """A search under a user's words; precision and offload are theirs. Raises UsageError."""
    words = Words.of(fix, forbid)
    stated = {f: str(v) for f, v in words.fixed if f in ("dtype", "offload")}
    offload = OffloadPlan(stated.get("offload", "none"))
    return Search(Space(job, words, stated.get("dtype", default_dtype(job)), offload))


__all__ = ["ANY", "Found", "Goal", "Node", "Search", "measures", "searcher"]

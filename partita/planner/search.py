"""The search: nodes of the space in order of their bound, until no bound is below the best plan that
`simulate` has seen.

Two heaps hold the same nodes. One is ordered by the bound: when its first is not better than the best plan,
the best is proven. The other adds what a level usually still hides, so that good plans are simulated soon.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from partita.base.errors import PlanError, Problem
from partita.cost.machine import machine_of
from partita.planner.bound import Bounds, Probe, Table, laid_bound
from partita.planner.nodes import ANY, GOALS, HIDDEN, KEEP, Found, Goal, Key, Node, Queue
from partita.planner.space import Leaf, Shape, Space, Tokens, Words
from partita.simulate.predict import Prediction, request_of, simulate
from partita.spec.job import Job
from partita.spec.plan import Plan

USUAL = ("1f1b", "interleaved_1f1b", "zb_v")
USUAL_S, MOST_USUAL, TRIED = 2.0, 2, 60


class Search:
    """One search of a job's space; tables are shared by all goals."""

    def __init__(self, job: Job, words: Words, dtype: str) -> None:
        self.job = job
        self.space = Space(job, words, dtype)
        self.machine = machine_of(job.cluster)
        self.bounds = Bounds(self.space, self.machine)
        self.limit = job.cluster.memory_limit_bytes
        self._refused: Counter[str] = Counter()
        self.predictions: dict[str, Prediction] = {}

    def best(
        self, goal: Goal = ANY, top: int = 1, budget_s: float = 20.0, first: bool = False
    ) -> Found:
        """Searches for the best `top` plans within so many seconds; `first`: any that fits."""
        start, found = time.perf_counter(), Found()
        self._refused = found.rejected
        queue = Queue(goal, self._refused)
        best: list[tuple[Key, Prediction]] = []
        roots = list(self._meshes(found))
        for node in roots:
            queue.push(node)
        for plan in self._usual(roots, time.perf_counter() + min(budget_s / 4, USUAL_S)):
            prediction = self.predict(plan)
            if prediction.fits and goal.admits(*measures(prediction)):
                best.append((goal.key(*measures(prediction)), prediction))
                best.sort(key=lambda x: x[0])
                found.first_s = time.perf_counter() - start
        while queue and not (len(best) >= top and queue.least >= best[top - 1][0]):
            if time.perf_counter() - start > budget_s:
                found.complete = False
                break
            node = queue.pop()
            if node.level < len(HIDDEN) - 1:
                for child in self._expand(node):
                    queue.push(child)
                continue
            prediction = self._simulate(node)
            if prediction is None:
                continue
            found.simulated += 1
            known = any(p is prediction for _, p in best)
            if not known and goal.admits(*measures(prediction)):
                best.append((goal.key(*measures(prediction)), prediction))
                best.sort(key=lambda x: x[0])
                if best[0][1] is prediction:
                    found.first_s = time.perf_counter() - start
                del best[max(KEEP, top) :]
                if first:
                    break
        found.plans = [p for _, p in best]
        found.seconds = time.perf_counter() - start
        return found

    def _usual(self, roots: list[Node], until: float) -> list[Plan]:
        """The most promising of plans as they are usually made (a ring, one sample a microbatch, ZeRO over
        all replicas): they only give the search a best plan to begin with."""
        wide = max((n.mesh.world for n in roots), default=0)
        hopes: list[tuple[float, str, Node]] = []
        counted, self._refused = self._refused, Counter()
        for root in sorted(roots, key=lambda n: (n.mesh.cp, -n.mesh.tp, not n.mesh.sp, n.mesh.pp)):
            mesh = root.mesh
            if time.perf_counter() > until:
                break
            if mesh.world != wide or mesh.tp > self.job.cluster.devices_per_node:
                continue
            for mode in ("none", "full"):
                node = replace(root, level=2, shape=Shape(), tokens=Tokens(mode))
                if node.shape not in self.space.shapes(
                    mesh
                ) or node.tokens not in self.space.tokens(mesh):
                    continue
                for tabled in self._tabled(node):
                    for scheduled in self._schedules(tabled, USUAL):
                        states = self._states(scheduled)
                        good = (x for x in states if x.leaf.zero in (1, 3))
                        hopes += [(x.seconds, str(self.plan(x)), x) for x in good]
        laid = (x for _, _, hope in sorted(hopes)[:TRIED] for x in self._laid(hope))
        found = [self.plan(node) for node in islice(laid, MOST_USUAL)]
        self._refused = counted
        return found

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
            self._shapes,
            self._tokens,
            self._tabled,
            self._schedules,
            self._states,
            self._laid,
        )
        return steps[node.level](node)

    def _shapes(self, node: Node) -> Iterator[Node]:
        for shape in self.space.shapes(node.mesh):
            leaves = self.space.leaves(node.mesh, shape)
            seconds = self.bounds.coarse(node.mesh, shape)
            if isinstance(seconds, Problem):
                self._refuse(seconds, leaves)
            elif leaves:
                yield replace(
                    node, level=1, shape=shape, leaves=leaves, seconds=max(seconds, node.seconds)
                )

    def _tokens(self, node: Node) -> Iterator[Node]:
        """Children that are not looked at yet: a table is laid only for what comes to its turn."""
        below = self.space.below(node.mesh, node.shape)
        for tokens in self.space.tokens(node.mesh):
            yield replace(node, level=2, tokens=tokens, leaves=below)

    def _tabled(self, node: Node) -> Iterator[Node]:
        mesh, tokens, leaves = node.mesh, node.tokens, node.leaves
        table = self.bounds.table(mesh, node.shape, tokens)
        if isinstance(table, Problem):
            self._refuse(table, leaves)
            return
        if tokens.mode != "none" and self._same(node, tokens, table):
            self._refuse("recompute changes nothing", leaves)
            return
        each, num_bytes = self.bounds.even(mesh, node.shape, table)
        if num_bytes > self.limit:
            self._refuse("memory", leaves)
            return
        seconds = max(node.seconds, each * (self.space.batch // mesh.dp // tokens.micro))
        yield replace(node, level=3, seconds=seconds, num_bytes=num_bytes)

    def _same(self, node: Node, tokens: Tokens, table: Table) -> bool:
        """Whether the blocks cost what they do without recomputation, which is then among the choices."""
        if not self.space.words.admit("recompute", "none"):
            return False
        return self.bounds.table(node.mesh, node.shape, Tokens(micro=tokens.micro)) == table

    def _parts(self, node: Node, name: str, virtual: int) -> tuple[Table, Probe] | Problem:
        table = self.bounds.table(node.mesh, node.shape, node.tokens)
        m = self.space.batch // node.mesh.dp // node.tokens.micro
        probe = self.bounds.probe(node.mesh, name, virtual, m)
        if isinstance(probe, Problem):
            return probe
        assert isinstance(table, Table)
        return table, probe

    def _schedules(self, node: Node, only: tuple[str, ...] = ()) -> Iterator[Node]:
        leaves = len(self.space.states(node.mesh, node.shape))
        m = self.space.batch // node.mesh.dp // node.tokens.micro
        cut = self.bounds.shards(node.mesh, node.shape, node.mesh.dp)
        least = (3, cut) if node.mesh.dp > 1 else (0, 1)  # states as small as they may be
        for name, virtual in self.space.schedules(node.mesh):
            if only and name not in only:
                continue
            parts = self._parts(node, name, virtual)
            if isinstance(parts, Problem):
                self._refuse(parts, leaves)
                continue
            stages = self.bounds.stages(parts[0], _stages(parts[1]))
            if self.bounds.memory(stages, parts[1], *least) > self.limit:
                self._refuse("memory", leaves)
                continue
            seconds = self.bounds.pipeline(stages, parts[1], m)
            leaf = Leaf(name, virtual)
            yield replace(
                node, level=4, leaf=leaf, leaves=leaves, seconds=max(seconds, node.seconds)
            )

    def _states(self, node: Node) -> Iterator[Node]:
        parts = self._parts(node, node.leaf.schedule, node.leaf.virtual)
        assert not isinstance(parts, Problem)
        table, probe = parts
        stages = self.bounds.stages(table, _stages(probe))
        m = self.space.batch // node.mesh.dp // node.tokens.micro
        for dp_shard, zero in self.space.states(node.mesh, node.shape):
            cut = zero if dp_shard > 1 else 0
            shards = self.bounds.shards(node.mesh, node.shape, dp_shard)
            num_bytes = self.bounds.memory(stages, probe, cut, shards)
            num_bytes += self.bounds.lent(table, cut)
            if num_bytes > self.limit:
                self._refuse("memory", 1)
                continue
            slower = self.bounds.sharded(stages, table, node.mesh, dp_shard, cut)
            seconds = max(node.seconds, self.bounds.pipeline(slower, probe, m))
            seconds += self.bounds.update(stages, probe, cut, shards)
            leaf = replace(node.leaf, dp_shard=dp_shard, zero=zero)
            yield replace(
                node,
                level=5,
                leaf=leaf,
                leaves=1,
                seconds=seconds,
                num_bytes=max(num_bytes, node.num_bytes),
            )

    def _laid(self, node: Node) -> Iterator[Node]:
        parts = self._parts(node, node.leaf.schedule, node.leaf.virtual)
        assert not isinstance(parts, Problem)
        job = self.job.with_plan(self.plan(node))
        wrong = [p for p in job.problems() if p.severity == "error"]
        try:
            if wrong:
                raise PlanError("", wrong)
            seconds, num_bytes = laid_bound(request_of(job), self.machine, parts[1])
        except PlanError as refused:
            self._refuse(refused.problems[0], 1)
            return
        if num_bytes > self.limit:
            self._refuse("memory", 1)
            return
        yield replace(
            node,
            level=6,
            seconds=max(seconds, node.seconds),
            num_bytes=max(num_bytes, node.num_bytes),
        )

    def plan(self, node: Node) -> Plan:
        """The plan of a leaf."""
        return self.space.plan(node.mesh, node.shape, node.tokens, node.leaf)

    def _simulate(self, node: Node) -> Prediction | None:
        plan = self.plan(node)
        prediction = self.predict(plan)
        if prediction.step_time_s is None or measures(prediction)[1] > self.limit:
            wrong = [p for p in prediction.problems if p.severity == "error"]
            self._refuse(wrong[0] if wrong else "memory", 1)
            return None
        return prediction

    def predict(self, plan: Plan) -> Prediction:
        """`simulate`, each plan once."""
        line = str(plan)
        if line not in self.predictions:
            self.predictions[line] = simulate(self.job.with_plan(plan), self.machine)
        return self.predictions[line]


def _stages(probe: Probe) -> int:
    return 1 + max(s for held in probe.held for s in held)


def measures(p: Prediction) -> tuple[float, int, int]:
    """Step time, bytes of the fullest rank, ranks."""
    assert p.laid is not None and p.step_time_s is not None
    return p.step_time_s, max(x.peak_bytes for x in p.ledgers), p.laid.mesh.world_size


def default_dtype(job: Job) -> str:
    """bf16 where the device is faster in it, else fp32."""
    return "bf16" if job.cluster.peak("bf16") > job.cluster.peak("fp32") else "fp32"


def searcher(job: Job, fix: tuple[str, ...] = (), forbid: tuple[str, ...] = ()) -> Search:
    """A search under a user's words; precision is fixed to theirs. Raises UsageError."""
    words = Words.of(fix, forbid)
    stated = [v for f, v in words.fixed if f == "dtype"]
    return Search(job, words, str(stated[0]) if stated else default_dtype(job))


__all__ = ["ANY", "GOALS", "KEEP", "Found", "Goal", "Node", "Search", "measures", "searcher"]

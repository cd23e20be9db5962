"""The search: nodes of the space in order of their bound, until no bound is below the best plan that
`simulate` has seen.

Two heaps hold the same nodes. One is ordered by the bound: when its first is not better than the best plan,
the best is proven. The other adds what a level usually still hides, so that good plans are simulated soon.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from partita.base.errors import PlanError, Problem
from partita.cost.machine import machine_of
from partita.planner.bound import Bounds, Probe, Table, laid_bound
from partita.planner.space import Leaf, MeshChoice, Shape, Space, Tokens, Words
from partita.simulate.predict import Prediction, request_of, simulate
from partita.spec.job import Job
from partita.spec.plan import Plan

GOALS = ("time", "memory", "devices", "cost")
HIDDEN = (
    1.6,
    1.5,
    1.5,
    1.25,
    1.1,
    1.05,
    1.0,
)  # [empirical] step over bound by level, for the order only
INF = float("inf")
KEEP = 50  # plans that are remembered

Key = tuple[float, ...]


@dataclass(frozen=True)
class Goal:
    """What is best, and what must hold besides fitting: step_time_s, bytes, ranks below `under`."""

    name: str = "time"
    under: tuple[float, float, float] = (INF, INF, INF)

    def key(self, seconds: float, num_bytes: float, world: int) -> Key:
        """Smaller is better."""
        if self.name == "memory":
            return (num_bytes, seconds)
        return (world, seconds) if self.name == "devices" else (seconds, num_bytes)

    def admits(self, seconds: float, num_bytes: float, world: int) -> bool:
        """Whether a plan, or all below a bound, is under what is asked."""
        return all(a < b for a, b in zip((seconds, num_bytes, world), self.under, strict=True))


ANY = Goal()


@dataclass
class Found:
    """The answer: plans best first; how many leaves there are, were refused and why, were cut by their
    bound, were simulated; whether the best is proven."""

    plans: list[Prediction] = field(default_factory=list)
    considered: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    simulated: int = 0
    complete: bool = True
    seconds: float = 0.0
    first_s: float = 0.0  # when the best plan was found

    @property
    def bounded(self) -> int:
        """Leaves never simulated because their bound was not below the best."""
        return self.considered - self.rejected.total() - self.simulated


@dataclass(frozen=True, slots=True)
class Node:
    """A part of the space: its level's choices, bound and number of leaves."""

    level: int
    seconds: float
    num_bytes: float
    leaves: int
    mesh: MeshChoice
    shape: Shape = field(default_factory=Shape)
    tokens: Tokens = field(default_factory=Tokens)
    leaf: Leaf = field(default_factory=Leaf)


class Queue:
    """Nodes by their bound, and by what is hoped of them; taken in turns from one and the other."""

    def __init__(self, goal: Goal, refused: Counter[str]) -> None:
        self.goal, self.refused = goal, refused
        self._bounds: list[tuple[Key, int, Node]] = []
        self._hopes: list[tuple[Key, int, Node]] = []
        self._done: set[int] = set()
        self._ties, self._turn = count(), 0

    def push(self, node: Node) -> None:
        """Adds a node that may still hold what is asked."""
        s, num_bytes, world = node.seconds, node.num_bytes, node.mesh.world
        if not self.goal.admits(s, num_bytes, world):
            self.refused["not under what is asked"] += node.leaves
            return
        n, more = next(self._ties), HIDDEN[node.level]
        heapq.heappush(self._bounds, (self.goal.key(s, num_bytes, world), n, node))
        heapq.heappush(self._hopes, (self.goal.key(s * more, num_bytes * more, world), n, node))

    def _clean(self, heap: list[tuple[Key, int, Node]]) -> None:
        while heap and heap[0][1] in self._done:
            heapq.heappop(heap)

    def __bool__(self) -> bool:
        self._clean(self._bounds)
        return bool(self._bounds)

    @property
    def least(self) -> Key:
        """No plan that is left is better than this."""
        self._clean(self._bounds)
        return self._bounds[0][0]

    def pop(self) -> Node:
        """The next node to look into."""
        self._turn += 1
        heap = self._bounds if self._turn % 2 else self._hopes
        self._clean(heap)
        _, n, node = heapq.heappop(heap)
        self._done.add(n)
        return node


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
        for node in self._meshes(found):
            queue.push(node)
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
            if goal.admits(*measures(prediction)):
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

    def _schedules(self, node: Node) -> Iterator[Node]:
        leaves = len(self.space.states(node.mesh, node.shape))
        m = self.space.batch // node.mesh.dp // node.tokens.micro
        for name, virtual in self.space.schedules(node.mesh):
            parts = self._parts(node, name, virtual)
            if isinstance(parts, Problem):
                self._refuse(parts, leaves)
                continue
            stages = self.bounds.stages(parts[0], _stages(parts[1]))
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

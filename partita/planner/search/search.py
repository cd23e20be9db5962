"""The search: nodes of the space in order of their bound, until no bound is below the best plan that
`simulate` has seen.

Two heaps hold the same nodes. One is ordered by the bound: when its first is not better than the best plan,
the best is proven. The other adds what a level usually still hides, so that good plans are simulated soon.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from partita.base.errors import Problem, UsageError
from partita.cost.machine import machine_of
from partita.planner.search.levels import Levels
from partita.planner.search.nodes import (
    ANY,
    HIDDEN,
    INF,
    Found,
    Goal,
    Node,
    Queue,
    Step,
    beam,
    measures,
)
from partita.planner.search.workers import WORTH, Crew, Result, learn, processes
from partita.planner.space import Space, Words, default_dtype
from partita.simulate.predict import Prediction, simulate
from partita.spec.job import Job
from partita.spec.plan import OffloadPlan, Plan
from partita.spec.unequal import levelled

USUAL = ("1f1b", "interleaved_1f1b", "interleaved_zb", "zb_v", "dualpipev")
METHODS = ("ring", "all_gather", "halo")
FAR = 2.0  # times the least bound of all: plans beyond that are not looked for to begin with
FEW, FIRST = 3, 100  # meshes, and of the others parts, that are tried before the rest
ALONG = 16  # devices, of which plans of one rank and along each axis alone are tried
TRIAL_S = 0.2  # of an axis alone
RARELY = 50_000_000  # objects made between two looks for cycles
MANY = 200_000  # objects: a look at fewer takes less than to count what is frozen


@contextmanager
def rarely_collected() -> Iterator[None]:
    """What a search makes it keeps, in no cycles: looking for them again and again among all that is kept
    takes time and finds nothing. Where collection is off it stays off."""
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(before[0], RARELY))
    try:
        yield
    finally:
        many = gc.get_count()[0] > MANY
        if many and not gc.get_freeze_count():  # what was made is old at once, without a look at it
            gc.freeze()
            gc.unfreeze()
        gc.set_threshold(*before)


@dataclass(frozen=True)
class Clock:
    """When a search began, and when its time is over; all of its processes read one clock."""

    start: float
    end: float

    @property
    def now(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.start

    @property
    def middle(self) -> float:
        """When half of its time is over."""
        return (self.start + self.end) / 2

    @property
    def is_over(self) -> bool:
        """Whether it is."""
        return time.perf_counter() > self.end


class Search:
    """One search of a job's space; tables are shared by all goals. `before`: of another space of the job,
    whose blocks and schedules are not made again. `processes`: of how many to be, if not as many as may be
    where it is worth it."""

    processes: int | None = None

    def __init__(
        self, space: Space, levels: type[Levels] = Levels, before: Search | None = None
    ) -> None:
        self.space, self.job = space, space.job
        self.machine = machine_of(self.job.cluster)
        self.levels = levels(space, self.machine)
        self.bounds, self.floors = self.levels.bounds, self.levels.floors
        self.predictions: dict[str, Prediction] = {}
        if before is not None:
            self.bounds.remember(before.bounds)

    @rarely_collected()
    def best(
        self,
        goal: Goal = ANY,
        top: int = 1,
        budget_s: float = 20.0,
        first: bool = False,
        seen: Sequence[Prediction] = (),
        margin: float = 0.0,
    ) -> Found:
        """Searches for the best `top` plans within so many seconds; `first`: any that fits. `seen`: plans
        of another space, which they must beat, by such a `margin`."""
        start, found = time.perf_counter(), Found()
        self.levels.refused = found.rejected
        queue = Queue(goal, self.levels.refused, top, seen, margin)
        self.levels.cut_bytes = INF
        for node in self._meshes(found):
            queue.push(node)
        clock = Clock(start, start + budget_s)
        if self.levels.begins and not (first or seen):
            self._alone(queue, start + budget_s / 4)
        usual = self._usual(queue.roots) if self.levels.begins else []
        crew = None if first else self._crew(queue, usual)
        try:
            if crew is None:
                self._try_all(usual, queue, found, clock)
                self._prove(queue, found, clock, first)
            else:
                crew.begin(lambda crew: self._work(crew, queue, clock))
                self._prove_together(crew, queue, found, clock)
        finally:
            if crew is not None:
                crew.end()
        found.plans = [p for _, p in queue.best]
        found.seconds = clock.now
        return found

    def _prove(self, queue: Queue, found: Found, clock: Clock, first: bool = False) -> None:
        """Looks into nodes until none is left that may hold a better plan, or time is over."""
        while queue and not (first and queue.best):
            if clock.is_over:
                found.complete = False
                break
            told = self._next(queue)
            if told is None:
                continue
            found.simulated += 1
            if queue.keep(told, measures(told)):
                found.first_s = clock.now

    def _crew(self, queue: Queue, usual: Sequence[Node]) -> Crew | None:
        """Processes that share what is left with this one, where it is much and they may be."""
        nodes, workers = queue.roots, self.processes or processes()
        much = self.processes is not None or sum(n.leaves for n in nodes) >= WORTH
        return Crew(nodes, usual, workers, queue) if workers > 1 and much else None

    def _work(self, crew: Crew, queue: Queue, clock: Clock) -> Result:
        """What one of these processes does."""
        found, tables = Found(), len(self.bounds.tables)
        self.levels.refused = queue.refused = found.rejected
        self._try_all(crew.usual(), queue, found, clock)
        self._take_turns(crew, queue, found, clock)
        made = dict(list(self.bounds.tables.items())[tables:])
        plans = [(key, p.plan) for key, p in queue.best[: queue.top]]
        return Result(plans, found.rejected, found.simulated, found.complete, found.first_s, made)

    def _take_turns(self, crew: Crew, queue: Queue, found: Found, clock: Clock) -> None:
        """Proves part by part of what nobody has."""
        while found.complete and (nodes := crew.take()) is not None:
            queue.refill(nodes)
            self._prove(queue, found, clock)

    def _prove_together(self, crew: Crew, queue: Queue, found: Found, clock: Clock) -> None:
        """Takes its own part, then what the others have to say; what one had that died it searches again."""
        self._try_all(crew.usual(), queue, found, clock)
        self._take_turns(crew, queue, found, clock)
        told = crew.results(clock.end)
        self._take_turns(crew, queue, found, clock)
        for result in told:
            for key, line in result.plans:
                if not queue.is_beaten(key) and queue.keep(
                    p := self.predict(Plan.parse(line)), measures(p)
                ):
                    found.first_s = result.first_s
            found.rejected.update(result.refused)
            found.simulated += result.simulated
            found.complete = found.complete and result.complete
            learn(self.bounds, result.tables)
        del queue.best[queue.top :]  # the same whoever saw them

    def _usual(self, roots: list[Node]) -> list[Node]:
        """Meshes as they are usually made (all devices, tp within a node and with sp, four parts of a
        sequence at most), the most promising first."""
        wide = max((n.mesh.world for n in roots), default=0)
        most = self.job.cluster.devices_per_node
        return [
            n
            for n in sorted(roots, key=lambda n: n.seconds)
            if (m := n.mesh).world == wide and m.inner <= most and m.cp <= 4
            if m.sp or m.tp == 1 or self.job.model.image is not None
        ]

    def _try_all(self, usual: Sequence[Node], queue: Queue, found: Found, clock: Clock) -> None:
        """Looks for the most promising of the plans of some meshes, and keeps them: they give the search a
        best plan to begin with. First of few meshes; then of what follows from the others, in order of its
        bound that knows of memory. Those behind must beat what the first lead to."""
        counted, self.levels.refused, self.floors.begins = self.levels.refused, Counter(), True
        cut = FAR * min((n.seconds for n in queue.roots), default=INF)
        for roots in (usual[:FEW], usual[FEW:]):
            self.levels.cut = cut = min(cut, queue.cut)
            nodes = list[Node]()
            for root in roots:
                if time.perf_counter() < clock.middle:
                    nodes += self.levels.folds(root)
            nodes.sort(key=lambda n: n.seconds)
            for some in (nodes[:FIRST], nodes[FIRST:]):
                cut = self._try(some, queue, found, min(cut, queue.cut), clock)
        self.levels.refused, self.floors.begins = counted, False

    def _try(
        self, nodes: Sequence[Node], queue: Queue, found: Found, cut: float, clock: Clock
    ) -> float:
        """A beam through some nodes below a `cut`. Seconds of the best that it leads to, at least; or the
        cut."""
        self.levels.cut = cut
        some = (n for n in nodes if n.seconds < cut)
        ends = beam(some, self._steps, clock.middle)[: queue.top]
        for node in ends:
            prediction = self.predict(self.plan(node))
            if prediction.fits and queue.keep(prediction, measures(prediction)):
                found.first_s = clock.now
        return min([cut, *(n.seconds for n in ends)])

    def _next(self, queue: Queue) -> Prediction | None:
        """Looks into the next node of a queue; what `simulate` says where it is one plan that can be."""
        node = queue.pop()
        self.levels.cut, self.levels.cut_bytes = queue.cut_of(node.mesh.world), queue.cut_bytes
        if node.level == len(HIDDEN) - 1:
            return self._simulate(node)
        for child in self.levels.expand(node):
            queue.push(child)
        return None

    def _alone(self, queue: Queue, until: float) -> None:
        """Of one rank and, where devices are few, of all of them along one axis: the best plan, which anybody
        would try, and which no answer may be worse than, however soon a search ends."""
        wide = max((n.mesh.world for n in queue.roots), default=0)
        counted = self.levels.refused
        for root in sorted(queue.roots, key=lambda n: n.mesh.world):
            m = root.mesh
            axis = m.world in (m.pp, m.dp, m.cp, m.tp)
            if wide > ALONG or m.world not in (1, wide) or not axis:
                continue
            trial = Queue(queue.goal, Counter(), seen=[p for _, p in queue.best])
            self.levels.refused = trial.refused
            trial.push(root)
            end = until if m.world == 1 else min(until, time.perf_counter() + TRIAL_S)
            while trial and time.perf_counter() < end:
                told = self._next(trial)
                if told is not None and trial.keep(told, measures(told)):
                    queue.keep(told, measures(told))
        self.levels.refused = counted

    @property
    def _steps(self) -> tuple[Step, ...]:
        """Of the beam."""
        return (
            (
                lambda n: (x for x in self.levels.methods(n) if x.shape.method in METHODS),
                9999,
                9999,
            ),
            (lambda n: self.levels.rough(n, USUAL), 999, 1100),
            (self._fitting, 999, 300),
            (self.levels.played, 60, 9999),
            (self.levels.laid, 9, 2),
        )

    def _fitting(self, node: Node) -> Iterator[Node]:
        """The ways to cut states of a schedule with the most promising size of a microbatch that memory
        allows."""
        rest: list[Node] = [node]
        while rest:
            children = list(self.levels.scheduled(rest[0]))
            found = [y for x in children if x.level == 4 for y in self.levels.states(x)]
            yield from found
            rest = [] if found else [x for x in children if x.level < 4]

    def roots(self) -> Iterator[Node]:
        """The meshes of the space, with their bounds."""
        return self._meshes(Found())

    def _meshes(self, found: Found) -> Iterator[Node]:
        for mesh in self.space.meshes():
            leaves = self.space.leaves(mesh)
            found.considered += leaves
            seconds = self.bounds.coarse(mesh) if leaves else INF
            if isinstance(seconds, Problem):
                self.levels.refuse(seconds, leaves)
            elif leaves:
                yield Node(0, seconds, 0.0, leaves, mesh)

    def plan(self, node: Node) -> Plan:
        """The plan of a leaf."""
        return self.levels.plan(node)

    def _simulate(self, node: Node) -> Prediction | None:
        prediction = self.predict(self.plan(node))
        if prediction.step_time_s is None or measures(prediction)[1] > self.bounds.limit_bytes:
            wrong = [p for p in prediction.problems if p.severity == "error"]
            self.levels.refuse(wrong[0] if wrong else "memory", 1)
        elif not prediction.fits and measures(prediction)[1] <= prediction.limit_bytes:
            self.levels.refuse("memory of the host or its disk", 1)
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
    """A search under a user's words; precision and offload are theirs. Of devices that differ it takes each
    for the weakest. Raises UsageError."""
    job = replace(job, cluster=levelled(job.cluster))
    words = Words.of(fix, forbid)
    offload = OffloadPlan(words.only("offload") or "none")
    words.only("order")  # raises, where there are two
    return Search(Space(job, words, _dtype(job, words), offload))


def _dtype(job: Job, words: Words) -> str:
    """The precision that is fixed, or the default, or what is not forbidden. Raises UsageError."""
    if stated := words.only("dtype"):
        return stated
    order = (default_dtype(job), "bf16", "fp32", "fp16", "fp8", "fp64")
    found = next((name for name in order if words.admit("dtype", name)), None)
    if found is None:
        raise UsageError("--forbid leaves no precision", key="forbid")
    return found


__all__ = ["ANY", "Found", "Goal", "Node", "Search", "measures", "searcher"]

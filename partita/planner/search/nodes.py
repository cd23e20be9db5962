"""What the search works with: goals, nodes with their bounds, two heaps of them, and its answer."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, Protocol

from partita.planner.space import Leaf, MeshChoice, Shape, Tokens
from partita.simulate.predict import Prediction, measures

GOALS = ("time", "memory", "devices", "cost")
# [empirical] step over bound by level, for the order only
HIDDEN = (1.6, 1.5, 1.45, 1.2, 1.1, 1.01, 1.0, 1.0)
INF = float("inf")
KEEP = 50  # plans that are remembered
ALIKE, EQUAL = "%.12e", 1e-12  # digits of a key; by how much those of equal keys differ at most

Key = tuple[float, ...]


class Shared(Protocol):
    """What the searches of several processes know of each other's plans (workers.py)."""

    @property
    def limit(self) -> Key | None:
        """The key of the last of the best plans, where so many are known."""

    def publish(self, key: Key, line: str) -> None:
        """Tells the others of a plan."""


@dataclass(frozen=True)
class Goal:
    """What is best, and what must hold besides fitting: step_time_s, bytes, ranks, money of a step below
    `under`. `price`: money of a device and a second."""

    name: str = "time"
    under: tuple[float, float, float, float] = (INF, INF, INF, INF)
    price: float = 0.0

    def key(self, seconds: float, num_bytes: float, world: int) -> Key:
        """Smaller is better."""
        if self.name == "memory":
            return (num_bytes, seconds)
        if self.name == "cost":
            return (world * seconds * self.price, seconds)
        return (world, seconds) if self.name == "devices" else (seconds, num_bytes)

    def admits(self, seconds: float, num_bytes: float, world: int) -> bool:
        """Whether a plan, or all below a bound, is under what is asked."""
        measured = (seconds, num_bytes, world, world * seconds * self.price)
        return all(a < b for a, b in zip(measured, self.under, strict=True))


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
    turned: int = 0  # simulated beside these: best plans with axes in another order
    split: int = 0  # the same with another split of the layers
    made: int = 0  # the same with a schedule made for them
    unproven: tuple[str, ...] = ()  # choices whose search ended by its budget, all else proven
    not_searched: tuple[str, ...] = ()  # choices, of plans that the proof says nothing of
    by_rates: int = 0  # simulated on devices that differ, of which the proof takes the weakest
    near: int = 0  # plans close to the best, where that is not proven
    more: bool = False  # a front may have more plans
    least_s: float = 0.0  # what no split or schedule undercuts, where not all were searched

    @property
    def bounded(self) -> int:
        """Leaves never simulated because their bound was not below the best."""
        return self.considered - self.rejected.total() - self.simulated

    @property
    def proven(self) -> bool:
        """Whether the best is, over all but the choices that are said to be unproven."""
        return self.complete or bool(self.unproven)

    def join(self, there: Found) -> None:
        """Takes in what a search of another space found, whose plans had these to beat."""
        self.considered += there.considered
        self.rejected.update(there.rejected)
        self.simulated += there.simulated
        self.seconds += there.seconds
        self.complete = self.complete and there.complete
        if there.plans[:1] != self.plans[:1]:
            self.first_s = self.seconds - there.seconds + there.first_s
        self.plans = there.plans

    def join_other(self, choice: str, there: Found) -> None:
        """The same of a search over one more choice: where it ended by its budget, what was proven before
        stays so but for that."""
        if self.proven and not there.complete:
            self.unproven = tuple(dict.fromkeys((*self.unproven, choice)))
        self.join(there)


class Node(NamedTuple):
    """A part of the space: its level's choices, bound and number of leaves. A search makes hundreds of
    thousands."""

    level: int
    seconds: float
    num_bytes: float
    leaves: int
    mesh: MeshChoice
    shape: Shape = Shape()
    tokens: Tokens = Tokens()
    leaf: Leaf = Leaf()
    once: float = 0.0  # of the seconds, those that follow the schedule
    paired: bool = False  # its schedules run a backward beside a forward
    rest: tuple[tuple[float, float, int], ...] = ()  # other microbatches: seconds, once, samples


# what follows from a node; how many of the nodes are tried, and what is enough of what they give
Step = tuple[Callable[[Node], Iterable[Node]], int, int]


def beam(nodes: Iterable[Node], steps: Iterable[Step], until: float) -> list[Node]:
    """The nodes that some steps lead to, best first; at each only the most promising are looked into."""
    now = list(nodes)
    for step, tried, enough in steps:
        found: list[Node] = []
        for node in sorted(now, key=lambda n: n.seconds)[:tried]:
            if len(found) < enough and time.perf_counter() < until:
                found += step(node)
        now = found
    return sorted(now, key=lambda n: n.seconds)


class Queue:
    """Nodes by their bound, and by what is hoped of them (until a plan is seen: the deepest), taken in turns
    from one and the other; and the best plans seen: a node that is not better than the last of the `top` of
    them is left out. `seen`: plans known before, which others must beat by a `margin`. `shared`: the plans of
    other processes count too. Of keys ALIKE in so many digits the rest is of rounding."""

    shared: Shared | None = None

    def __init__(
        self,
        goal: Goal,
        refused: Counter[str],
        top: int = 1,
        seen: Sequence[Prediction] = (),
        margin: float = 0.0,
    ) -> None:
        self.goal, self.refused, self.top = goal, refused, top
        self.best: list[tuple[Key, Prediction]] = []
        self._bounds: list[tuple[Key, int, Node]] = []
        self._hopes: list[tuple[Key, int, Node]] = []
        self._depths: list[tuple[Key, int, Node]] = []
        self._done: set[int] = set()
        self._ties, self._turn = count(), 0
        self._longer = 1.0
        for plan in seen:
            self.keep(plan, measures(plan))
        self._longer = 1.0 + margin

    def keep(self, plan: Prediction, measured: tuple[float, float, int]) -> bool:
        """Adds a plan that was simulated, once, whichever search came to it; whether it is the best."""
        if not self.goal.admits(*measured) or any(p.plan == plan.plan for _, p in self.best):
            return False
        self.best.append((self._key(*measured), plan))
        self.best.sort(key=lambda x: (x[0], len(x[1].plan), x[1].plan))  # of equals the simplest
        del self.best[max(KEEP, self.top) :]
        if self.shared is not None:
            self.shared.publish(self._key(*measured), plan.plan)
        return self.best[0][1] is plan

    def _key(self, seconds: float, num_bytes: float, world: int) -> Key:
        found = self.goal.key(seconds * self._longer, num_bytes * self._longer, world)
        return float(ALIKE % found[0]), float(ALIKE % found[1])

    @property
    def limit(self) -> Key | None:
        """The key of the last of the `top` best plans, where so many are known."""
        if self.shared is not None:
            return self.shared.limit
        return self.best[self.top - 1][0] if len(self.best) >= self.top else None

    def is_beaten(self, key: Key) -> bool:
        """Whether it is worse than the best: of equals the simplest is to be found."""
        limit = self.limit
        return limit is not None and key > limit

    @property
    def cut(self) -> float:
        """Seconds of a step from which on no plan is better, where time is the goal."""
        limit = self.limit if self.goal.name == "time" else None
        return INF if limit is None else limit[0] * (1 + EQUAL) / self._longer

    def cut_of(self, world: int) -> float:
        """Seconds of a step from which on no plan of so many ranks is better, or what is asked for."""
        goal, limit = self.goal, self.limit
        most = goal.under[0]
        if goal.price:
            most = min(most, goal.under[3] / (world * goal.price) * (1 + EQUAL))
        if limit is None or goal.name == "memory" or (goal.name == "devices" and world < limit[0]):
            return most
        seconds = limit[0] if goal.name == "time" else limit[1]
        if goal.name == "cost":
            seconds = limit[0] / (world * goal.price)
        return min(most, seconds * (1 + EQUAL) / self._longer)

    @property
    def cut_bytes(self) -> float:
        """Bytes beyond which no plan is better, where memory is the goal, or is what is asked for."""
        most, limit = self.goal.under[1], self.limit if self.goal.name == "memory" else None
        return most if limit is None else min(most, limit[0] * (1 + EQUAL) / self._longer)

    def push(self, node: Node) -> None:
        """Adds a node that may still hold what is asked."""
        s, num_bytes, world = node.seconds, node.num_bytes, node.mesh.world
        if not self.goal.admits(s, num_bytes, world):
            self.refused["not under what is asked"] += node.leaves
            return
        key = self._key(s, num_bytes, world)
        if self.is_beaten(key):
            return
        n, more = next(self._ties), HIDDEN[node.level]
        heapq.heappush(self._bounds, (key, n, node))
        if not self.best:
            heapq.heappush(self._depths, ((-node.level, *key), n, node))
        heapq.heappush(self._hopes, (self._key(s * more, num_bytes * more, world), n, node))

    @property
    def roots(self) -> list[Node]:
        """The nodes that are left."""
        left = self._bounds
        return [node for key, n, node in left if n not in self._done and not self.is_beaten(key)]

    def refill(self, nodes: Iterable[Node]) -> None:
        """Has these nodes instead."""
        for heap in (self._bounds, self._hopes, self._depths):
            heap.clear()
        for node in nodes:
            self.push(node)

    def _clean(self, heap: list[tuple[Key, int, Node]]) -> None:
        while heap and heap[0][1] in self._done:
            heapq.heappop(heap)

    def __bool__(self) -> bool:
        """Whether a node is left that may hold a better plan."""
        self._clean(self._bounds)
        return bool(self._bounds) and not self.is_beaten(self._bounds[0][0])

    def pop(self) -> Node:
        """The next node to look into."""
        self._turn += 1
        heap = self._bounds if self._turn % 2 else self._hopes
        heap = heap if self.best or self._turn % 2 else self._depths
        self._clean(heap)
        _, n, node = heapq.heappop(heap)
        self._done.add(n)
        return node

"""By how much a plan could still be beaten that no search looked at: other splits of layers, and schedules
made for a plan, of all plans on more devices than those are searched on.

The floors of plans (floor.py) are of the mean rank: no split of the layers and no order of stages undercuts
them. The least floor is found best first, part by part of the space.
"""

from __future__ import annotations

import heapq
import time
from itertools import count

from partita.base.errors import Problem
from partita.planner.search.nodes import INF, Found, Node
from partita.planner.search.search import Search
from partita.planner.search.uneven import UnevenSpace

MOST_S = 2.0


def least_seconds(search: Search, found: Found, budget_s: float) -> float:
    """Seconds of a step that no plan with a pipeline undercuts in the search's order of axes, whatever the
    split and the order of stages: the best plan's where nothing is below it; 0 where time is short."""
    end, ties = time.perf_counter() + min(budget_s, MOST_S), count()
    best = found.plans[0].step_time_s
    assert best is not None
    every = Search(UnevenSpace(search.space, search.space.turned))
    every.bounds.share(search.bounds)
    levels, floors, bounds = every.levels, every.floors, every.bounds
    levels.cut = best
    heap: list[tuple[float, int, Node]] = []

    def push(node: Node) -> None:
        if node.seconds < best:
            heapq.heappush(heap, (node.seconds, next(ties), node))

    for root in every.roots():
        push(root)
    least = best
    while heap:
        seconds, _, node = heapq.heappop(heap)
        if node.level == 3:  # told by its own table
            least = seconds
            break
        if time.perf_counter() > end:
            least = 0.0
            break
        if node.level < 2:
            for child in (levels.folds, levels.methods)[node.level](node):
                push(child)
            continue
        mode = (node.tokens.mode, node.tokens.every)
        table = bounds.endless(node.mesh, node.shape, mode)
        if not isinstance(table, Problem):
            told = floors(node.mesh, node.shape, table, paired=node.paired).seconds.min(initial=INF)
            push(node._replace(level=3, seconds=max(seconds, float(told))))
    return least

"""The optimum of a small flow, proven by constraint programming (OR-tools' CP-SAT).

    minimise T
    start[x, k] + seconds[x] <= start[x, k+1]                  a stream's items in order
    start[n, k] + seconds[n] + lag <= start[x, k]              what x needs
    no two items of a rank at once
    start[n, k] + seconds[n] <= left[n, k]                     a message leaves when it is made, or later,
    left[n, k] + lag <= start[x, k]                            no two at once on the link out of a rank, which
                                                               keeps the order in which they were made
    sum of held over microbatches between start of F and end of W <= limit        on every rank, always
    release of its rank <= start of every item, and its end + tail of its rank <= T

Times are whole numbers of a unit that all costs are multiples of; where there is none below a
millionth of the longest, nothing is proven. One worker, and attempts with and without the linear
relaxation that share a budget in CP-SAT's deterministic time: the same answer everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations, pairwise, product
from typing import Any

from partita.schedule.synth.flow import Flow, Orders, starts_of

MOST_ITEMS = 240  # beyond, CP-SAT proves nothing in reasonable time
_FINEST = 1_000_000
# CP-SAT's linearization level, and the part of the budget spent when an attempt ends: most proofs are soon
# there without the linear relaxation, some only with it
_ATTEMPTS = ((1, 0.05), (0, 0.5), (1, 1.0))


@dataclass(frozen=True, slots=True)
class Proof:
    """The best orders that CP-SAT found, their makespan, what none can undercut, and the
    deterministic seconds it took."""

    makespan: float
    orders: Orders
    bound: float
    spent: float

    @property
    def proven(self) -> bool:
        """Whether nothing is faster."""
        return self.bound >= self.makespan * (1 - 1e-9)


def unit_of(numbers: Sequence[float]) -> Fraction | None:
    """The largest unit that all numbers are whole multiples of; None where it would be too fine."""
    exact = [Fraction(x).limit_denominator(10_000) for x in numbers if x]
    if any(
        abs(float(e) - x) > 1e-9 * x for e, x in zip(exact, (x for x in numbers if x), strict=True)
    ):
        return None
    if not exact:
        return Fraction(1)
    bottom = math.lcm(*(e.denominator for e in exact))
    unit = Fraction(math.gcd(*(int(e * bottom) for e in exact)), bottom)
    return unit if max(exact) / unit <= _FINEST else None


def optimum(flow: Flow, orders: Orders, bound: float, budget: float) -> Proof | None:
    """The best of the flow, beginning from `orders`; None where the instance is too large or its numbers
    have no common unit. `budget` is in CP-SAT's deterministic seconds."""
    size = sum(flow.count)
    lags = [lag for needs in flow.needs for _, lag in needs]
    times = [*flow.seconds, *lags, *flow.release, *flow.tail, flow.wire]
    unit = unit_of(times)
    room = unit_of([-held for held in flow.held if held < 0])
    if size > MOST_ITEMS or unit is None or room is None:
        return None
    made = Proof(math.inf, orders, bound, 0.0)
    for level, part in _ATTEMPTS:
        left = budget * part - made.spent
        if left > 0 and not made.proven:
            again = _Model(flow, made.orders, unit, room, made.bound).solved(left, level)
            made = replace(
                again,
                bound=min(max(again.bound, made.bound), again.makespan),
                spent=made.spent + again.spent,
            )
    return made


class _Model:
    """The program of the module's docstring."""

    def __init__(
        self, flow: Flow, orders: Orders, unit: Fraction, room: Fraction, bound: float
    ) -> None:
        from ortools.sat.python import cp_model  # slow to import, and only proofs need it

        self.flow, self.unit, self.cp = flow, unit, cp_model
        self.model = cp_model.CpModel()
        self.orders = orders
        found = starts_of(flow, orders)
        assert found is not None
        self.known, self.known_starts = found
        horizon = self._whole(self.known)
        least = math.ceil(bound / float(unit) - 1e-6)
        self.end = self.model.new_int_var(min(least, horizon), horizon, "T")
        self.starts = [
            [self.model.new_int_var(0, horizon, f"{x}.{k}") for k in range(n)]
            for x, n in enumerate(flow.count)
        ]
        self._lefts: dict[int, list[Any]] = {}
        if flow.wire:
            self._leave(horizon)
        self._precede()
        self._one_at_a_time()
        self._hold(room, horizon)
        self._hint()
        self.model.minimize(self.end)

    def _whole(self, seconds: float) -> int:
        return round(seconds / float(self.unit))

    def _precede(self) -> None:
        flow, add = self.flow, self.model.add
        for x, row in enumerate(self.starts):
            took, rank = self._whole(flow.seconds[x]), flow.rank[x]
            after = took + self._whole(flow.tail[rank])
            add(row[0] >= self._whole(flow.release[rank]))
            add(row[-1] + after <= self.end)
            for k, start in enumerate(row):
                if k + 1 < len(row):
                    add(start + took <= row[k + 1])
                for need, lag in flow.needs[x]:
                    if need in self._lefts and flow.rank[need] != rank:
                        add(self._lefts[need][k] + self._whole(lag) <= start)
                        continue
                    there = self._whole(flow.seconds[need]) + self._whole(lag)
                    add(self.starts[need][k] + there <= start)

    def _leave(self, horizon: int) -> None:
        """When each message leaves its rank, one at a time."""
        flow, wire = self.flow, self._whole(self.flow.wire)
        for rank in range(flow.num_ranks):
            taken: list[Any] = []
            for x in flow.streams_of(rank):
                if flow.far[x] is None:
                    continue
                took = self._whole(flow.seconds[x])
                row = [self.model.new_int_var(0, horizon, "") for _ in self.starts[x]]
                for start, left in zip(self.starts[x], row, strict=True):
                    self.model.add(start + took <= left)
                for left, after in pairwise(row):
                    self.model.add(left + wire <= after)
                taken += [self.model.new_fixed_size_interval_var(left, wire, "") for left in row]
                self._lefts[x] = row
            self.model.add_no_overlap(taken)
            self._in_order([x for x in flow.streams_of(rank) if x in self._lefts], wire)

    def _in_order(self, streams: list[int], wire: int) -> None:
        """Of any two messages out of a rank that made first leaves first."""
        add, starts, lefts = self.model.add, self.starts, self._lefts
        for x, y in combinations(streams, 2):
            pairs = product(range(len(starts[x])), range(len(starts[y])))
            for i, k in pairs:
                first = self.model.new_bool_var("")
                for a, b, when in (((x, i), (y, k), first), ((y, k), (x, i), ~first)):
                    (at, n), (to, o) = a, b
                    took = self._whole(self.flow.seconds[at])
                    add(starts[at][n] + took <= starts[to][o]).only_enforce_if(when)
                    add(lefts[at][n] + wire <= lefts[to][o]).only_enforce_if(when)

    def _one_at_a_time(self) -> None:
        for rank in range(self.flow.num_ranks):
            items: list[Any] = []
            for x in self.flow.streams_of(rank):
                took = self._whole(self.flow.seconds[x])
                items += [
                    self.model.new_fixed_size_interval_var(s, took, "") for s in self.starts[x]
                ]
            self.model.add_no_overlap(items)

    def _hold(self, room: Fraction, horizon: int) -> None:
        flow = self.flow
        takers = {flow.names[x][:2]: x for x, held in enumerate(flow.held) if held > 0}
        givers = [(x, held) for x, held in enumerate(flow.held) if held < 0]
        for rank in range(flow.num_ranks):
            if not math.isfinite(flow.limits[rank]):
                continue
            spans: list[Any] = []
            sizes: list[int] = []
            for y, held in givers:
                if flow.rank[y] != rank:
                    continue
                x = takers[flow.names[y][:2]]
                took = self._whole(flow.seconds[y])
                for start, last in zip(self.starts[x], self.starts[y], strict=True):
                    life = self.model.new_int_var(0, horizon, "")
                    spans.append(self.model.new_interval_var(start, life, last + took, ""))
                    sizes.append(round(-held / float(room)))
            limit = math.floor(flow.limits[rank] / float(room) + 1e-6)
            self.model.add_cumulative(spans, sizes, limit)

    def _hint(self) -> None:
        made = [0] * len(self.flow.names)
        for order, starts in zip(self.orders, self.known_starts, strict=True):
            for x, start in zip(order, starts, strict=True):
                self.model.add_hint(self.starts[x][made[x]], self._whole(start))
                made[x] += 1
        self.model.add_hint(self.end, self._whole(self.known))

    def solved(self, budget: float, level: int) -> Proof:
        """Runs CP-SAT; what it found, or the orders given where it found nothing better."""
        solver = self.cp.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.max_deterministic_time = budget
        solver.parameters.random_seed = 0
        solver.parameters.linearization_level = level
        status = solver.solve(self.model)
        bound = math.ceil(solver.best_objective_bound - 1e-6) * float(self.unit)
        spent = solver.response_proto.deterministic_time
        if status not in (self.cp.OPTIMAL, self.cp.FEASIBLE):
            return Proof(self.known, self.orders, bound, spent)
        flow, orders = self.flow, []
        for rank in range(flow.num_ranks):
            items = [
                (solver.value(start), flow.seconds[x], k, x)
                for x in flow.streams_of(rank)
                for k, start in enumerate(self.starts[x])
            ]
            orders.append([x for _, _, _, x in sorted(items)])
        found = starts_of(flow, orders)
        if found is None or found[0] > self.known:
            return Proof(self.known, self.orders, min(bound, self.known), spent)
        return Proof(found[0], orders, min(bound, found[0]), spent)

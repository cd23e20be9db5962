"""What cutting a sequence costs, known of one way to lay experts, told of all others before they are laid.

What the lanes of cp move, and the compute beside which they may, is attention's, wherever experts lie. With
the compute and the other lanes of the whole sequence's block, whose experts lie so, they make a block of the
cut one (simulate/links.py), which takes its devices no fewer seconds: its kernels are as many, and smaller.

Of what is told only sums, of a forward and a backward, are bounds of the laid table's: a weight half alone
was up to 1.9 % above its own, and what floors make of such pieces up to 3.6 % above what they make of it.
Against `simulate` both are held by tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from partita.base.errors import Problem
from partita.planner.bounds.table import Cost, Table
from partita.planner.space import MeshChoice, Shape, Tokens
from partita.simulate.links import Lane, path_seconds, seen_seconds

CUT = ("cp", "ulysses")  # lanes of a cut sequence
Kept = tuple[tuple[Any, ...], ...]


def kept(lanes: Mapping[str, Mapping[str, Lane]]) -> Kept:
    """Lanes by phase and name as a block's cost keeps them: phase, name, room, by axis, by link."""
    return tuple(
        (phase, name, x.room, tuple(x.by_axis.items()), tuple(x.by_link.items()))
        for phase, own in lanes.items()
        for name, x in own.items()
    )


class Rings:
    """Endless tables of cut sequences, the first of those that are alike but for where experts lie; and
    what was told from them."""

    def __init__(self, tables: Mapping[object, Table | Problem]) -> None:
        self._tables = tables  # of a space, by what each depends on
        self._first: dict[object, Table] = {}
        self._told: dict[tuple[int, int, int], tuple[Table, Table, Table | None]] = {}

    def learn(self, mesh: MeshChoice, shape: Shape, tokens: Tokens, table: Table) -> None:
        """Takes in a table that was laid."""
        self._first.setdefault(_alike(mesh, shape, tokens), table)

    def told(self, mesh: MeshChoice, shape: Shape, tokens: Tokens) -> Table | None:
        """The endless table of a cut sequence, at least, in the seconds of all its parts; None where it was
        laid itself, or none is known that is alike."""
        key = mesh.tp, mesh.sp, mesh.split, mesh.cp, shape, tokens
        first = self._first.get(_alike(mesh, shape, tokens))
        if first is None or mesh.cp == 1 or key in self._tables:
            return None
        alone = Shape(ep=shape.ep, etp=shape.etp)
        whole = self._tables.get((mesh.tp, mesh.sp, mesh.split, 1, alone, tokens))
        if not isinstance(whole, Table):
            return None
        found = id(whole), id(first), mesh.cp  # which are kept
        if found not in self._told:
            alike = len(first.kinds) == len(whole.kinds) and np.array_equal(first.at, whole.at)
            made = _told(whole, first.kinds, mesh.cp) if alike else None
            self._told[found] = whole, first, made
        return self._told[found][2]


def _alike(mesh: MeshChoice, shape: Shape, tokens: Tokens) -> object:
    """What lanes of cp depend on."""
    return mesh.tp, mesh.sp, mesh.split, mesh.cp, shape.method, shape.ulysses, tokens


def _told(whole: Table, others: Sequence[Cost], parts: int) -> Table:
    kinds = [_longer(a, b.lanes, parts) for a, b in zip(whole.kinds, others, strict=True)]
    return Table(tuple(kinds), whole.weights, whole.at)


def _longer(cost: Cost, others: Kept, parts: int) -> Cost:
    """A block of a whole sequence with the lanes of cp of another, which has so many parts of it."""
    lanes: dict[str, dict[str, Lane]] = {"F": {}, "B": {}}
    rows = [(row, 1) for row in cost.lanes if row[1] not in CUT]
    mine = [(row, parts) for row in others if row[1] in CUT]
    if not mine:
        return cost
    for (phase, name, room, by_axis, by_link), n in rows + mine:
        axes, links = ({key: n * s for key, s in by} for by in (by_axis, by_link))
        lanes[phase][name] = Lane(n * room, axes, links)
    (forward, path_f, travel_f), (backward, path_b, travel_b) = (
        _took(lanes[phase], cost.rooms[i]) for phase, i in (("F", 0), ("B", 2))
    )
    lines = list(cost.lines)
    lines[5] += path_f - cost.rooms[1]
    for i in range(7, 10):
        lines[i] += path_b - cost.rooms[3]
    return replace(
        cost,
        forward=max(forward, cost.forward),
        weight=max(backward - cost.input, cost.weight),
        travel=max(travel_f + travel_b, cost.travel),
        rooms=(cost.rooms[0], path_f, cost.rooms[2], path_b),
        lines=tuple(lines),
    )


def _took(lanes: Mapping[str, Lane], compute_s: float) -> tuple[float, float, float]:
    """Seconds of a phase; of its path; and of them those that rows travel."""
    seen = seen_seconds(lanes, compute_s)
    travel = sum(
        s * lanes[n].by_axis["ep"] / lanes[n].seconds
        for n, s in seen.items()
        if "ep" in lanes[n].by_axis
    )
    return compute_s + sum(seen.values()), path_seconds(lanes, compute_s), travel

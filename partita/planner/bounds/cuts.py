"""Into how many parts the ways to cut states cut them: worked out once for the same ranks."""

from __future__ import annotations

from dataclasses import replace

from partita.parallel.offload.rules import targets
from partita.planner.bounds.table import Shards
from partita.planner.space import MeshChoice, Shape, Space
from partita.spec.plan import Plan


class Cuts:
    """The ways of a space."""

    def __init__(self, space: Space) -> None:
        self.space = space
        away = "optimizer" in targets(replace(Plan(), offload=space.offload))
        self._narrow = space.dtype not in ("fp64", "fp32") and not away  # masters are here
        self._shards: dict[tuple[int, int], Shards] = {}
        self._ways: dict[object, list[tuple[int, Shards]]] = {}

    def shards(self, mesh: MeshChoice, shape: Shape, dp_shard: int) -> Shards:
        """Into how many parts ZeRO cuts the states of experts, and of the rest at most."""
        cut = dp_shard * mesh.cp
        key = (cut, max(cut * mesh.inner // (shape.ep * shape.etp), 1))
        if key not in self._shards:
            self._shards[key] = Shards(*key, self._narrow)
        return self._shards[key]

    def ways(self, mesh: MeshChoice, shape: Shape) -> list[tuple[int, Shards]]:
        """ZeRO stages in force, with the most parts they cut states into."""
        key = (mesh, shape.ep, shape.etp)
        if key not in self._ways:
            shards, states = self.shards(mesh, shape, mesh.dp), self.space.states(mesh, shape)
            stages = {zero if shard > 1 else 0 for shard, zero, _ in states}
            self._ways[key] = [(zero, shards) for zero in sorted(stages)]
        return self._ways[key]

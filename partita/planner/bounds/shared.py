"""What ranks that share compute units take longer, before a plan is laid (simulate/predict.py).

Whenever more of a node's ranks compute than there are units they take turns; a unit that nobody wants stays
idle. So a step takes no less than its schedule on units of its own, and no less than all work takes on all
units; both as many times longer as layers are where so many are busy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from partita.cost.machine import Machine
from partita.planner.bounds.columns import TIMES, TRAVEL
from partita.planner.bounds.rough import HIDES
from partita.planner.space import MeshChoice, Space
from partita.simulate.pipeline import FULL


class Turns(NamedTuple):
    """How many times longer a schedule takes at least; the work of the mean rank; and what follows the
    schedule."""

    path: float = 1.0
    work: float = 1.0
    once: float = 1.0


OWN = Turns()


class Sharing:
    """The turns of a space's meshes on a machine."""

    def __init__(self, space: Space, machine: Machine) -> None:
        self.cluster, self.units = machine.cluster, machine.cluster.cores_shared
        self._late = machine.software.validates_after
        model = space.model
        self._batch, self._stages = space.batch, model.layers + 2  # at most
        self._crowded: dict[int, float] = {}

    def __call__(self, mesh: MeshChoice) -> Turns:
        """Of a mesh, and of any that has more ranks."""
        if not self.units:
            return OWN
        ranks = min(self.cluster.devices_per_node, mesh.world)
        path, each = self._least(ranks), max(1.0, ranks / self.units)
        if mesh.pp == 1:
            return Turns(path * each, path * each, each)
        # A long step's turns are read off a short one, which has more of a bubble
        long = 2 * self._stages * (self._batch // mesh.dp) > FULL
        return Turns(path, path if long or self._late else path * each, each)

    def least(
        self, mesh: MeshChoice, seconds: float, stages: np.ndarray, m: int, paired: bool = False
    ) -> float:
        """Seconds of a schedule that takes so long at least on units of its own: `m` microbatches over
        `stages` [stage, numbers]; `paired`: rows travel under compute."""
        path, work, _ = self(mesh)
        if work == path:
            return path * seconds
        mean = stages[:, TIMES].sum() - (HIDES * stages[:, TRAVEL].sum() if paired else 0.0)
        return max(path * seconds, work * m * float(mean) / mesh.pp)

    def _least(self, ranks: int) -> float:
        """How many times longer layers take where so many ranks or more are busy."""
        if ranks not in self._crowded:
            most = self.cluster.devices_per_node
            self._crowded[ranks] = min(map(self.cluster.crowded, range(ranks, most + 1)))
        return self._crowded[ranks]

"""The arenas of one rank besides the device: its host's memory and its disk."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from partita.comm.protocol import Where
from partita.parallel.offload.activations import Activations
from partita.parallel.offload.cpu import Away, HostArena, HostGradients, HostStream, Link, Moves
from partita.parallel.offload.nvme import DiskArena, DiskGradients, DiskStream
from partita.parallel.offload.rules import arena_of
from partita.parallel.offload.shards import DiskShards, HostShards
from partita.parallel.offload.shelves import DiskShelf, HostShelf, Shelf
from partita.parallel.units import Unit, Zeros
from partita.spec.plan import Plan

CATEGORIES = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True)
class Arenas:
    """Who allocates what does not lie on the device. `folder` is where files go (None: the system's for
    temporary ones)."""

    plan: Plan
    host: HostArena
    disk: DiskArena | None
    moves: Moves

    @staticmethod
    def of(plan: Plan, where: Where, moves: Moves, folder: str | None) -> Arenas:
        """Those that a plan asks for."""
        path = Path(folder or tempfile.gettempdir())
        disk = DiskArena(where, path) if plan.offload.to == "nvme" else None
        return Arenas(plan, HostArena(where), disk, moves)

    def elsewhere(self) -> Mapping[str, Zeros]:
        """Ledger category -> its allocator, of those that do not lie on the device."""
        found: dict[str, Zeros] = {}
        for category in CATEGORIES:
            arena = arena_of(self.plan, category)
            if arena != "device":
                found[category] = self.host.zeros if self.disk is None else self.disk.zeros
        return found

    @property
    def has_states_in_files(self) -> bool:
        """Whether masters and moments lie on disk."""
        return self.disk is not None and "optimizer" in self.elsewhere()

    def stream(self, aways: Sequence[Away]) -> HostStream | DiskStream:
        """The chunks of units whose optimizer lies elsewhere."""
        link = Link(aways, self.host, self.moves)
        if self.disk is None:
            return HostStream(aways, link)
        return DiskStream(aways, self.disk, link, self.host)

    def shards(self, units: Sequence[Unit]) -> HostShards | DiskShards | None:
        """Where the units' working shards lie; None where they are on the device."""
        own = [unit for unit in units if unit.spec.stage == 3]
        if "parameters" not in self.elsewhere() or not own:
            return None
        if self.disk is None:
            return HostShards(self.moves)
        return DiskShards(own, self.disk, self.host, self.moves)

    def activations(
        self, names: Mapping[int, Sequence[str]], sizes: Sequence[int]
    ) -> Activations | None:
        """Where blocks, by stage, put what they keep; None where it stays on the device. `sizes`: of what
        may be away at once, piece by piece."""
        if arena_of(self.plan, "activations") == "device":
            return None
        shelf: Shelf = HostShelf(self.host.where)
        if self.disk is not None:
            shelf = DiskShelf(self.disk, self.host, sizes)
        return Activations(shelf, self.moves, names)

    def gradients(self, units: Sequence[Unit]) -> HostGradients | DiskGradients | None:
        """Where the units' gradients go; None where they stay on the device."""
        if "gradients" not in self.elsewhere() or not units:
            return None
        if self.disk is None:
            return HostGradients(units, self.host, self.moves)
        return DiskGradients(units, self.disk, self.host, self.moves)

"""Working shards of stage 3 that lie elsewhere, streamed to their gather (ZeRO-Infinity, Rajbhandari 2021).

    disk      [read 2]  [read 3]                     a block ahead of what is gathered
    host  up  [ 1 ]     [ 2 ]     [ 3 ]
    gather    [ 1 ]     [ 2 ]     [ 3 ]              prefetch blocks ahead of what is computed
    compute        [ 0 ]     [ 1 ]     [ 2 ]

On the device there is a shard while it is gathered. An update makes what was read ahead stale.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from partita.parallel.offload.cpu import HostArena, Moves
from partita.parallel.offload.nvme import Buffer, DiskArena
from partita.parallel.offload.rules import SETS
from partita.parallel.units import Unit


@dataclass(frozen=True)
class HostShards:
    """Shards in host memory."""

    moves: Moves

    def expect(self, units: Sequence[Unit]) -> None:
        """They are at hand."""

    def bring(self, unit: Unit) -> Tensor:
        """A copy of its shard on the device."""
        return to_device(unit, unit.shard, self.moves)

    def changed(self, unit: Unit) -> None:
        """Its shard is another now."""

    def sent(self, unit: Unit, start_s: float) -> None:
        """The device has put a new shard in place."""
        self.moves.note("host", f"{unit.name}:offload", unit.shard.nbytes, start_s)


class DiskShards:
    """Shards in a file. At most SETS are read ahead, through buffers of the longest."""

    def __init__(
        self, units: Sequence[Unit], disk: DiskArena, arena: HostArena, moves: Moves
    ) -> None:
        self.disk, self.moves = disk, moves
        longest = max(units, key=lambda u: u.shard.nbytes)
        size, dtype = longest.shard.numel(), longest.shard.dtype
        self._free = [Buffer(size, dtype, arena) for _ in range(SETS)]
        self._coming: dict[str, tuple[Buffer, Future[None]]] = {}
        self._reader = ThreadPoolExecutor(1)

    def expect(self, units: Sequence[Unit]) -> None:
        """They will be gathered soon: reads them, as many as there is room for; one buffer is spared."""
        for unit in units:
            if unit.name not in self._coming and len(self._free) > 1:
                self._read(unit)

    def bring(self, unit: Unit) -> Tensor:
        """A copy of its shard on the device."""
        start = time.perf_counter()
        if unit.name not in self._coming:
            self._read(unit)
        buffer, reading = self._coming.pop(unit.name)
        reading.result()
        self.moves.note("disk", f"{unit.name}:read", unit.shard.nbytes, start)
        found = to_device(unit, buffer.tensor[: unit.shard.numel()], self.moves)
        self._free.append(buffer)
        return found

    def changed(self, unit: Unit) -> None:
        """Its shard is another now: what was read is forgotten."""
        if unit.name in self._coming:
            buffer, reading = self._coming.pop(unit.name)
            reading.result()
            self._free.append(buffer)

    def sent(self, unit: Unit, start_s: float) -> None:
        """The device has put a new shard in place."""
        self.moves.note("host", f"{unit.name}:offload", unit.shard.nbytes, start_s)
        self.moves.note("disk", f"{unit.name}:write", unit.shard.nbytes, start_s)

    def _read(self, unit: Unit) -> None:
        buffer = self._free.pop()
        self._coming[unit.name] = (
            buffer,
            self._reader.submit(self.disk.read, unit.shard, buffer.raw),
        )


def to_device(unit: Unit, shard: Tensor, moves: Moves) -> Tensor:
    """A copy of a shard in host memory, beside the unit's whole values."""
    start = time.perf_counter()
    found = shard.to(unit.values.device, copy=True)
    moves.note("host", f"{unit.name}:reload", found.nbytes, start)
    return found

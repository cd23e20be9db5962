"""States in host memory, updated there (ZeRO-Offload, Ren et al. 2021).

    device   gradient ──┐                     ┌──► working
    host                └─► [chunk] update ───┘       masters, moments: where they lie, in place

The device's gradient comes down chunk by chunk and the rounded master goes up; nothing else crosses the link.
On a machine without accelerators both arenas are RAM: the copies are made all the same, and the two are
accounted apart.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partita.comm.protocol import Where
from partita.comm.recording import Recorder
from partita.parallel.offload.rules import CHUNK
from partita.parallel.units import Unit

MASTER, GRADIENT = "master", "gradient"
WORKING = "working"  # the working shard, where it lies elsewhere


@dataclass(frozen=True)
class Moves:
    """Writes down what moves between arenas, as a Transfer on axis `host` or `disk`."""

    recorder: Recorder
    where: Where

    def note(self, axis: str, site: str, size: int, start_s: float) -> None:
        """A copy of `size` bytes that began at `start_s` and is over, or ordered."""
        self.recorder.note(self.where, axis, "copy", site, size, start_s)


@dataclass
class HostArena:
    """Flat tensors in host memory, by ledger category."""

    where: Where
    name: str = "host"
    held: dict[str, list[Tensor]] = field(default_factory=dict)

    def zeros(self, category: str, size: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor that the ledger counts here."""
        with self.where.on(self.name):
            made = _reachable(size, dtype)
        self.held.setdefault(category, []).append(made)
        return made


def _reachable(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros that this process's GPU, where it has one, copies from and to by itself (pinned): other memory
    goes through a small buffer that is. Where the host pins no more, other memory."""
    if torch.cuda.is_initialized() and size:
        with suppress(RuntimeError):
            return torch.zeros(size, dtype=dtype, pin_memory=True)
    return torch.zeros(size, dtype=dtype)


@dataclass(frozen=True)
class Away:
    """A unit whose optimizer lies elsewhere: `states` are flat as its shard, the master among them; `given`
    too, the gradient where it lies there. `working`: so does the working shard. `second`: where an update
    goes of what it must leave as it was, states or WORKING."""

    unit: Unit
    states: Mapping[str, Tensor]
    given: Mapping[str, Tensor]
    working: bool = False
    second: Mapping[str, Tensor] = field(default_factory=dict)

    def parts(self) -> Iterator[tuple[int, int]]:
        """First and end element of each chunk."""
        size = self.unit.master.numel()
        for first in range(0, size, CHUNK):
            yield first, min(first + CHUNK, size)


@dataclass(frozen=True)
class Chunk:
    """Elements from `first` on of a unit's shard, in host memory: master, gradient and every state."""

    away: Away
    first: int
    tensors: Mapping[str, Tensor]

    @property
    def end(self) -> int:
        """The element behind it."""
        return self.first + self.tensors[MASTER].numel()


class Link:
    """Between the device and its host, for the update: a chunk of the gradient down, of the master up."""

    def __init__(self, aways: Sequence[Away], arena: HostArena, moves: Moves) -> None:
        self.moves = moves
        comes = [a.unit.master.numel() for a in aways if GRADIENT not in a.given]
        largest = min(max(comes, default=0), CHUNK)
        dtype = aways[0].unit.gradient.dtype if aways else torch.float32
        self._gradient = arena.zeros("buffers", largest, dtype)
        alone = [a.unit.shard for a in aways if MASTER not in a.states]
        chunk = min(max((s.numel() for s in alone), default=0), CHUNK)
        narrow = alone[0].dtype if alone else dtype
        self._narrow = arena.zeros("buffers", chunk, narrow)
        self._wide = arena.zeros("buffers", chunk, dtype)

    def down(self, unit: Unit, first: int, end: int) -> Tensor:
        """The gradient's chunk, in host memory until the next is asked for."""
        return self._gradient[: end - first].copy_(unit.gradient[first:end])

    def weights(self, unit: Unit, first: int, end: int) -> Tensor:
        """The working weights' chunk, widened in host memory until the next is asked for: there are no
        masters."""
        return self.widened(self._narrow[: end - first].copy_(unit.shard[first:end]))

    def widened(self, narrow: Tensor) -> Tensor:
        """The same of a chunk in host memory."""
        return self._wide[: narrow.numel()].copy_(narrow)

    def up(self, away: Away, first: int, master: Tensor) -> None:
        """Rounds a chunk of the master into the working weights."""
        shard = away.second.get(WORKING, away.unit.shard)
        shard[first : first + master.numel()].copy_(master)

    def up_again(self, away: Away) -> None:
        """The masters are as they were: so are the working weights."""
        if MASTER in away.states:
            start, unit = time.perf_counter(), away.unit
            unit.shard.copy_(away.states[MASTER])
            if not away.working:
                self.moves.note("host", f"{unit.name}:reload", unit.shard.nbytes, start)

    def note(self, away: Away, start_s: float) -> None:
        """A whole unit has passed."""
        unit = away.unit
        if GRADIENT not in away.given:
            self.moves.note("host", f"{unit.name}:offload", unit.gradient.nbytes, start_s)
        if MASTER not in away.states and not away.working:
            self.moves.note("host", f"{unit.name}:offload", unit.shard.nbytes, start_s)
        if not away.working:
            self.moves.note("host", f"{unit.name}:reload", unit.shard.nbytes, start_s)


@dataclass(frozen=True)
class HostStream:
    """Chunks of the states of `aways` in their order; what is yielded may be changed in place. When the next
    is asked for, the chunk's masters are rounded into the device's working weights."""

    aways: Sequence[Away]
    link: Link

    def chunks(self, units: Collection[str]) -> Iterator[Chunk]:
        """One pass over all states of the units named."""
        for away in (a for a in self.aways if a.unit.name in units):
            start = time.perf_counter()
            for first, end in away.parts():
                own = {n: t[first:end] for n, t in {**away.states, **away.given}.items()}
                own |= {
                    n: away.second[n][first:end].copy_(own[n]) for n in own.keys() & away.second
                }
                if GRADIENT not in own:
                    own[GRADIENT] = self.link.down(away.unit, first, end)
                if MASTER not in own:
                    own[MASTER] = self.link.weights(away.unit, first, end)
                yield Chunk(away, first, own)
                self.link.up(away, first, own[MASTER])
            self.link.note(away, start)


class HostGradients:
    """Gradients in host memory: a chunk comes down, and is added to what lies there."""

    def __init__(self, units: Sequence[Unit], arena: HostArena, moves: Moves) -> None:
        self.moves = moves
        largest = max((min(u.sums.numel(), CHUNK) for u in units), default=0)
        self._chunk = arena.zeros("buffers", largest, units[0].gradient.dtype)

    def store(self, unit: Unit, into: Tensor, made: Tensor, adds: bool) -> None:
        """Adds `made`, on the device, to `into`, or puts it in its place."""
        start = time.perf_counter()
        for first in range(0, made.numel(), CHUNK):
            there, here = into[first : first + CHUNK], made[first : first + CHUNK]
            if adds:
                there.add_(self._chunk[: here.numel()].copy_(here))
            else:
                there.copy_(here)
        self.moves.note("host", f"{unit.name}:offload", made.nbytes, start)

    def fetch(self, unit: Unit, stored: Tensor) -> Tensor:
        """A copy on the device."""
        start = time.perf_counter()
        found = stored.to(unit.gradients.device, copy=True)
        self.moves.note("host", f"{unit.name}:reload", found.nbytes, start)
        return found

    def settle(self) -> None:
        """Each store is over when it returns."""

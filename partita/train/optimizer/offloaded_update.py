"""What an update is given and changes that lies elsewhere than on the device: states, updated on the host
chunk by chunk; gradients, brought to an optimizer on the device unit by unit."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from partita.parallel.offload.arenas import Arenas
from partita.parallel.offload.cpu import GRADIENT, MASTER, WORKING, Away, Chunk, HostStream
from partita.parallel.offload.nvme import DiskGradients, DiskStream
from partita.parallel.units import Away as Gradients
from partita.parallel.units import Unit
from partita.train.optimizer.optim import PartOptimizer, first_count, state_names
from partita.train.optimizer.places import Places
from partita.train.optimizer.slots import Slot
from partita.train.optimizer.stochastic import Rounding

if TYPE_CHECKING:
    from partita.spec.job import TrainSpec


PART = 1 << 15  # elements


def parts_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in views of PART elements: a CPU's norm adds squares up in a few lanes of fp32, which for
    two million random elements is off by 3e-5 and for so few by 2e-7. A GPU adds them up in a tree: whole."""
    found: list[Tensor] = []
    for t in tensors:
        whole = t.numel() <= PART or t.device.type != "cpu" or not t.is_contiguous()
        found += [t] if whole else t.view(-1).split(PART)
    return found


@dataclass(frozen=True)
class AwayUpdate:
    """`slots` of each unit by its name; their states are in `optimizer`, which is never stepped itself."""

    stream: HostStream | DiskStream
    slots: Mapping[str, Sequence[Slot]]
    optimizer: torch.optim.Optimizer
    parts: PartOptimizer
    rounding: Rounding | None = None  # of weights without masters
    places: Places | None = None  # where it may be undone

    def run(
        self, draw: int, lr: float, factor: float, balance: Callable[[Tensor, Tensor], None],
        units: Collection[str],
    ) -> None:  # fmt: skip
        """An update of the `units` named: gradients times `factor`, masters and moments in place, working
        weights rounded (at random by number `draw`). `balance(master, gradient)` moves a router's bias."""
        for chunk in self.stream.chunks(units):
            for slot in self.slots[chunk.away.unit.name]:
                part = _within(slot, chunk)
                if part is None:
                    continue
                gradient, master = part.pop(GRADIENT), part.pop(MASTER)
                if slot.balances:
                    balance(master, gradient)
                else:
                    if factor != 1:
                        keep = self.places is not None
                        gradient = gradient * factor if keep else gradient.mul_(factor)
                    done = int(self.optimizer.state[slot.master].get("step", 0))
                    self.parts.step((master, gradient, part), slot.decays, done, lr)
                if self.rounding is not None:
                    first = max(chunk.first - slot.start, 0)
                    for where, near in self.rounding(slot, master, draw, first):
                        master[where] = near
        for slot in (s for unit in units for s in self.slots[unit]):
            if "step" in self.optimizer.state[slot.master]:
                self.optimizer.state[slot.master]["step"] += 1
        if self.places is not None:
            self.places.change()

    def undo(self) -> None:
        """The last update has not been; counts of steps are the caller's."""
        assert self.places is not None, "it leaves nothing of before"
        self.places.change()
        for away in self.stream.aways:
            self.stream.link.up_again(away)


@dataclass(frozen=True)
class Given:
    """The gradients of `units` as the step left them, for the norm and for an optimizer on the device.
    `away`: where they lie, if elsewhere."""

    units: Sequence[Unit]
    away: Gradients | None = None

    def norms(self, counted: list[Tensor]) -> Sequence[Tensor]:
        """The 2-norms of parts of them, taken where they lie: in a file, of a chunk of each at a time, also
        on ranks that count nothing, as is declared."""
        if not isinstance(self.away, DiskGradients):
            return torch._foreach_norm(parts_of(counted)) if counted else ()
        found = []
        for unit in self.units:
            own = unit.gradient
            begin, width = own.data_ptr(), own.element_size()
            places = [((g.data_ptr() - begin) // width, g.numel()) for g in counted]
            for first, part in self.away.chunks(unit, own):
                for start, size in places:
                    a, b = max(start - first, 0), min(start + size - first, part.numel())
                    found += torch._foreach_norm(parts_of([part[a:b]])) if a < b else []
        return found

    @property
    def names(self) -> frozenset[str]:
        """Of all units."""
        return frozenset(unit.name for unit in self.units)

    def update(
        self,
        units: Collection[str],
        slots: Sequence[Slot],
        apply: Callable[[Sequence[Slot]], None],
    ) -> None:
        """Applies what is on the device at once, `slots` of the `units` named; else of one unit after another
        a copy that is brought there, and freed: what lies elsewhere stays as it is. Moves each unit's part of
        the gradient, be it padding alone, site '<unit>:reload' (from a file ':read' too)."""
        if self.away is None:
            apply(slots)
            return
        for unit in (u for u in self.units if u.name in units):
            here = self.away.fetch(unit, unit.gradient)
            own = [s for s in slots if s.unit == unit.name]
            apply([replace(slot, gradient=here[slot.part]) for slot in own])
            del here  # before the next comes


def host_threads(ranks: int) -> int:
    """Threads of a rank on a GPU for an update that is made on the host: its share of the processors."""
    count = os.cpu_count() or 1
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    return max(here // max(min(ranks, torch.cuda.device_count()), 1), 1)


def _within(slot: Slot, chunk: Chunk) -> dict[str, Tensor] | None:
    """The slot's elements of a chunk."""
    first = max(slot.start, chunk.first)
    end = min(slot.start + slot.master.numel(), chunk.end)
    if first >= end:
        return None
    return {n: t[first - chunk.first : end - chunk.first] for n, t in chunk.tensors.items()}


def make_away(
    arenas: Arenas, slots: Mapping[str, Sequence[Slot]], units: Sequence[Unit],
    optimizer: torch.optim.Optimizer, train: TrainSpec, rounding: Rounding | None,
    places: Places | None = None,
) -> AwayUpdate | None:  # fmt: skip
    """Allocates moments beside the masters; None where the optimizer lies on the device, or nothing
    trains on this rank. `rounding`: there are no masters. `places`: an update may be undone."""
    elsewhere = arenas.elsewhere()
    if "optimizer" not in elsewhere or not units:
        return None
    zeros = elsewhere["optimizer"]
    aways = []
    for unit in units:
        size, dtype = unit.master.numel(), unit.gradient.dtype
        states = {n: zeros("optimizer", size, dtype) for n in state_names(train)}
        given = {GRADIENT: unit.gradient} if "gradients" in elsewhere else {}
        working = "parameters" in elsewhere and unit.spec.stage == 3
        held = states if rounding is not None else {MASTER: unit.master, **states}
        second = {} if places is None else places.beside("optimizer", held)
        if places is not None and rounding is not None and working:
            second |= places.beside("parameters", {WORKING: unit.shard})
        aways.append(Away(unit, held, given, working, second))
        for slot in slots[unit.name]:
            part = slot.part
            if second and (rounding is None or working):
                places.follow(slot.master, unit.master, part)
            if slot.balances:
                continue
            own = {n: t[part] for n, t in states.items()}
            for n in own if second else ():
                places.follow(own[n], states[n], part)
            optimizer.state[slot.master] = own | first_count(train)
    parts = PartOptimizer(train, aways[0].unit.gradient.dtype)
    return AwayUpdate(arenas.stream(aways), slots, optimizer, parts, rounding, places)

"""Gradients of flat units, summed over their ranks under backward.

    B of the last microbatch   head ────► blocks.7 ────► blocks.6 ────► ... embedding
    lane dp                              [head, blocks.7]     [blocks.6, blocks.5]   ...

Stage 0: all_reduce of the whole gradient, in place, when the unit's last gradient of the step is there;
stage 1: reduce_scatter of it, in place; during accumulation neither sends anything. Stages 2 and 3 store
the shard alone: in every microbatch a unit is lent memory for its whole gradient when its backward begins
and reduce-scattered when it ends, one at a time under way (none with `data.prefetch=0`, or where it would not
move under compute); the shard has memory from the first of them until the next step begins. What a shard is
partial over besides (dp_replicate, tp) is an all_reduce of it once a step; then what lies on two places of pp
(a tied weight's unit, those of a stage's copies) is summed between them. `data.accumulate=whole` makes
gradients of stages 2 and 3 stage 1's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from partita.comm.protocol import Comm, Handle, Where
from partita.parallel.deferred import WeightQueue
from partita.parallel.units import Away, Unit


@dataclass(frozen=True)
class UnitComms:
    """Whom a unit's ranks speak with, by what for; None where nothing moves."""

    shard: Comm | None = None
    reduce: Comm | None = None
    across: tuple[Comm, ...] = ()  # other places of pp that hold it, one after the other


@dataclass
class Reducer:
    """Reduces a rank's units (frozen ones are not among them), in the order all ranks agree on: that in
    which backward leaves blocks.

    `visits` are the sets of blocks that one microbatch comes to, where microbatches go two ways; else it
    comes to all."""

    units: Sequence[Unit]
    comms: Mapping[str, UnitComms]
    where: Where
    queue: WeightQueue = field(default_factory=WeightQueue)
    visits: Sequence[frozenset[str]] = ()
    away: Away | None = None  # where gradients lie, if elsewhere than on the device
    under_compute: bool = True  # whether one whole gradient may be on its way while another is made
    _last: set[str] = field(default_factory=set)
    _waiting: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    _fresh: set[str] = field(default_factory=set)
    _under_way: list[tuple[Unit, Handle, bool, str]] = field(default_factory=list)
    _late: dict[str, Tensor] = field(default_factory=dict)  # brought from elsewhere, until spent

    def __post_init__(self) -> None:
        self._held: dict[str, list[Unit]] = {}
        for unit in self.units:
            for block in unit.spec.blocks:
                self._held.setdefault(block, []).append(unit)

    @cached_property
    def reduces(self) -> bool:
        """Whether it must hear of blocks at all."""
        return self.away is not None or any(c.shard or c.reduce for c in self.comms.values())

    def comes_and_goes(self, unit: Unit) -> bool:
        """Whether a unit's whole gradient is there only while a backward makes it."""
        return self.away is not None or unit.spec.cuts_gradient

    def begin(self) -> None:
        """A step begins: gradients are zero, and parts of them are not there yet."""
        for unit in self.units:
            if unit.gradients.tensor is not None:
                unit.gradients.tensor.zero_()
            if self.away is None and unit.spec.cuts_gradient:
                unit.drop_gradient()
        self._fresh = {u.name for u in self.units if self.comes_and_goes(u)}

    def renew(self, units: Sequence[Unit]) -> None:
        """An update has taken these gradients: the next are not added to them."""
        for unit in units:
            if unit.gradients.tensor is not None:
                unit.gradients.tensor.zero_()
        self._fresh |= {u.name for u in units if self.comes_and_goes(u)}

    def spend(self, unit: Unit) -> Tensor:
        """A copy on the device of a late unit's gradient, not yet summed between places of pp."""
        return unit.gradient.clone() if self.away is None else self._late.pop(unit.name)

    def arm(self, blocks: Sequence[str]) -> None:
        """The next backward, or W, of these blocks is the step's last: units are ready as their blocks
        finish."""
        self._last |= set(blocks)

    def block_begins(self, block: str) -> None:
        """A block's weight gradients are about to come: lends memory where only a shard is stored."""
        for unit in self._held.get(block, ()):
            if unit.gradients.tensor is None:
                size, device = unit.gradients.size, unit.gradients.device
                unit.gradients.lend(torch.zeros(size, dtype=unit.gradient.dtype, device=device))

    def block_done(self, block: str) -> bool:
        """A block's weight gradients are there; starts the units that have nothing to wait for. Whether
        it was the step's last time."""
        last = block in self._last
        self._last.discard(block)
        for unit in self._held.get(block, ()):
            passes = self.comes_and_goes(unit)
            if passes or last:
                key = unit.name, self.where.microbatch if passes else -1
                waiting = self._waiting.setdefault(key, self._awaited(unit, block))
                waiting.discard(block)
                if not waiting:
                    del self._waiting[key]
                    self._start(unit)
        return last

    def _awaited(self, unit: Unit, block: str) -> set[str]:
        """The blocks whose gradients a unit waits for: all; of a microbatch those it comes to."""
        passes = self.comes_and_goes(unit)
        here = next((v for v in self.visits if block in v), None) if passes else None
        return set(unit.spec.blocks) if here is None else set(unit.spec.blocks) & here

    def finish(self, late: Sequence[Unit] = (), of: Sequence[Unit] | None = None) -> None:
        """Waits for all sums of the step, or since the last update of these units. Gradients are then the
        step's, the same on every rank of the axes summed over; but of `late` units not yet summed between
        places of pp."""
        self._settle()
        units = self.units if of is None else [unit for unit in self.units if unit in of]
        if self.away is not None:
            for unit in units:
                self._sum_away(unit, self.away, unit in late)
            self.away.settle()
        else:
            self._sum_here(units, late)
        self._last.clear()

    def _sum_here(self, units: Sequence[Unit], late: Sequence[Unit]) -> None:
        for unit in units:
            if unit.name in self._fresh:  # no backward came to it
                unit.hold_gradient()
                unit.gradient.zero_()
            comm = self.comms[unit.name].reduce
            if unit.spec.stage and comm is not None:
                self._reduce(unit, comm, "reduce")
        self._settle()
        self.add_across([unit for unit in units if unit not in late])

    def add_late(self, units: Sequence[Unit], spent: Sequence[Tensor]) -> None:
        """Sums what was spent of late units between the places of pp that hold them; it is their gradient."""
        for unit, made in zip(units, spent, strict=True):
            (comm,) = self.comms[unit.name].across  # late is what two places hold
            with self.where.at("step"):
                site = f"{unit.name}:{_across(comm)}"
                comm.start_all_reduce(made, site=site, out=made).wait()
                if self.away is None:
                    unit.gradient.copy_(made)
                else:
                    self.away.store(unit, unit.gradient, made, adds=False)
                    self.away.settle()

    def add_across(self, units: Sequence[Unit]) -> None:
        """Sums units between the places of pp that hold them: copies, then what is tied."""
        for turn in range(max((len(self.comms[u.name].across) for u in units), default=0)):
            for unit in units:
                for comm in self.comms[unit.name].across[turn : turn + 1]:
                    self._reduce(unit, comm, _across(comm))
            self._settle()

    def _sum_away(self, unit: Unit, away: Away, late: bool) -> None:
        """A unit that ranks sum once a step comes for that, and its part goes again; a late one's stays until
        it is spent."""
        comms, cut = self.comms[unit.name], unit.spec.cuts_gradient
        scatters = comms.shard is not None and not cut
        if not (comms.reduce or comms.across or scatters):
            return
        with self.where.at("step"):
            made = away.fetch(unit, unit.gradient if cut else unit.sums)
            if scatters:
                assert comms.shard is not None
                out = torch.empty(unit.gradient.shape, dtype=made.dtype, device=made.device)
                site = f"{unit.name}:scatter"
                made = comms.shard.start_reduce_scatter(made, site=site, out=out).wait()
            across = () if late else comms.across
            for comm, kind in ((comms.reduce, "reduce"), *((c, _across(c)) for c in across)):
                if comm is not None:
                    made = comm.start_all_reduce(made, site=f"{unit.name}:{kind}", out=made).wait()
            if late:
                self._late[unit.name] = made
            else:
                away.store(unit, unit.gradient, made, adds=False)

    def _start(self, unit: Unit) -> None:
        comms = self.comms[unit.name]
        if self.away is not None and not unit.spec.cuts_gradient:
            self._store(unit, unit.sums, unit.gradients.take(), self.away)
            return
        if unit.spec.stage == 0:
            if comms.reduce is not None:
                self._reduce(unit, comms.reduce, "reduce")
            return
        assert comms.shard is not None
        site = f"{unit.name}:scatter"
        if not unit.spec.cuts_gradient:
            whole = unit.gradients.tensor
            assert whole is not None
            with self.where.at("step"):
                handle = comms.shard.start_reduce_scatter(whole, site=site, out=unit.gradient)
            self._under_way.append((unit, handle, False, "step"))
            return
        self._settle()
        whole, adds = unit.gradients.take(), unit.name not in self._fresh
        out = unit.gradient
        if adds or self.away is not None:
            out = torch.empty(out.shape, dtype=out.dtype, device=whole.device)
        if self.away is None:
            unit.hold_gradient()
            self._fresh.discard(unit.name)
        handle = comms.shard.start_reduce_scatter(whole, site=site, out=out)
        self._under_way.append((unit, handle, adds, self.where.phase))
        if not (self.under_compute and comms.shard.moves(whole.nbytes)):
            self._settle()

    def _reduce(self, unit: Unit, comm: Comm, kind: str) -> None:
        """Sums what is stored of the unit's gradient, in place."""
        gradient = unit.gradient
        with self.where.at("step"):
            handle = comm.start_all_reduce(gradient, site=f"{unit.name}:{kind}", out=gradient)
        self._under_way.append((unit, handle, False, "step"))

    def _settle(self) -> None:
        for unit, handle, adds, phase in self._under_way:
            found = handle.wait()
            if self.away is not None:
                with self.where.at(phase):
                    self._store(unit, unit.gradient, found, self.away)
            elif adds:
                unit.gradient.add_(found)
        self._under_way.clear()

    def _store(self, unit: Unit, into: Tensor, made: Tensor, away: Away) -> None:
        away.store(unit, into, made, adds=unit.name not in self._fresh)
        self._fresh.discard(unit.name)


def _across(comm: Comm) -> str:
    return "tied" if comm.axis == "tied" else "copies"

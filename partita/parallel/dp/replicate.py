"""Replicated data parallelism: each flat unit's gradient is summed once a step, by one all-reduce that
starts when the unit's last gradient of the step is there, under the backward of the blocks before it.

    B of the last microbatch   head ────► blocks.7 ────► blocks.6 ────► ... embedding
    lane dp                         [head]  [blocks.7]     [blocks.6]        ...

During accumulation nothing is sent. Sends (all_reduce, the unit's axes, its flat gradient): once a step.
A unit on two places of pp (a tied weight's, a stage's copies) is summed over dp first, then between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from partita.comm.protocol import Comm, Handle, Where
from partita.parallel.deferred import WeightQueue


class Reducible(Protocol):
    """A flat unit as the reducer sees it."""

    name: str
    gradient: Tensor


@dataclass
class Reducer:
    """Reduces a rank's units. `holders[unit]` are the blocks whose backward adds to the unit; `sums`
    and `ties` (between places of pp) give the Comm of each unit that needs one, in the order all ranks
    agree on."""

    units: Sequence[Reducible]
    holders: Mapping[str, frozenset[str]]
    sums: Mapping[str, Comm]
    ties: Mapping[str, Comm]
    where: Where
    queue: WeightQueue = field(default_factory=WeightQueue)
    _last: set[str] = field(default_factory=set)
    _waiting: dict[str, set[str]] = field(default_factory=dict)
    _under_way: list[tuple[Reducible, Handle]] = field(default_factory=list)

    def arm(self, blocks: Sequence[str]) -> None:
        """The next backward, or W, of these blocks is the step's last: units are ready as their
        blocks finish."""
        if not self._waiting:
            self._waiting = {u.name: set(self.holders[u.name]) for u in self.units}
        self._last |= set(blocks)

    def block_done(self, block: str) -> None:
        """A block's backward is over; starts the all-reduce of units that have nothing to wait for."""
        if block not in self._last:
            return
        self._last.discard(block)
        for unit in self.units:
            waiting = self._waiting[unit.name]
            if block in waiting:
                waiting.discard(block)
                if not waiting:
                    self._start(unit)

    def finish(self) -> None:
        """Waits for all sums; then those between places of pp. Gradients are then the step's, the same
        on every rank of the axes summed over."""
        for unit in self.units:
            if self._waiting.get(unit.name):
                self._start(unit)
        self._settle()
        for unit in self.units:
            if unit.name in self.ties and self._waiting:
                kind = "tied" if self.ties[unit.name].axis == "tied" else "copies"
                self._launch(unit, self.ties[unit.name], kind)
        self._settle()
        self._waiting.clear()
        self._last.clear()

    def _start(self, unit: Reducible) -> None:
        if unit.name in self.sums:
            self._launch(unit, self.sums[unit.name], "reduce")

    def _launch(self, unit: Reducible, comm: Comm, kind: str) -> None:
        phase, self.where.phase = self.where.phase, "step"
        handle = comm.start_all_reduce(unit.gradient, site=f"{unit.name}:{kind}")
        self.where.phase = phase
        self._under_way.append((unit, handle))

    def _settle(self) -> None:
        for unit, handle in self._under_way:
            unit.gradient.copy_(handle.wait())
        self._under_way.clear()


class BlockDone(torch.autograd.Function):
    """Identity at a block's input; its backward runs when the block's is over, and says so."""

    @staticmethod
    def forward(ctx, x: Tensor, reducer: Reducer, block: str) -> Tensor:
        """x itself, as a view."""
        ctx.reducer, ctx.block = reducer, block
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Passes the gradient on and tells the reducer, behind the block's weight gradients."""
        ctx.reducer.queue.add(ctx.reducer.block_done, ctx.block)
        return gradient, None, None

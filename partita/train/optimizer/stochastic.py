"""The update of 16-bit weights that are their own masters: in fp32, then rounded up or down at random.

    w bf16 ──widen──► fp32 ──AdamW or SGD, moments fp32──► fp32 ──stochastic rounding──► w bf16

To the nearest, an update of less than half of a weight's last bit (2^-9 of it) is always lost; at random it
is made with the probability that keeps the mean (Gupta et al. 2015, arXiv 1502.02551; Zamirai et al. 2020,
2010.06192). Which way is a function of seed, number of the update, weight and element (random/seeds.py), so
that replicas stay equal and no plan changes it; an asynchronous schedule counts all updates of its steps.
12 bytes of master and moments a parameter become 8. Where moments lie elsewhere, so does the update: weights
come there, and go rounded. Where weights alone lie elsewhere they come for it. Under fp64, for proofs, all is
fp64 but that weights are what bf16 holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from partita.comm.context import Context
from partita.comm.random.seeds import rounded_box
from partita.parallel.dp.zero import Parameters
from partita.parallel.laid import Laid
from partita.parallel.offload.rules import CHUNK
from partita.parallel.units import Shards, Unit
from partita.spec.layout import range_boxes
from partita.train.optimizer.optim import PartOptimizer, first_count, state_names
from partita.train.optimizer.places import Places
from partita.train.optimizer.slots import Slot

if TYPE_CHECKING:
    from partita.spec.job import TrainSpec


@dataclass(frozen=True)
class Rounding:
    """Rounds a rank's slots box by box of each weight, where the layouts say it lies; padding stays."""

    laid: Laid
    context: Context

    def __call__(
        self, slot: Slot, wide: Tensor, draw: int, first: int = 0
    ) -> Iterator[tuple[slice, Tensor]]:
        """(where in `wide`, rounded values) of a slot's elements from `first` on, by number `draw`."""
        rank, seed = self.context.rank, self.context.seed
        half = self.laid.request.plan.precision.dtype == "fp16"
        for weight in slot.weights:
            layout = self.laid.layouts[weight]
            for piece in self.laid.pieces(weight, rank):
                begin = piece.start - slot.start - first
                at, end = max(begin, 0), min(begin + piece.numel(), wide.numel())
                for box, _ in range_boxes(piece.box, at - begin, end - begin):
                    part = slice(at, at + prod(b - a for a, b in box))
                    whole = layout.shape
                    yield part, rounded_box(wide[part], seed, draw, weight, whole, box, half)
                    at = part.stop


@dataclass(frozen=True)
class ShardsAway:
    """Shards of weights without masters that lie elsewhere than on the device: of `units` by name, through
    `lie`. `second`: where an update goes that may be undone."""

    units: Mapping[str, Unit]
    lie: Shards | None = None
    second: Mapping[str, Tensor] = field(default_factory=dict)
    places: Places | None = None

    def bring(self, unit: str) -> Tensor | None:
        """A copy on the device; None where it is there."""
        return self.lie.bring(self.units[unit]) if self.lie and unit in self.units else None

    def goes_to(self, slot: Slot) -> Tensor:
        """Where the updated weights of a slot belong."""
        return self.second[slot.unit][slot.part] if slot.unit in self.second else slot.master

    def change(self) -> None:
        """The update is over."""
        if self.places is not None:
            self.places.change()


def shards_of(
    parameters: Parameters, units: Sequence[Unit], slots: Sequence[Slot], places: Places | None
) -> ShardsAway:
    """Those of a rank's units; `places`: an update may be undone."""
    if parameters.away is None:
        return ShardsAway({})
    own = {unit.name: unit for unit in units if unit.spec.stage == 3}
    second = {}
    if places is not None:
        second = places.beside("parameters", {n: unit.shard for n, unit in own.items()})
        for slot in (s for s in slots if s.unit in own):
            places.follow(slot.master, own[slot.unit].shard, slot.part)
    return ShardsAway(own, parameters.away, second, places)


@dataclass
class StochasticUpdate:
    """Updates `slots`, whose masters are the working weights; moments lie in `optimizer`, which is never
    stepped itself. `shards`: those that lie elsewhere."""

    rounding: Rounding
    slots: Sequence[Slot]
    optimizer: torch.optim.Optimizer
    train: TrainSpec
    shards: ShardsAway

    def __post_init__(self) -> None:
        wide = {slot.gradient.dtype for slot in self.slots} or {torch.float32}
        device = self.rounding.context.device
        self._parts = PartOptimizer(self.train, *wide, device)
        for slot in self.slots:
            if not slot.balances:
                moments = {
                    n: torch.zeros_like(slot.gradient, device=device)
                    for n in state_names(self.train)
                }
                self.optimizer.state[slot.master] = {**first_count(self.train), **moments}

    def run(
        self, slots: Sequence[Slot], draw: int, lr: float, factor: float,
        balance: Callable[[Tensor, Tensor], None],
    ) -> None:  # fmt: skip
        """An update of some slots, a unit's together, some elements at a time: gradients times `factor`,
        weights rounded by number `draw`. `balance(master, gradient)` moves a router's bias. Behind the last
        `shards.change` is due."""
        unit, shards = "", self.shards
        brought: Tensor | None = None
        for slot in slots:
            if slot.unit != unit:
                unit, brought = slot.unit, shards.bring(slot.unit)
            here = slot.master if brought is None else brought[slot.part]
            if slot.balances:
                wide = here.to(slot.gradient.dtype)
                balance(wide, slot.gradient)
                self._round(slot, wide, draw, 0)
                continue
            if factor != 1:
                slot.gradient.mul_(factor)
            state = self.optimizer.state[slot.master]
            done = int(state.get("step", 0))
            for first in range(0, here.numel(), CHUNK):
                at = slice(first, first + CHUNK)
                wide = here[at].to(slot.gradient.dtype)
                moments = {n: state[n][at] for n in state_names(self.train)}
                self._parts.step((wide, slot.gradient[at], moments), slot.decays, done, lr)
                self._round(slot, wide, draw, first)
            if "step" in state:
                state["step"] += 1

    def _round(self, slot: Slot, wide: Tensor, draw: int, first: int) -> None:
        """A slot's updated weights from element `first` on, to where they belong."""
        there = self.shards.goes_to(slot)[first:]
        for part, near in self.rounding(slot, wide, draw, first):
            there[part] = near

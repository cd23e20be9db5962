"""The update of bf16 weights that are their own masters: in fp32, then rounded up or down at random.

    w bf16 ──widen──► fp32 ──AdamW or SGD, moments fp32──► fp32 ──stochastic rounding──► w bf16

To the nearest, an update of less than half of a weight's last bit (2^-9 of it) is always lost; at random it
is made with the probability that keeps the mean (Gupta et al. 2015, arXiv 1502.02551; Zamirai et al. 2020,
2010.06192). Which way is a function of seed, update, weight and element (comm/seeds.py), so that replicas
stay equal and no plan changes it. 12 bytes of master and moments a parameter become 8. Where moments lie
elsewhere, so does the update: weights come there, and go rounded. Sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from partita.comm.context import Context
from partita.comm.seeds import rounded_box
from partita.parallel.laid import Laid
from partita.spec.layout import range_boxes
from partita.train.optim import PartOptimizer, state_names
from partita.train.slots import Slot

if TYPE_CHECKING:
    from partita.spec.job import TrainSpec


@dataclass(frozen=True)
class Rounding:
    """Rounds a rank's slots box by box of each weight, where the layouts say it lies; padding stays."""

    laid: Laid
    context: Context

    def __call__(
        self, slot: Slot, wide: Tensor, update: int, first: int = 0
    ) -> Iterator[tuple[slice, Tensor]]:
        """(where in `wide`, rounded values) of a slot's elements from `first` on, for update `update`."""
        rank, seed = self.context.rank, self.context.seed
        for weight in slot.weights:
            layout = self.laid.layouts[weight]
            for piece in self.laid.pieces(weight, rank):
                begin = piece.start - slot.start - first
                at, end = max(begin, 0), min(begin + piece.numel(), wide.numel())
                for box, _ in range_boxes(piece.box, at - begin, end - begin):
                    part = slice(at, at + prod(b - a for a, b in box))
                    yield part, rounded_box(wide[part], seed, update, weight, layout.shape, box)
                    at = part.stop


@dataclass
class StochasticUpdate:
    """Updates `slots`, whose masters are the working weights; moments lie in `optimizer`, which is never
    stepped itself."""

    rounding: Rounding
    slots: Sequence[Slot]
    optimizer: torch.optim.Optimizer
    train: TrainSpec

    def __post_init__(self) -> None:
        self._parts = PartOptimizer(self.train, torch.float32)
        for slot in self.slots:
            if not slot.balances:
                moments = {n: torch.zeros_like(slot.gradient) for n in state_names(self.train)}
                count = {"step": torch.tensor(0.0)} if self.train.optimizer == "adamw" else {}
                self.optimizer.state[slot.master] = {**count, **moments}

    def run(
        self, update: int, lr: float, factor: float, balance: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Update `update`, counted from 1: gradients times `factor`. `balance(master, gradient)` moves a
        router's bias."""
        for slot in self.slots:
            wide = slot.master.float()
            if slot.balances:
                balance(wide, slot.gradient)
            else:
                if factor != 1:
                    slot.gradient.mul_(factor)
                state = self.optimizer.state[slot.master]
                moments = {n: state[n] for n in state_names(self.train)}
                self._parts.step((wide, slot.gradient, moments), slot.decays, update - 1, lr)
                if "step" in state:
                    state["step"] += 1
            for part, near in self.rounding(slot, wide, update):
                slot.master[part] = near

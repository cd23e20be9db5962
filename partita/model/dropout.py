"""Dropout whose masks are pure functions of (seed, step, sample, site, element).

A rank draws the mask of the box it holds: under tp the masks of heads differ and those of the residual
stream agree, under sp each rank draws its own positions, and a replay draws the same again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partita.comm.seeds import dropout_box
from partita.spec.layout import Box


@dataclass(frozen=True)
class Dropout:
    """One site. `box` is the part of a sample's `shape` that this rank holds."""

    seed: int
    site: str
    probability: float
    shape: tuple[int, ...]
    box: Box

    def mask(self, step: int, samples: Tensor) -> Tensor:
        """bool [batch, *box], True where an element stays."""
        return dropout_box(
            self.seed, step, self.site, samples, shape=self.shape, box=self.box, p=self.probability
        )

    def __call__(self, x: Tensor, step: int, batch: Any) -> Tensor:
        """x with elements dropped, the others scaled by 1 / (1 - p); keeps the mask."""
        return x * self.mask(step, batch.samples) * (1.0 / (1.0 - self.probability))

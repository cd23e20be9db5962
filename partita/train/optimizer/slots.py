"""What an optimizer updates on a rank: tensors of a unit's weights that are updated alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BALANCE_BIAS = (
    ".router.balance_bias"  # end of its name: moved by the rows of its experts, not by an optimizer
)


@dataclass(frozen=True)
class Slot:
    """One tensor of the optimizer: of a unit's weights a run that all decay, or all do not, as far as
    this rank stores it. `start`: where it lies in what is stored of the `unit`. `weights`: full names."""

    name: str
    start: int
    master: Tensor
    gradient: Tensor
    decays: bool
    weights: tuple[str, ...]
    unit: str

    @property
    def part(self) -> slice:
        """Its elements of what is stored of the unit."""
        return slice(self.start, self.start + self.master.numel())

    @property
    def balances(self) -> bool:
        """Whether it is a router's bias, which no optimizer moves."""
        return self.name.endswith(BALANCE_BIAS)


def slots_of(unit: Any) -> Iterator[Slot]:
    """The unit's weights, joined as long as they are updated alike; of each run what this rank updates."""
    runs: list[list[tuple[str, int, int]]] = []
    for place in unit.places:
        if not runs or _kind(runs[-1][-1][0]) != _kind(place[0]):
            runs.append([])
        runs[-1].append(place)
    for run in runs:
        first, end = run[0][1] - unit.part.start, run[-1][1] + run[-1][2] - unit.part.start
        first, end = max(first, 0), min(end, unit.master.numel())
        if first < end:
            names = tuple(name for name, *_ in run)
            part, decays = slice(first, end), decays_weight(names[0])
            yield Slot(
                names[0], first, unit.master[part], unit.gradient[part], decays, names, unit.name
            )


def _kind(name: str) -> tuple[bool, bool]:
    return decays_weight(name), name.endswith(BALANCE_BIAS)


def decays_weight(name: str) -> bool:
    """Decay acts on matrices and tables; not on biases and norms, those of heads and latents among them."""
    return not name.endswith(("_bias", "norm"))

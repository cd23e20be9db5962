"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, sec. 3.2; torch.amp.GradScaler's rule).

Backward starts from S instead of 1, so that small gradients do not fall under fp16's 6e-8; gradients are
divided by S before they are used. S is a power of two: scaling changes no digit.

    a gradient is not finite    the update is skipped on every rank, S halves
    GROWTH_INTERVAL good steps  S doubles

Sends nothing of its own: ranks agree through the gradient norm, which is summed over every axis that
holds gradients; one inf anywhere makes it infinite everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GROWTH_INTERVAL = 2000
START = 2.0**16
LEAST, MOST = 1.0, 2.0**24


@dataclass
class LossScaler:
    """The scale S, the good steps since it last changed, and the updates skipped so far."""

    scale: float = START
    good_steps: int = 0
    skipped: int = 0

    def step(self, norm: float) -> bool:
        """Told the scaled gradients' norm; whether the update is to be made."""
        if not math.isfinite(norm):
            self.scale, self.good_steps = max(self.scale / 2, LEAST), 0
            self.skipped += 1
            return False
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = min(self.scale * 2, MOST), 0
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps, "skipped": self.skipped}

    def restore(self, state: dict[str, float]) -> None:
        """Puts the scaler where `state` was taken."""
        self.scale = float(state["scale"])
        self.good_steps, self.skipped = int(state["good_steps"]), int(state["skipped"])

"""The sums of a step that belong to no block: counted targets, the loss, the norm, what routers chose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from partita.base.errors import NonFiniteError
from partita.comm.context import Context
from partita.comm.protocol import Comm
from partita.parallel.laid import Laid

NO_TARGETS = -math.inf  # stands for the mean over none: no sum of token losses is negative


def mean_loss(total: float, step: int) -> float:
    """The loss of a step (counted from 0) from the sum over ranks; 0 of no targets. Raises NonFiniteError."""
    if total == NO_TARGETS:
        return 0.0
    if not math.isfinite(total):
        raise NonFiniteError(f"the loss of step {step + 1} is {total}")
    return total


@dataclass(frozen=True)
class StepComms:
    """The Comms of the step's own sums; None where nothing moves."""

    count: Comm | None
    loss: Comm | None
    broadcast: Comm | None
    norm: Comm | None
    routing: Comm | None = None
    known: Comm | None = None


def step_comms(laid: Laid, context: Context) -> StepComms:
    """Finds them by site in the laid program: no other collective can be chosen."""
    found = {op.name: context.comm(*op.axes, lane=op.lane) for op in laid.program.step}
    return StepComms(
        found.get("step.count:reduce_from"),
        found.get("step.loss:reduce_from"),
        found.get("step.loss:broadcast"),
        found.get("step.norm:reduce_from"),
        found.get("step.routing:reduce_from"),
        found.get("step.known:hand_on"),
    )

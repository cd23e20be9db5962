"""A Span is a stretch of time on one lane of one rank, predicted or measured: both look alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """What one lane of one rank did from `start_s` to `end_s` (seconds since the step began).

    `kind` is F, B, I, W, U, step, wait, comm, data, checkpoint or eval. `lane` is compute, tp, dp,
    pp_up, pp_down, ep or host. `stage` and `microbatch` are -1 where they do not apply.
    """

    rank: int
    lane: str
    kind: str
    name: str
    start_s: float
    end_s: float
    stage: int = -1
    microbatch: int = -1
    step: int = 0

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s

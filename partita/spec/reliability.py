"""How devices fail and how evenly they run: the optional tables of a cluster file.

[reliability]                       [jitter]
device_mtbf_s = 1.6e8               compute = 0.02
restart_s = 600                     rank = 0.01
checkpoint_bytes_per_s = 2e9        slow_fraction = 0.0005
                                    slow_factor = 1.15
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.base.errors import UsageError


@dataclass(frozen=True, slots=True)
class Reliability:
    """Failures of devices, each alone and without memory (exponential), and what one costs.

    `device_mtbf_s`: mean seconds between failures of one device. `restart_s`: from a failure to the first
    step again, reading the checkpoint included. `checkpoint_bytes_per_s`: what a rank writes, all at once;
    `write_behind`: while the run goes on, which stands still for the copy to the host alone.
    """

    device_mtbf_s: float
    restart_s: float = 0.0
    checkpoint_bytes_per_s: float = 1e9
    write_behind: bool = True

    def __post_init__(self) -> None:
        _positive("device_mtbf_s", self.device_mtbf_s)
        _positive("checkpoint_bytes_per_s", self.checkpoint_bytes_per_s)
        if self.restart_s < 0:
            raise UsageError(f"{self.restart_s} is below 0", key="restart_s")


@dataclass(frozen=True, slots=True)
class Jitter:
    """How unevenly ranks compute. `compute`: the standard deviation of the logarithm of an action's time,
    drawn anew for every action and rank; `rank`: the same of a rank's own pace, which stays. A share
    `slow_fraction` of the ranks takes `slow_factor` times as long."""

    compute: float = 0.0
    rank: float = 0.0
    slow_fraction: float = 0.0
    slow_factor: float = 1.0

    def __post_init__(self) -> None:
        for key in ("compute", "rank"):
            if not 0 <= getattr(self, key) <= 2:
                raise UsageError(f"{getattr(self, key)} is not within 0..2", key=key)
        if not 0 <= self.slow_fraction <= 1:
            raise UsageError(f"{self.slow_fraction} is not within 0..1", key="slow_fraction")
        if self.slow_factor < 1:
            raise UsageError(f"{self.slow_factor} is below 1", key="slow_factor")


def _positive(key: str, value: float) -> None:
    if not value > 0:
        raise UsageError(f"{value} is not above 0", key=key)

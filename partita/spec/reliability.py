"""How devices fail and how evenly they run: the optional tables of a cluster file.

[reliability]                       [jitter]
device_mtbf_s = 1.6e8               compute = 0.02
restart_s = 600                     rank = 0.01
checkpoint_bytes_per_s = 2e9        slow_fraction = 0.0005
                                    slow_factor = 1.15
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.base.errors import raise_all


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
        rates = {key: getattr(self, key) for key in ("device_mtbf_s", "checkpoint_bytes_per_s")}
        wrong = [(key, f"{value} is not above 0") for key, value in rates.items() if not value > 0]
        if self.restart_s < 0:
            wrong.append(("restart_s", f"{self.restart_s} is below 0"))
        raise_all(wrong)


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
        most = {"compute": 2, "rank": 2, "slow_fraction": 1}
        stated = [(key, getattr(self, key), top) for key, top in most.items()]
        wrong = [(k, f"{v} is not within 0..{top}") for k, v, top in stated if not 0 <= v <= top]
        if self.slow_factor < 1:
            wrong.append(("slow_factor", f"{self.slow_factor} is below 1"))
        raise_all(wrong)

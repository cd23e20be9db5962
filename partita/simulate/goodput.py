"""What of a long run's time is work: failures, checkpoints and restarts.

Failures come without memory, `mtbf_s` apart on average for the whole job (a device's over the devices that
run). Every `interval_s` of work the run stands still for `checkpoint_s`; the checkpoint is safe `behind_s`
later, while the run goes on. A failure throws away what came after the last safe one and costs `restart_s`,
in which it may fail again. With M, tau, delta, W, R for these (Daly 2006, where W is 0):

    wall / work = M e^((R+W)/M) (e^((tau+delta)/M) - 1) / tau    exact; goodput is its inverse
    tau         = sqrt(2 delta M)                                Young 1974
                = sqrt(2 delta M) (1 + sqrt(x)/3 + x/9) - delta  Daly's, x = delta/2M; M where delta >= 2M

`played` draws failure by failure instead.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from math import exp, expm1, inf, isinf, log, log1p, sqrt
from typing import Any

from partita.spec.cluster import Cluster

FAILURES = 4000  # drawn for the simulated share
RUNS = 200  # of the job's own length
DRAWN = 1_000_000  # failures of all of those runs together, and a tenth of it of one, at most
OFTEN = 6.0  # restarts longer than so many times M fail hundreds of times each
SEED = 0


@dataclass(frozen=True)
class Faults:
    """M, delta, R and W of the module's formulas."""

    mtbf_s: float
    checkpoint_s: float
    restart_s: float
    behind_s: float = 0.0

    def safe(self, up_s: float, interval_s: float) -> float:
        """Seconds of work that a failure after so long leaves: whole intervals whose checkpoint is safe."""
        return max((up_s - self.behind_s) // (interval_s + self.checkpoint_s), 0.0) * interval_s


def young(f: Faults) -> float:
    """Seconds of work between checkpoints, to first order."""
    return sqrt(2 * f.checkpoint_s * f.mtbf_s)


def daly(f: Faults) -> float:
    """The same to higher order."""
    if f.checkpoint_s >= 2 * f.mtbf_s:
        return f.mtbf_s
    x = f.checkpoint_s / (2 * f.mtbf_s)
    return young(f) * (1 + sqrt(x) / 3 + x / 9) - f.checkpoint_s


def goodput(f: Faults, interval_s: float) -> float:
    """Work over wall time, in closed form."""
    exponent, lost = (interval_s + f.checkpoint_s) / f.mtbf_s, (f.restart_s + f.behind_s) / f.mtbf_s
    if exponent + lost > 700:
        return 0.0  # below what a float holds
    return interval_s / (f.mtbf_s * exp(lost) * expm1(exponent))


def played(f: Faults, interval_s: float, failures: int = FAILURES, seed: int = SEED) -> float:
    """Work over wall time of a run of so many failures, each drawn."""
    draw = random.Random(seed)
    work = wall = 0.0
    for _ in range(failures):
        up, down = _life(f, draw)
        work += f.safe(up, interval_s)
        wall += up + down
    return work / wall


def wall_seconds(f: Faults, interval_s: float, work_s: float, draw: random.Random) -> float:
    """Wall time of one run of `work_s` seconds of work; its last checkpoint is the result."""
    left, wall = work_s, 0.0
    while not isinf(wall):
        whole, rest = divmod(left, interval_s)
        needed = left + f.checkpoint_s * (whole + (rest > 0)) + f.behind_s
        up, down = _life(f, draw)
        if up >= needed:
            return wall + needed
        left -= min(f.safe(up, interval_s), left)
        wall += up + down
    return wall


def failures_of(f: Faults, interval_s: float, work_s: float) -> float:
    """Failures that a run of so much work sees, on average; inf where goodput is below what a float holds."""
    share = goodput(f, interval_s)
    return work_s / share / f.mtbf_s * exp(-f.restart_s / f.mtbf_s) if share else inf


def _life(f: Faults, draw: random.Random) -> tuple[float, float]:
    """Seconds up until the next failure, and down until work goes on. Of a restart that fails hundreds of
    times their number is drawn, and each takes the mean of those that fail."""
    up, down = draw.expovariate(1 / f.mtbf_s), 0.0
    held = f.restart_s / f.mtbf_s
    if held > OFTEN:
        succeeds = exp(-held)
        tries = log(1 - draw.random()) / log1p(-succeeds) // 1 if succeeds else inf
        return up, f.restart_s + tries * (f.mtbf_s - f.restart_s * succeeds / (1 - succeeds))
    while (again := draw.expovariate(1 / f.mtbf_s)) < f.restart_s:
        down += again
    return up, down + f.restart_s


def outlook(
    cluster: Cluster, devices: int, saved_bytes: int, step_s: float, steps: tuple[int, int]
) -> dict[str, Any]:
    """The answer's `goodput` on a cluster that says how it fails. `saved_bytes`: what the fullest rank
    writes. `steps`: of the run, and between checkpoints (0: at Daly's interval, the last one written)."""
    r = cluster.reliability
    assert r is not None
    stands, behind = saved_bytes / r.checkpoint_bytes_per_s, 0.0
    if r.write_behind:
        stands, behind = saved_bytes / cluster.host_link, stands
    f = Faults(r.device_mtbf_s / devices, stands, r.restart_s, behind)
    best = max(daly(f), behind, step_s)
    interval = steps[1] * step_s or best
    draw, work = random.Random(SEED), steps[0] * step_s
    each = failures_of(f, min(interval, work), work)
    runs = min(RUNS, max(int(DRAWN / max(each, 1.0)), 10))
    never = each > DRAWN / 10
    walls = [inf if never else wall_seconds(f, interval, work, draw) for _ in range(runs)]
    walls.sort()
    return asdict(f) | {
        "interval_s": interval,
        "goodput": goodput(f, interval),
        "young_interval_s": young(f),
        "daly_interval_s": daly(f),
        "best_goodput": goodput(f, best),
        "simulated": {
            "seed": SEED,
            "failures": FAILURES,
            "goodput": played(f, interval),
            "runs": runs,
            "run_s": {
                "mean": sum(walls) / runs,
                "p50": walls[runs // 2],
                "p90": walls[runs * 9 // 10],
            },
        },
    }

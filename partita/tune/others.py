"""What else a machine does: cores that other work takes while this process sleeps. A measurement beside it
says less of a plan than of the neighbours.

Linux counts it (/proc/stat): time in which a processor ran anybody's work, or a hypervisor lent it to another
machine. Elsewhere nothing is known, and nothing is said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

LISTENS_S = 0.4
QUIET = 0.2  # cores: what a desktop, or a daemon, takes now and then
STAT = Path("/proc/stat")
IDLE = (3, 4)  # of its columns: idle, waiting for a disk
OWN = 8  # columns that add up: user nice system idle iowait irq softirq steal


def ticks_worked(stat: Path = STAT) -> int | None:
    """Ticks of all processors that were not idle, since the machine started; None where nobody counts."""
    try:
        words = stat.read_text(encoding="ascii").splitlines()[0].split()
        columns = [int(x) for x in words[1 : 1 + OWN]]
    except (OSError, ValueError, IndexError):
        return None
    return sum(x for i, x in enumerate(columns) if i not in IDLE)


def cores_taken(
    seconds: float = LISTENS_S,
    worked: Callable[[], int | None] = ticks_worked,
    sleep: Callable[[float], None] = time.sleep,
) -> float | None:
    """Cores that others keep busy while this process sleeps; None where nobody counts."""
    start, before = time.perf_counter(), worked()
    sleep(seconds)
    took, after = time.perf_counter() - start, worked()
    if before is None or after is None:
        return None
    return (after - before) / os.sysconf("SC_CLK_TCK") / max(took, seconds)


def busy_machine(most: float) -> str:
    """A sentence where other work took `most` cores; '' where that is little."""
    if most <= QUIET:
        return ""
    return (
        f"this machine was busy: other work took {most:.1f} of its {os.cpu_count()} cores between the runs; "
        "what was measured is longer by that, and so are predictions that learn from it: measure again alone"
    )

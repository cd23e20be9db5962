"""Whether the kernel's out-of-memory killer has struck: what it counts, before and after.

cgroup v2    memory.events       oom_kill N    memory.max               of the group and those above it
cgroup v1    memory.oom_control  oom_kill N    memory.limit_in_bytes
the host     /proc/vmstat        oom_kill N                             whomever it has killed
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from partita.base.units import format_bytes

OWN, MOUNTS, HOST = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/vmstat")
COUNTS = ("memory.events", "memory.oom_control")
LIMITS = ("memory.max", "memory.limit_in_bytes")
NO_LIMIT = 1 << 60  # what v1 writes for none is about 2^63
STRUCK = "was killed by the out-of-memory killer (SIGKILL)"
HOST_STRUCK = "was killed by SIGKILL (9), as the host's out-of-memory killer struck,"


def own_group(own: Path = OWN, mounts: Path = MOUNTS) -> Path | None:
    """The folder of the cgroup that this process's memory is counted in; None where there is none."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            v1 = "memory" in kinds.split(",")
            for root in (
                [mounts / "memory"] if v1 else [] if kinds else [mounts, mounts / "unified"]
            ):
                # A container may see its own group as the root
                for folder in (root / path.lstrip("/"), root):
                    if any((folder / name).exists() for name in COUNTS):
                        return folder
    return None


@dataclass(frozen=True)
class Killed:
    """How many processes the killer had killed of a group, and of the host."""

    group: Path | None
    of_group: int
    of_host: int

    @staticmethod
    def now(group: Path | None, host: Path = HOST) -> Killed:
        """What is counted by now."""
        counts = [] if group is None else [_count(group / name) for name in COUNTS]
        return Killed(group, max(counts, default=0), _count(host))

    def since(self, host: Path = HOST) -> str:
        """How a process ended that was killed since then: empty where the killer has not struck."""
        now = Killed.now(self.group, host)
        if now.of_group > self.of_group:
            return STRUCK
        return HOST_STRUCK if now.of_host > self.of_host else ""

    @property
    def limit_bytes(self) -> int | None:
        """The least that the group, and those above it, may use."""
        found: list[int] = []
        folder = self.group
        while folder is not None and any((folder / name).exists() for name in COUNTS):
            for name in LIMITS:
                with suppress(OSError, ValueError):  # `max`
                    found.append(int((folder / name).read_text()))
            folder = folder.parent
        least = min(found, default=NO_LIMIT)
        return least if least < NO_LIMIT else None


def advice(killed: Killed, ranks: int, planned_bytes: int) -> str:
    """The plan's estimate beside the limit, and what to do."""
    limit, parts = killed.limit_bytes, []
    if planned_bytes:
        parts.append(f"the plan expects {format_bytes(planned_bytes)} on each of {ranks} ranks")
    if limit is not None:
        parts.append(f"{killed.group} allows {format_bytes(limit)}")
    then = "give it more memory, or take a plan that holds less (recompute, ZeRO, smaller microbatches)"
    if limit is not None:
        then += f"; `partita plan` finds them with cluster.memory_bytes={limit // ranks}"
    return f": {'; '.join([*parts, then])}"


def _count(path: Path) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return 0

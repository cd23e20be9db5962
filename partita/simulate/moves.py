"""Seconds of copies between arenas: the device and its host, the host and its disk.

    update on the host, streamed        max(states through host memory, gradient down + working up, disk)
    gradients to an update elsewhere    through host memory for the norm, then max(link, disk)

The three run side by side, chunk by chunk. A host's memory and disk are shared by the ranks of its node.
Rates that a cluster does not state are those of its device's bus and [assumed] ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from partita.cost.machine import Machine
from partita.parallel.read import Call
from partita.parallel.room import ARENAS

HOST_MEMORY_BYTES_PER_S = (
    300e9  # [assumed] of a node with accelerators: two sockets of eight DDR4-3200
)
DISK_BYTES_PER_S = {
    "CPU": 1e9,
    "": 14e9,
}  # [assumed] of a node: one SATA-to-NVMe disk; four NVMe disks
STATE_PASSES = 2  # read and written


def is_move(call: Call) -> bool:
    """Whether a call is a copy between arenas."""
    return call.axes[0] in ARENAS


def move_seconds(call: Call, machine: Machine) -> float:
    """Seconds of one copy, with the link or a rank's share of the disk to itself."""
    return call.bytes / rate(call.axes[0], machine)


def rate(axis: str, machine: Machine) -> float:
    """Bytes a second of a rank between device and host, or host and disk."""
    cluster = machine.cluster
    if axis == "host":
        copies = machine.class_ == "CPU" and cluster.host_link_bytes_per_s is None
        return cluster.memory_bytes_per_s / 2 if copies else cluster.host_link
    known = DISK_BYTES_PER_S.get(machine.class_, DISK_BYTES_PER_S[""])
    return (cluster.disk_bytes_per_s or known) / cluster.devices_per_node


def host_memory_rate(machine: Machine) -> float:
    """Bytes a second that a rank's update moves through host memory."""
    if machine.class_ == "CPU":
        return machine.cluster.memory_bytes_per_s
    return HOST_MEMORY_BYTES_PER_S / machine.cluster.devices_per_node


def update_away(
    away: Mapping[str, int], once: Mapping[Call, int], machine: Machine
) -> dict[str, float]:
    """Seconds of an update on the host by cause: 'optimizer', what passes through host memory; then what
    the slower of link and disk takes beyond that, by its axis. `away`: bytes of states elsewhere; `once`:
    how often the step's calls are made. Where the device updates, its copies, behind the norm of gradients
    that lie elsewhere."""
    found: dict[str, float] = defaultdict(float)
    down = 0
    for call in filter(is_move, once):
        found[call.axes[0]] += once[call] * call.times * move_seconds(call, machine)
        down += once[call] * call.bytes if call.axes == ("host",) else 0
    axis = max(found, key=lambda a: found[a], default="")
    if not away.get("optimizer"):
        if not found:
            return {}
        return {
            "optimizer": away.get("gradients", 0) / host_memory_rate(machine),
            axis: found[axis],
        }
    compute = (STATE_PASSES * away["optimizer"] + 2 * down) / host_memory_rate(machine)
    beyond = {axis: max(found[axis] - compute, 0.0)} if found else {}
    return {"optimizer": compute, **beyond}

"""Stages on unequal devices: what the ranks of a place of pp have, and what they reach.

Ranks of one place go at one pace, the weakest device's among them; another place may lie on other nodes. So
a plan without a pipeline goes at the pace of the slowest device, and one with a pipeline may give the stages
on quicker devices more layers (`pipeline.split`).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from partita.cost.machine import Machine
from partita.parallel.laid import Laid
from partita.spec.cluster import Cluster
from partita.spec.mesh import Mesh
from partita.spec.unequal import groups_of, is_unequal, weakest_of


def machine_at(laid: Laid, places: Iterable[int], machine: Machine) -> Machine:
    """What a stage on these places of pp runs on; the machine itself where all devices are alike."""
    if not is_unequal(machine.cluster):
        return machine
    return machine.of_nodes(_groups(laid, tuple(places), machine.cluster))


def limits(laid: Laid, cluster: Cluster) -> tuple[int, ...]:
    """Bytes that a rank may hold, for each place of pp."""
    pp = laid.sizes["pp"]
    if not is_unequal(cluster):
        return (cluster.memory_limit_bytes,) * pp
    parts = (weakest_of(cluster, _groups(laid, (place,), cluster)) for place in range(pp))
    return tuple(part.memory_limit_bytes for part in parts)


def peak_flops(laid: Laid, cluster: Cluster, dtype: str) -> float:
    """FLOP/s of all devices that a plan uses, by their published peaks."""
    world = laid.mesh.world_size
    if not is_unequal(cluster):
        return cluster.units(world) * cluster.peak(dtype)
    found, left = 0.0, world
    for i, group in enumerate(cluster.nodes):
        ranks = min(left, group.count * group.devices)
        found, left = found + ranks * weakest_of(cluster, frozenset({i})).peak(dtype), left - ranks
    return found


def _groups(laid: Laid, places: tuple[int, ...], cluster: Cluster) -> frozenset[int]:
    sizes = tuple(sorted(laid.mesh.sizes.items()))
    devices = tuple(n.count * n.devices for n in cluster.nodes)
    return _groups_of(sizes, laid.mesh.order, places, devices)


@lru_cache(maxsize=1024)
def _groups_of(
    sizes: tuple[tuple[str, int], ...], order: tuple[str, ...], places: tuple[int, ...],
    devices: tuple[int, ...],
) -> frozenset[int]:  # fmt: skip
    mesh = Mesh(dict(sizes), order)
    at = (rank for rank in range(mesh.world_size) if mesh.coords(rank)["pp"] in places)
    return groups_of(devices, at)

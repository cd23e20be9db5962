"""Clusters whose nodes differ: what the devices of some of the nodes are, and the cluster with the weakest
device everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import accumulate

from partita.spec.cluster import Cluster, NodeGroup


def is_unequal(cluster: Cluster) -> bool:
    """Whether its nodes have different devices."""
    return any(_device(n) != _device(cluster.nodes[0]) for n in cluster.nodes)


def _device(group: NodeGroup) -> tuple[object, ...]:
    rates = tuple(sorted(group.peak_flops.items()))
    return group.device, group.memory_bytes, group.memory_bytes_per_s, rates


def groups_of(devices: Iterable[int], ranks: Iterable[int]) -> frozenset[int]:
    """The places in `nodes` of the groups that these ranks lie on; each group has so many devices."""
    ends = list(accumulate(devices))
    return frozenset(next(i for i, end in enumerate(ends) if rank < end) for rank in ranks)


def weakest_of(cluster: Cluster, groups: frozenset[int]) -> Cluster:
    """The cluster with the memory and the rates of the weakest device of some groups of nodes: what ranks
    there that go at one pace have. What the file states for all devices stays."""
    nodes = [cluster.nodes[i] for i in sorted(groups)]
    weakest = min(nodes, key=lambda n: max(n.peak_flops.values()))
    memory = min(n.memory_bytes for n in cluster.nodes)
    speed = min(n.memory_bytes_per_s for n in cluster.nodes)
    own_memory = min(n.memory_bytes for n in nodes)
    own_speed = min(n.memory_bytes_per_s for n in nodes)
    everywhere = weakest_peaks(cluster.nodes)
    stated = {k: v for k, v in cluster.peak_flops.items() if everywhere.get(k) != v}
    return replace(
        cluster,
        device=weakest.device,
        memory_bytes=own_memory if cluster.memory_bytes == memory else cluster.memory_bytes,
        memory_bytes_per_s=own_speed
        if cluster.memory_bytes_per_s == speed
        else cluster.memory_bytes_per_s,
        peak_flops={**weakest_peaks(nodes), **stated},
    )


def weakest_peaks(nodes: Iterable[NodeGroup]) -> dict[str, float]:
    """For each precision that all nodes have, the lowest rate."""
    every: list[Mapping[str, float]] = [n.peak_flops for n in nodes]
    names = set[str].intersection(*(set(peaks) for peaks in every))
    return {name: min(peaks[name] for peaks in every) for name in sorted(names)}


def levelled(cluster: Cluster) -> Cluster:
    """The cluster with the weakest device in every node, where its nodes differ: its links, its number of
    devices and their places are the same."""
    if not is_unequal(cluster):
        return cluster
    weakest = min(cluster.nodes, key=lambda n: max(n.peak_flops.values()))
    alike = NodeGroup(
        1, weakest.device, 1, cluster.memory_bytes, cluster.memory_bytes_per_s, cluster.peak_flops
    )
    nodes = tuple(replace(alike, count=n.count, devices=n.devices) for n in cluster.nodes)
    return replace(cluster, nodes=nodes)

"""Where a collective's ranks lie: how many on a node, on how many nodes, over which links.

Every group over an axis is alike where the mesh tiles the nodes, so the group of rank 0 stands for all. Where
it does not (tp 3 on nodes of 8), the group that lies on most nodes does: a step waits for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product

from partita.cost.comm import AlphaBeta, Group
from partita.cost.machine import Machine, device_class
from partita.parallel.laid import Laid
from partita.parallel.room import ACROSS
from partita.spec.cluster import Cluster, Wiring
from partita.spec.hardware import MESHES, SHARED_CHUNK_BYTES, share_of_links
from partita.spec.mesh import FOLD, Mesh
from partita.spec.plan import AxisSizes


def group_of(laid: Laid, axes: tuple[str, ...], cluster: Cluster) -> tuple[int, ...]:
    """The group over a product of axes that stands for all: rank 0's, or the one on most nodes. 'tied' and
    'pp/copy' are the places of pp that hold one weight, 'tp/share' the tp ranks that hold one kv head."""
    for name in ACROSS:
        if name in axes:
            return tuple(laid.mesh.rank_of({"pp": place}) for place in laid.pairs[name][0])
    mesh, kv_heads = laid.mesh, laid.request.model.kv_heads
    sizes = laid.sizes if isinstance(laid.sizes, AxisSizes) else AxisSizes(laid.sizes)
    return _slowest(sizes, mesh.order, axes, kv_heads, cluster.wiring)


def moves(laid: Laid, cluster: Cluster | None, axes: tuple[str, ...], size: int) -> bool:
    """Whether a collective over axes that is handed `size` bytes, and only started, moves under compute: of
    CPU ranks, through the memory of their host, no more than a chunk does (Comm.moves)."""
    if cluster is None or device_class(cluster.device) != "CPU" or size <= SHARED_CHUNK_BYTES:
        return True
    return len({cluster.node_of(rank) for rank in group_of(laid, axes, cluster)}) > 1


@lru_cache(maxsize=4096)
def _slowest(
    sizes: AxisSizes, order: tuple[str, ...], axes: tuple[str, ...], kv_heads: int, wiring: Wiring
) -> tuple[int, ...]:
    first, cluster = _ranks(Mesh(sizes, order), axes, kv_heads), wiring.cluster
    node = cluster.node_of
    if len(first) == 1 or cluster.num_nodes == 1:
        return first
    shifts = _shifts(sizes, order, axes, cluster.devices_per_node)
    groups = (tuple(r + shift for r in first) for shift in shifts)
    return max(groups, key=lambda ranks: len({node(r) for r in ranks}))


def _shifts(
    sizes: AxisSizes, order: tuple[str, ...], axes: tuple[str, ...], per_node: int
) -> tuple[int, ...]:
    """By how much other groups lie behind rank 0's, one for each place in a node where they may begin. Of
    experts' groups those that the axes around the refolded ones make."""
    own = {axis.partition("/")[0] for axis in axes}
    if own & {"efsdp", "ep", "etp"}:
        own |= set(FOLD)
    mesh = Mesh(sizes, order)
    found = {0: 0}  # by place in a node
    for axis in (a for a in order if a not in own and sizes[a] > 1):
        stride = mesh.rank_of({axis: 1})
        steps = range(min(sizes[axis], per_node))
        found = {
            (shift + stride * i) % per_node: shift + stride * i
            for shift in reversed(found.values())
            for i in reversed(steps)
        }
    return tuple(sorted(found.values()))


def _ranks(mesh: Mesh, axes: tuple[str, ...], kv_heads: int) -> tuple[int, ...]:
    sizes = mesh.sizes
    ranges: dict[str, list[int]] = {}
    for axis in axes:
        if axis == "tp/share":
            ranges["tp"] = list(range(sizes["tp"] // kv_heads))
        else:
            ranges[axis] = list(range(sizes[axis]))
    found = {
        mesh.rank_of(_dense(dict(zip(ranges, at, strict=True)), sizes))
        for at in product(*ranges.values())
    }
    return tuple(sorted(found))


def _dense(at: dict[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Coordinates of the experts' view in the dense one: etp innermost of the refolded ranks."""
    if not at.keys() & {"efsdp", "ep", "etp"}:
        return at
    inner = (at.pop("efsdp", 0) * sizes["ep"] + at.pop("ep", 0)) * sizes["etp"] + at.pop("etp", 0)
    for axis in reversed(FOLD):
        inner, at[axis] = divmod(inner, sizes[axis])
    return at


def place(ranks: tuple[int, ...], machine: Machine) -> Group:
    """The group on the cluster's links, at the rates that programs reach. Devices that one inner link
    joins count as a node."""
    return _place(ranks, machine.cluster.wiring, machine.constants.inner, machine.constants.outer)


@lru_cache(maxsize=4096)
def _place(ranks: tuple[int, ...], wiring: Wiring, inner: float, outer: float) -> Group:
    cluster = wiring.cluster
    if not cluster.links:
        alone = AlphaBeta(0.0, cluster.memory_bytes_per_s)
        return Group(len(ranks), 1, alone, alone)
    first, across = cluster.links[0], cluster.link_for(ranks)
    if cluster.device in MESHES:
        inner *= _share(ranks, cluster)
    near = AlphaBeta(first.latency_s, first.bytes_per_s * inner, first.reduces)
    far = AlphaBeta(across.latency_s, across.bytes_per_s * outer, across.reduces)
    if first.devices == cluster.devices_per_node:
        nodes = Counter(cluster.node_of(r) for r in ranks)
    else:
        nodes = Counter(r // first.devices for r in ranks)
    if len(nodes) == 1:
        return Group(len(ranks), 1, near, near)
    return Group(max(len(ranks) // len(nodes), 1), len(nodes), near, far)


def _share(ranks: tuple[int, ...], cluster: Cluster) -> float:
    """Of the inner link, what a node can use where that is least: no switch joins its devices."""
    by_node: dict[int, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(cluster.node_of(rank), []).append(rank % cluster.devices_per_node)
    return min(share_of_links(cluster.device, tuple(own)) for own in by_node.values())


def over_one_adapter(group: Group, per_node: int) -> Group:
    """The group's ring, where all of a node's groups leave it over one adapter, each once."""
    share = group.outer.bytes_per_s * min(1.0, group.inside / per_node)
    outer = replace(group.outer, bytes_per_s=share)
    return replace(group, inside=1, nodes=group.size, outer=outer)

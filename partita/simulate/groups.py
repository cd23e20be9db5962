"""Where a collective's ranks lie: how many on a node, on how many nodes, over which links.

Every group over an axis is alike where the mesh tiles the nodes, so the group of rank 0 stands for all.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import product

from partita.cost.comm import AlphaBeta, Group
from partita.cost.machine import Machine
from partita.parallel.laid import Laid
from partita.parallel.room import ACROSS
from partita.spec.cluster import Cluster
from partita.spec.mesh import FOLD, Mesh


def group_of(laid: Laid, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Rank 0's group over a product of axes; 'tied' and 'pp/copy' are the places of pp that hold one
    weight, 'tp/share' the tp ranks that hold the same kv head."""
    for name in ACROSS:
        if name in axes:
            return tuple(laid.mesh.rank_of({"pp": place}) for place in laid.pairs[name][0])
    return _ranks(_Sizes(laid.sizes), laid.mesh.order, axes, laid.request.model.kv_heads)


class _Sizes(dict[str, int]):
    """Axis sizes that a cache may key by."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


@lru_cache(maxsize=4096)
def _ranks(
    sizes: _Sizes, order: tuple[str, ...], axes: tuple[str, ...], kv_heads: int
) -> tuple[int, ...]:
    mesh = Mesh(sizes, order)
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


def _dense(at: dict[str, int], sizes: _Sizes) -> dict[str, int]:
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
    return _place(ranks, _Links(machine.cluster), machine.constants.inner, machine.constants.outer)


class _Links:
    """A cluster by its links, for a cache."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.key = (cluster.devices_per_node, cluster.links, cluster.device)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Links) and self.key == other.key


@lru_cache(maxsize=4096)
def _place(ranks: tuple[int, ...], links: _Links, inner: float, outer: float) -> Group:
    cluster = links.cluster
    if not cluster.links:
        alone = AlphaBeta(0.0, cluster.memory_bytes_per_s)
        return Group(len(ranks), 1, alone, alone)
    first, across = cluster.links[0], cluster.link_for(ranks)
    near = AlphaBeta(first.latency_s, first.bytes_per_s * inner, first.reduces)
    far = AlphaBeta(across.latency_s, across.bytes_per_s * outer, across.reduces)
    if first.devices == cluster.devices_per_node:
        nodes = Counter(cluster.node_of(r) for r in ranks)
    else:
        nodes = Counter(r // first.devices for r in ranks)
    if len(nodes) == 1:
        return Group(len(ranks), 1, near, near)
    return Group(max(len(ranks) // len(nodes), 1), len(nodes), near, far)

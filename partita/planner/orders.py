"""The order of axes on the links: which orders of a plan's axes are plans of their own, and links that no
order has better.

Axes of size 1 stand nowhere, and axes that one link joins may trade places: both give the same ranks the same
links. Where one link joins all devices no order differs from another.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import permutations

from partita.cost.empirical import FILL
from partita.cost.machine import Machine
from partita.spec.cluster import Cluster, Link
from partita.spec.model import ModelSpec
from partita.spec.plan import DEFAULT_ORDER, MeshPlan

Order = tuple[str, ...]


def other_orders(sizes: tuple[int, ...], cluster: Cluster) -> tuple[Order, ...]:
    """The orders, innermost first, that differ on the links from the default and from each other. `sizes`: of
    the axes as the default has them."""
    tiers = () if cluster.nodes else tuple(link.devices for link in cluster.links)
    return _others(sizes, tiers)


@lru_cache(maxsize=4096)
def _others(sizes: tuple[int, ...], tiers: tuple[int, ...]) -> tuple[Order, ...]:
    at = [i for i, size in enumerate(sizes) if size > 1]
    found: dict[object, Order] = {}
    for turned in permutations(at):
        order = list(range(len(sizes)))
        for place, axis in zip(at, turned, strict=True):
            order[place] = axis
        named = tuple(DEFAULT_ORDER[i] for i in order)
        found.setdefault(_links(turned, sizes, tiers), named)
    return tuple(found.values())[1:]


def _links(order: tuple[int, ...], sizes: tuple[int, ...], tiers: tuple[int, ...]) -> object:
    """Equal for orders whose every group crosses the same links: by axis the tiers that lie within a step
    along it, those within it all, and the step where a tier ends between. `tiers`: devices that each joins;
    empty where nodes differ."""
    found, step = [], 1
    for axis in order:
        end = step * sizes[axis]
        if not tiers or any(max(end, t) % min(end, t) for t in tiers[:-1]):
            return order  # a tier ends within a group
        below, within = (sum(t <= x for t in tiers[:-1]) for x in (step, end - 1))
        found.append((axis, below, within, step if within > below else 0))
        step = end
    return tuple(sorted(found))


def orders_of(mesh: MeshPlan, cluster: Cluster) -> tuple[Order, ...]:
    """The same of a plan's own mesh."""
    sizes = (mesh.tp * mesh.split, mesh.cp, mesh.dp_shard, mesh.dp_replicate, mesh.pp)
    return other_orders(sizes, cluster)


def another_order(mesh: MeshPlan, cluster: Cluster) -> Order | None:
    """The default order, or where a plan has that one the first that differs from it on the links."""
    if mesh.order != DEFAULT_ORDER:
        return DEFAULT_ORDER
    return next(iter(orders_of(mesh, cluster)), None)


def nearest(machine: Machine, model: ModelSpec) -> Machine:
    """The machine with one link that joins all devices, at no latency and at a rate that no group in any
    order reaches: all links at once, a ring in no need of filling, of rows that go to several experts each
    sent once."""
    c, k = machine.cluster, machine.constants
    if not c.links:
        return machine
    rate = sum(x.bytes_per_s * (k.outer / k.inner if i else 1.0) for i, x in enumerate(c.links))
    reduces = any(x.reduces for x in c.links)
    rate *= (1 + FILL) * (model.top_k if model.experts else 1)
    link = Link("nearest", c.links[-1].devices, rate, 0.0, reduces)
    return replace(machine, cluster=replace(c, links=(link,)))

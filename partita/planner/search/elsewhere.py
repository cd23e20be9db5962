"""Offload among the choices: states and activations in host memory or in files, where that can help.

    needed      nothing fits with all of it on the device
    small       at most SMALL devices: it may also buy a better plan than the best that fits without; not of
                CPU ranks, whose memory is their host's, unless the cluster states what the host has beside
    devices     the fewest are looked for

Each way to offload is a space of its own, with the bounds of bound.py over what stays on the device; a plan
of it must beat the best plans seen before. Where a host has no stated limit, files hold no more than it and
only add reads and writes to the same copies: those spaces are cut whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from partita.cost.machine import device_class
from partita.planner.search.nodes import ANY, Found, Goal
from partita.planner.search.search import Search
from partita.planner.space import Space
from partita.spec.cluster import Cluster
from partita.spec.plan import OffloadPlan, Plan

SMALL = 16
WITHOUT = 1 << 62  # bytes of a device, where its limit does not count
STATES = ("gradients", "optimizer")
TARGETS = ((), ("activations", *STATES), ("activations", *STATES, "parameters"))
NO_BETTER = "files where the host has room"


def is_always(cluster: Cluster) -> bool:
    """Whether offload is among the choices where plans fit without it."""
    own = device_class(cluster.device) != "CPU" or cluster.host_memory_bytes is not None
    return own and cluster.devices <= SMALL


def offloads(search: Search, found: Found, goal: Goal = ANY) -> Iterator[OffloadPlan]:
    """The ways to offload that are worth a search, files behind host memory; for fewer devices all are."""
    words = search.space.words
    stated = search.space.offload.to != "none"
    always = is_always(search.job.cluster) or (stated and search.job.cluster.devices <= SMALL)
    if found.plans and not always and goal.name != "devices":
        return
    for to in ("cpu", "nvme"):
        wanted = search.space.offload.to == to if stated else words.admit("offload", to)
        for targets in TARGETS if wanted else ():
            if (to, targets) != (search.space.offload.to, search.space.offload.targets):
                yield OffloadPlan(to, targets)


def ways_of(space: Space, found: Found) -> list[OffloadPlan]:
    """The space's own way to offload, and that of the best plan: what fits in the balanced split and
    the default order of axes only with more elsewhere may fit in another without."""
    best = [Plan.parse(p.plan).offload for p in found.plans[:1]]
    return list(dict.fromkeys([*best, space.offload]))


def widened(
    search: Search, goal: Goal, top: int, found: Found, budget_s: float, first: bool = False
) -> Found:
    """What was found without, and with what lies elsewhere, as one answer; where no time is left for that, it
    says so. `first`: until any plan fits."""
    end, host = time.perf_counter() + budget_s, search.job.cluster.host_memory_bytes
    for offload in offloads(search, found, goal):
        if first and found.plans:
            break
        space = search.space
        more = Search(Space(search.job, space.words, space.dtype, offload), before=search)
        if offload.to == "nvme" and host is None and search.space.offload.to == "none":
            leaves = sum(more.space.leaves(mesh) for mesh in more.space.meshes())
            found.considered += leaves
            found.rejected[NO_BETTER] += leaves
            continue
        left = end - time.perf_counter()
        there = Found(plans=found.plans, complete=False)
        if left > 0:
            there = more.best(goal, top, left, first, found.plans)
        found.join_other("offload", there)
        if left <= 0:
            break
    return found


def least_memory(search: Search, budget_s: float) -> Found:
    """The plan that needs least of a device, whatever its limit, with what may lie elsewhere there, or all on
    it: with files a device holds no less."""
    end, goal, space = time.perf_counter() + budget_s, Goal("memory"), search.space
    ways, found = list(offloads(search, Found())), Found()
    away = [way for way in ways if way.to == ways[0].to]  # most hold less than all on the device
    for offload in (*away, space.offload):
        more = Search(Space(search.job, space.words, space.dtype, offload), before=search)
        more.bounds.limit_bytes = WITHOUT
        left = max(end - time.perf_counter(), 0.0)
        found.join(more.best(goal, budget_s=left, seen=found.plans))
    return found

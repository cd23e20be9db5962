"""Ranks for a loop of one's own: `local(n)` runs a function on thread ranks, each with a Context.

    with local(4) as ranks:
        results = ranks.run(function, *args)        # function(context, *args) on every rank

Groups of such a Context are the axes of `plan` (all ranks on dp_replicate when none is given) and 'world', on
lane 'compute'; `pt.build` makes one with the groups of a job. `here` finds the ranks of whoever calls it:
threads of `local`, processes that torchrun started, else a rank alone.
"""

from __future__ import annotations

import atexit
import sys
import threading

from partita.base.errors import UsageError
from partita.comm.context import Context
from partita.comm.liveness.lifeline import Lifeline
from partita.comm.processes import torchrun_rank, torchrun_store
from partita.comm.protocol import Where, World
from partita.comm.single import SingleWorld
from partita.comm.threads.local import LocalRanks, RankThread
from partita.comm.threads.meeting import DEADLINE_S
from partita.spec.mesh import DENSE, Mesh
from partita.spec.plan import Plan


def local(size: int, plan: Plan | str = "", timeout_s: float = DEADLINE_S) -> LocalRanks[Context]:
    """`size` ranks as threads of this process. `plan` (its size must agree) names the groups that
    `context.comm(axis)` serves.

    >>> with local(2) as ranks:
    ...     ranks.run(lambda context, x: context.rank * x, 10)
    [0, 10]
    """
    if size < 1:
        raise UsageError(f"local({size}): a number of ranks is at least 1")
    laid = Plan.parse(plan) if isinstance(plan, str) else plan
    if not plan:
        laid = laid.with_("mesh", dp_replicate=size)
    if laid.world_size != size:
        raise UsageError(
            f"{laid} is a plan of {laid.world_size} ranks, local({size}) starts {size}"
        )
    return LocalRanks(size, timeout_s, lambda world: context_of(world, laid, world.where))


def context_of(world: World, plan: Plan, where: Where) -> Context:
    """A Context without a job: groups of the plan's axes and of the world, on lane 'compute'."""
    axes = [(axis,) for axis in DENSE if plan.sizes[axis] > 1]
    groups = [(a, "compute") for a in [*axes, ("world",)]]
    return Context.create(
        plan, Mesh(plan.sizes, plan.mesh.order), world, groups=groups, where=where
    )


def here(plan: Plan, timeout_s: float = DEADLINE_S, gpus: bool = False) -> tuple[World, Where]:
    """The World of the calling rank, and where it is in its step. The plan's ranks must be there; with `gpus`
    processes have one each."""
    world, where = _world(timeout_s, gpus)
    require_ranks(plan, world)
    return world, where


def require_ranks(plan: Plan, world: World) -> None:
    """Raises UsageError where the world has not as many ranks as the plan."""
    if world.size != plan.world_size:
        raise UsageError(
            f"the plan {plan} needs {plan.world_size} ranks, here are {world.size}: call it on every rank "
            f"of pt.local({plan.world_size}) or of torchrun --nproc-per-node {plan.world_size}"
        )


def _world(timeout_s: float, gpus: bool) -> tuple[World, Where]:
    thread = threading.current_thread()
    if isinstance(thread, RankThread):
        return thread.world, thread.world.where
    where = Where()
    if torchrun_rank() is None:
        return SingleWorld(), where
    from partita.comm.distributed.stores import rendezvous
    from partita.comm.distributed.torch import TorchWorld

    line = Lifeline.hold()
    roll = rendezvous(timeout_s, line)
    found = TorchWorld.from_torchrun(
        torchrun_store(), roll, timeout_s=timeout_s, where=where, gpus=gpus
    )
    atexit.register(_leave, found, line)
    return found, where


def _leave(world: World, line: Lifeline | None) -> None:
    """A loop that never closed its world ends too: gloo's threads, left to themselves, abort a process
    now and then while Python ends. After an error they may wait for a lost peer, and stay."""
    error: BaseException | None = getattr(sys, "last_value", None)
    world.close(drain=error is None)
    if error is not None and line is not None:
        line.leave(f"{type(error).__name__}: {error}".partition("\n")[0], died=True)

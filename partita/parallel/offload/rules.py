"""Offload: what lies in another arena than the device, and how it moves (ZeRO-Offload, Ren et al. 2021;
ZeRO-Infinity, Rajbhandari et al. 2021).

    offload:cpu    host memory             offload:nvme    files, read ahead and written behind

    target      lies there                 sends, each a copy on axis `host` or `disk`
    optimizer   moments and masters        step: the gradient's shard down, the working shard up; from disk
                                           every state read, and written

The update runs on the host: a parameter costs the link 4 bytes down and 2 up (bf16), not its states. Sites:
'<unit>:offload' and ':reload' between device and host, ':read' and ':write' between host and disk; each is
one move of a whole unit, however many chunks it is streamed in. What stays on the device is the working
weights and the gradients; masters are then apart from working weights at fp32 too.
"""

from __future__ import annotations

from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.room import Request, error, region
from partita.spec.plan import Plan
from partita.spec.program import Block, Event, Op, Program

ARENA = {"cpu": "host", "nvme": "disk"}
DEFAULT = ("optimizer",)
BUILT = ("optimizer",)


def targets(plan: Plan) -> tuple[str, ...]:
    """What the plan puts elsewhere."""
    return () if plan.offload.to == "none" else plan.offload.targets or DEFAULT


def arena_of(plan: Plan, target: str) -> str:
    """Where a target lies: device, host or disk."""
    return ARENA[plan.offload.to] if target in targets(plan) else "device"


def problems(job: Request) -> list[Problem]:
    """Targets without a place to go, and what cannot be updated there."""
    plan = job.plan
    to, asked = plan.offload.to, f"offload:{plan.offload.to}"
    nearest = str(plan.with_("offload", to="none", targets=()))
    found = []
    if to == "none":
        if plan.offload.targets:
            named = ",".join(plan.offload.targets)
            message = f"offload.targets={named} names no arena to go to"
            limit = "offload:cpu or offload:nvme beside it"
            found.append(
                error("offload", "arena", message, asked=named, limit=limit, nearest=nearest)
            )
        return found
    later = [t for t in targets(plan) if t not in BUILT]
    if later:
        message = f"offload of {' and '.join(later)} is not available in this version"
        limit = f"offload.targets={','.join(BUILT)}"
        near = str(plan.with_("offload", targets=()))
        found.append(error("offload", "available", message, asked=asked, limit=limit, nearest=near))
    if plan.mesh.pp > 1 and plan.pipeline.schedule.startswith("pipedream"):
        message = (
            f"{plan.pipeline.schedule} keeps versions of the masters beside the working weights"
        )
        limit = "a schedule that flushes, or offload:none"
        found.append(
            error("offload", "versions", message, asked=asked, limit=limit, nearest=nearest)
        )
    return found


def lay(job: Request, program: Program) -> Program:
    """Says where each unit's states lie, and adds the regions that move them."""
    plan = job.plan
    if not targets(plan):
        return program
    return program.map(lambda block: _lay_block(block, plan))


def _lay_block(block: Block, plan: Plan) -> Block:
    tensors, regions = dict(block.tensors), list(block.regions)
    for name, t in block.tensors.items():
        if t.role == "optimizer":
            arena = arena_of(plan, "optimizer")
            tensors[name] = replace(t, arena=arena)
            unit = name.removesuffix(".optimizer")
            regions += _update_moves(unit, arena) if arena != "device" else []
    return replace(block, tensors=tensors, regions=tuple(regions))


def _update_moves(unit: str, arena: str) -> list[Op]:
    """What an update on the host moves: the gradient's shard comes, the working one goes; and states that
    lie on disk are read and written."""
    found = []
    if arena == "disk":
        found.append(copy(unit, "read", "disk", f"{unit}.optimizer"))
    found.append(copy(unit, "offload", "host", f"{unit}.shard_gradient"))
    found.append(copy(unit, "reload", "host", f"{unit}.shard_parameter"))
    if arena == "disk":
        found.append(copy(unit, "write", "disk", f"{unit}.optimizer"))
    return found


def copy(unit: str, kind: str, axis: str, tensor: str, phase: str = "step") -> Op:
    """A move of a tensor between two arenas, on the host's lane."""
    event = Event(phase, "copy", tensor)
    return replace(region(unit, kind, (axis,), (tensor, tensor), event), lane="host")

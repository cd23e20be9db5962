"""Data parallelism: samples lie on dp_replicate and dp_shard; gradients are summed once a step.

`lay` cuts the batch. `reduce` comes after every room that cuts, since it needs each weight's gradient
axes: the weights of a block whose gradients are partial over the same axes are one flat unit, reduced by
one all-reduce a step that starts when the unit's last gradient is there. Norms under sp (dp and tp),
shared key/value heads (dp and tp/share) come out as units of their own. A tied weight is a unit of its
own: its other holder must find the same element at the same place.
"""

from __future__ import annotations

from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.read import gradient_axes
from partita.parallel.room import (
    Request,
    axis_name,
    axis_size,
    cut_everywhere,
    error,
    region,
    sum_rule,
)
from partita.spec.program import Block, Dim, Event, Op, Program, Sizes, Tensor

AXES = ("dp_replicate", "dp_shard")


def problems(job: Request) -> list[Problem]:
    """ZeRO stages are not built yet: replicated data parallelism only."""
    mesh, zero = job.plan.mesh, job.plan.data.zero_stage
    if mesh.dp_shard == 1 or zero == 0:
        return []
    message = f"ZeRO stage {zero} over dp_shard{mesh.dp_shard} is not available in this version"
    replicated = {"dp_replicate": mesh.dp_replicate * mesh.dp_shard, "dp_shard": 1}
    nearest = str(job.plan.with_("mesh", **replicated))
    asked = f"dp_shard{mesh.dp_shard}.zero{zero}"
    return [
        error(
            "dp", "zero_stage", message, asked=asked, limit="zero0 or dp_replicate", nearest=nearest
        )
    ]


def lay(job: Request, program: Program) -> Program:
    """Cuts batch. The loss is then a partial sum; it is added up once a step (laid.py)."""
    for axis in AXES:
        if job.plan.sizes[axis] > 1:
            program = program.map(
                lambda b, axis=axis: sum_rule(cut_everywhere(b, ("batch",), axis), axis)
            )
    return program


def units(
    block: Block, tied: tuple[str, ...], sizes: Sizes, kv_heads: int
) -> dict[str, tuple[tuple[str, ...], list[Tensor]]]:
    """Flat units of a block by name: the axes over which their gradients are summed, and their weights
    in program order. A tied weight's unit is named after it."""
    found: dict[str, tuple[tuple[str, ...], list[Tensor]]] = {}
    for w in block.weights():
        partial = gradient_axes(block, w, sizes)
        axes = tuple(a for a in partial if axis_size(a, sizes, kv_heads) > 1)
        name = w.name if w.name in tied else f"unit[{axis_name(axes)}]"
        found.setdefault(name, (axes, []))[1].append(w)
    return found


def reduce(job: Request, program: Program) -> Program:
    """Adds each unit's stored states, and its one all-reduce a step where its gradient is partial."""
    sizes, kv_heads = job.plan.sizes, job.model.kv_heads

    def lay_block(block: Block) -> Block:
        tensors, regions = dict(block.tensors), list(block.regions)
        for name, (axes, weights) in units(block, program.tied, sizes, kv_heads).items():
            flat = Dim("flat", sum(w.local(sizes) for w in weights))
            for role in ("parameter", "gradient", "optimizer"):
                tensors[f"{name}.{role}"] = Tensor(f"{name}.{role}", (flat,), role)
            if axes:
                regions.append(_all_reduce(name, axes))
        return replace(block, tensors=tensors, regions=tuple(regions))

    return program.map(lay_block)


def _all_reduce(unit: str, axes: tuple[str, ...]) -> Op:
    gradient = f"{unit}.gradient"
    event = Event("step", "all_reduce", gradient, gradient=True)
    return replace(region(unit, "reduce", axes, (gradient, gradient), event), lane="dp")

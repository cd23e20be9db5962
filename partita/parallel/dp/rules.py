"""Data parallelism and ZeRO (Rajbhandari et al. 2020): samples lie on dp_replicate and dp_shard.

`lay` cuts the batch. `reduce` comes after every room that cuts, since it needs each weight's gradient
axes: the weights of a block whose gradients are partial over the same axes are one flat unit, whose states
are cut over those of the axes that shard, as the stage says:

    zero   parameters   gradients   optimizer   sends
    0      whole        whole       whole       step: all_reduce of the gradient
    1      whole        whole       shard       step: reduce_scatter, all_gather of the parameters
    2      whole        shard       shard       B: reduce_scatter; step: all_gather of the parameters
    3      shard        shard       shard       F and B: all_gather (or once a step); B: reduce_scatter

`data.accumulate=whole` stores and sends the gradients of stages 2 and 3 as stage 1's.
What the shard's gradient is partial over besides (dp_replicate outside: HSDP; tp under sp; tp/share) is one
all_reduce of the shard a step. Neighbouring blocks' units are one, up to `data.bucket_bytes` of gradient
(`flats`, `Joins`). A tied weight is a unit of its own: its other holder must find the same element at the
same place. Frozen weights are units of their own, which only stage 3 cuts: they store parameters and send no
more than the gathers of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from partita.base.errors import Problem
from partita.parallel.read import BYTES, gradient_axes, replayed
from partita.parallel.room import (
    PRODUCT_ORDER,
    Request,
    axis_name,
    axis_size,
    cut_everywhere,
    region,
    sum_rule,
)
from partita.spec.plan import Plan
from partita.spec.program import Block, Dim, Event, Op, Program, Sizes, Tensor, distinct

AXES = ("dp_replicate", "dp_shard")
SHARDING = ("dp_shard", "cp", "ulysses", "efsdp")
WITHOUT_VALUES = ("lookup", "bias", "map")  # kinds of op whose backward needs no weight's values


@dataclass(frozen=True)
class Flat:
    """One flat unit of a stage. `blocks` are the places of its holders on the stage, the first owns its
    states and its step; `axes` those its gradient is partial over, `shard` those of them that cut it.
    `weights`: names of each holder's. `size`: elements on a rank before they are cut."""

    name: str  # within its block: 'unit[dp_replicate]', or a tied weight
    axes: tuple[str, ...]
    shard: tuple[str, ...]
    blocks: tuple[int, ...]
    weights: tuple[tuple[str, ...], ...]
    size: int
    frozen: bool = False


def problems(job: Request) -> list[Problem]:
    """Replicas and shards may be any number, as long as samples suffice (job_check)."""
    return []


def zero_stage(plan: Plan) -> int:
    """The stage in force: what is not cut over dp_shard is replicated."""
    return plan.data.zero_stage if plan.mesh.dp_shard > 1 else 0


def cuts_gradients(plan: Plan) -> bool:
    """Whether sharded units store gradients as shards: reduced in every microbatch, not once a step."""
    return zero_stage(plan) >= 2 and plan.data.accumulate == "shard"


def shard_axes(plan: Plan, axes: Iterable[str], frozen: bool = False) -> tuple[str, ...]:
    """Those of a gradient's axes over which its unit's states are cut; of frozen weights, which have but
    parameters, at stage 3 alone."""
    cuts = zero_stage(plan) == 3 if frozen else zero_stage(plan) > 0
    found = [a for a in axes if a in SHARDING] if cuts else []
    return tuple(sorted(found, key=PRODUCT_ORDER.index))


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
    in program order. A tied weight's unit is named after it. Frozen weights lie apart."""
    found: dict[str, tuple[tuple[str, ...], list[Tensor]]] = {}
    for w in block.weights():
        partial = gradient_axes(block, w, sizes)
        axes = tuple(a for a in partial if axis_size(a, sizes, kv_heads) > 1)
        kind = "frozen" if w.frozen else "unit"
        name = w.name if w.name in tied else f"{kind}[{axis_name(axes)}]"
        found.setdefault(name, (axes, []))[1].append(w)
    return found


def reduce(job: Request, program: Program) -> Program:
    """Adds each unit's stored states, and the regions that reduce its gradient and gather it."""
    sizes, kv_heads = job.plan.sizes, job.model.kv_heads

    def lay_block(block: Block) -> Block:
        tensors, regions = dict(block.tensors), list(block.regions)
        for name, (axes, weights) in units(block, program.tied, sizes, kv_heads).items():
            frozen = weights[0].frozen
            shard = shard_axes(job.plan, axes, frozen)
            tensors |= states(name, sum(w.local(sizes) for w in weights), shard, job.plan, frozen)
            again = needs_values(block, {w.name for w in weights})
            if frozen:
                regions += [_gather(name, shard, job.plan, again)] if shard else []
            else:
                regions += unit_regions(name, axes, shard, job.plan, again)
        return replace(block, tensors=tensors, regions=tuple(regions))

    return program.map(lay_block)


def states(
    name: str, size: int, shard: tuple[str, ...], plan: Plan, frozen: bool = False
) -> dict[str, Tensor]:
    """A unit's flat tensors: three stored states (of frozen weights the parameters alone), cut as the stage
    says, and what collectives hand in. They are padded until the shards are alike."""
    size = padded(size, shard, plan.sizes)
    stage = zero_stage(plan)
    cut = {"parameter": stage == 3}
    if not frozen:
        cut |= {"gradient": cuts_gradients(plan), "optimizer": stage >= 1}
    found = {}
    for role, is_cut in cut.items():
        flat = Dim("flat", size, shard if is_cut else ())
        found[f"{name}.{role}"] = Tensor(f"{name}.{role}", (flat,), role)
    for role in ("parameter",) if frozen else ("parameter", "gradient"):
        for part, on in (("whole", ()), ("shard", shard)):
            tensor = f"{name}.{part}_{role}"
            found[tensor] = Tensor(tensor, (Dim("flat", size, on),), f"whole_{role}")
    return found


def needs_values(block: Block, weights: set[str]) -> bool:
    """Whether the block's backward, or what it runs again, multiplies by one of the weights."""
    again = {op.name for op in replayed(block)}
    readers = [op for op in block.ops() if weights & set(op.weights)]
    return any(op.kind not in WITHOUT_VALUES or op.name in again for op in readers)


def padded(size: int, shard: tuple[str, ...], sizes: Sizes) -> int:
    """A unit's elements, filled up until its ranks divide them."""
    ways = prod(sizes[a] for a in shard)
    return -(-size // ways) * ways


def unit_regions(
    unit: str, axes: tuple[str, ...], shard: tuple[str, ...], plan: Plan, again: bool
) -> list[Op]:
    """Sites '<unit>:gather' (parameters), ':scatter' (gradient over the shards), ':reduce' (the rest).
    `again`: backward needs the parameters too."""
    other = tuple(a for a in axes if a not in shard)
    found = []
    if shard:
        found.append(_gather(unit, shard, plan, again))
        whole, part = f"{unit}.whole_gradient", f"{unit}.shard_gradient"
        phase = "B" if cuts_gradients(plan) else "step"
        event = Event(phase, "reduce_scatter", whole, gradient=True, weights=True)
        found.append(replace(region(unit, "scatter", shard, (whole, part), event), lane="dp"))
    if other:
        part = f"{unit}.shard_gradient"
        event = Event("step", "all_reduce", part, gradient=True)
        found.append(replace(region(unit, "reduce", other, (part, part), event), lane="dp"))
    return found


def _gather(unit: str, shard: tuple[str, ...], plan: Plan, again: bool) -> Op:
    """Once a step; or, at stage 3, before forward and again before a backward that needs values."""
    part = f"{unit}.shard_parameter"
    phases = ["step"]
    if zero_stage(plan) == 3 and plan.data.reshard_after_forward:
        phases = ["F", "B"] if again else ["F"]
    events = (Event(p, "all_gather", part) for p in phases)
    move = (part, f"{unit}.whole_parameter")
    return replace(region(unit, "gather", shard, move, *events), lane="dp")


def flats(
    blocks: Sequence[Block], tied: tuple[str, ...], plan: Plan, kv_heads: int
) -> tuple[Flat, ...]:
    """The flat units of a stage in the order of their first blocks. In the order backward finishes,
    blocks' units over the same axes are one, as long as its gradient has at most `bucket_bytes`; at
    stage 3, where a block's weights come and go, each block's is its own."""
    each = {id(b): _alone(b, tied, plan, kv_heads) for b, _ in distinct(blocks)}
    runs: list[list[tuple[int, Flat]]] = []
    open_: dict[str, list[tuple[int, Flat]]] = {}
    total: dict[str, int] = {}
    for at in range(len(blocks) - 1, -1, -1):
        for name, (unit, most) in each[id(blocks[at])].items():
            if name not in open_ or (name not in tied and total[name] + unit.size > most):
                open_[name], total[name] = [], 0
                runs.append(open_[name])
            open_[name].append((at, unit))
            total[name] += unit.size
    found = [_joined(run[::-1], tied) for run in runs]
    order = {key: list(mine) for key, mine in each.items()}
    return tuple(
        sorted(found, key=lambda f: (f.blocks[0], order[id(blocks[f.blocks[0]])].index(f.name)))
    )


def _alone(
    block: Block, tied: tuple[str, ...], plan: Plan, kv_heads: int
) -> dict[str, tuple[Flat, int]]:
    """A block's own units by name, each with the most elements of one that it may be a part of."""
    found = {}
    for name, (axes, weights) in units(block, tied, plan.sizes, kv_heads).items():
        size, frozen = sum(w.local(plan.sizes) for w in weights), weights[0].frozen
        shard = shard_axes(plan, axes, frozen)
        stays = zero_stage(plan) == 3 and bool(shard)
        what = "parameter" if frozen else "gradient"
        width = BYTES[block.tensors[f"{name}.whole_{what}"].dtype]
        names = (tuple(w.name for w in weights),)
        unit = Flat(name, axes, shard, (0,), names, size, frozen)
        found[name] = unit, 0 if stays else plan.data.bucket_bytes // width
    return found


def _joined(run: Sequence[tuple[int, Flat]], tied: tuple[str, ...]) -> Flat:
    """One unit of those of several blocks. A tied weight is stored once."""
    first = run[0][1]
    return replace(
        first,
        blocks=tuple(at for at, _ in run),
        weights=tuple(unit.weights[0] for _, unit in run),
        size=first.size if first.name in tied else sum(unit.size for _, unit in run),
    )


class Joins:
    """Blocks with what a unit of several blocks stores and sends stated by the first of them; pp did a tied
    weight's. Each is made once: blocks that were one object, and store the same, are one again."""

    def __init__(self, tied: tuple[str, ...], sizes: Sizes) -> None:
        self.tied, self.sizes = tied, sizes
        self._made: dict[object, tuple[Block, Block]] = {}  # what was joined keeps its key alive

    def __call__(self, blocks: Sequence[Block], found: Sequence[Flat]) -> tuple[Block, ...]:
        """The blocks of a stage with these units."""
        changes: list[dict[str, int]] = [
            {} for _ in blocks
        ]  # unit -> its size, 0 where not the first
        for flat in found:
            first, *others = flat.blocks
            if others and flat.name not in self.tied:
                changes[first][flat.name] = padded(flat.size, flat.shard, self.sizes)
                for at in others:
                    changes[at][flat.name] = 0
        return tuple(self._one(b, c) if c else b for b, c in zip(blocks, changes, strict=True))

    def _one(self, block: Block, change: Mapping[str, int]) -> Block:
        key = id(block), *sorted(change.items())
        if key not in self._made:
            self._made[key] = block, _storing(block, change)
        return self._made[key][1]


def _storing(block: Block, change: Mapping[str, int]) -> Block:
    """The block with units of these sizes, and without those of size 0."""
    tensors = {}
    for name, t in block.tensors.items():
        size = change.get(name.rpartition(".")[0])
        if size is None:
            tensors[name] = t
        elif size:
            tensors[name] = replace(t, dims=(*t.dims[:-1], replace(t.dims[-1], size=size)))
    gone = {unit for unit, size in change.items() if not size}
    regions = tuple(op for op in block.regions if op.name.rpartition(":")[0] not in gone)
    return block.beside(tensors, regions)

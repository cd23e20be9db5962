"""Offload: what lies in another arena than the device, and how it moves (ZeRO-Offload, Ren et al. 2021;
ZeRO-Infinity, Rajbhandari et al. 2021).

    offload:cpu    host memory             offload:nvme    files, read ahead and written behind

    target      lies there             sends, each a copy on axis `host` or `disk`
    optimizer   moments and masters    step: the gradient's shard down, the working shard up; from disk every
                                       state is read, and written
    gradients   as stored, summed up   B: down, added to what lies there, and the device's is freed; step: up
                                       and down again where ranks still sum it; its shard up, unit by unit,
                                       where the optimizer is on the device
    parameters  shards of stage 3      before each gather: up; step: down (nothing, where the update is there)
    activations what a block keeps     F: down, when the block has run; B: up, a block ahead of its backward.
                                       A stage's last block waits for its B, unless other work comes between:
                                       then it goes at the schedule's OFFLOAD, and comes at its RELOAD

The update runs on the host: a parameter costs the link 4 bytes down and 2 up (bf16), not its states. Sites:
'<unit>:offload' and ':reload' between device and host, ':read' and ':write' between host and disk; each is
one move of a whole unit, however many chunks it is streamed in; '<block>.kept:offload' ... of all that a
block keeps for one microbatch. Ids, targets and images stay: they are data's. Working weights stay on the
device; masters are apart from them at fp32 too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.room import Request, error, region
from partita.spec.plan import Plan
from partita.spec.program import Block, Event, Op, Program, Tensor

ARENA = {"cpu": "host", "nvme": "disk"}
DEFAULT = ("gradients", "optimizer")
DATA = ("index", "label", "data")  # roles of what a block keeps and did not make
CHUNK = 1 << 18  # elements updated at a time: 1 MiB of fp32 a state
KEPT_BUFFERS = 4  # of what a block keeps: filled, written; read ahead, copied from
BF16 = 2  # bytes of a weight without a master
SETS = 3  # of buffers between a file and what is computed: read ahead, in use, written behind
STATES = {  # role of a unit's tensor -> target
    "parameter": "parameters", "gradient": "gradients", "optimizer": "optimizer",
}  # fmt: skip


def targets(plan: Plan) -> tuple[str, ...]:
    """What the plan puts elsewhere."""
    return () if plan.offload.to == "none" else plan.offload.targets or DEFAULT


def arena_of(plan: Plan, target: str) -> str:
    """Where a target lies: device, host or disk."""
    return ARENA[plan.offload.to] if target in targets(plan) else "device"


def staging_bytes(plan: Plan, words: int, largest: int, width: int, working: int = 0) -> int:
    """Host memory that moves pass through, of a rank whose largest unit has `largest` elements of `width`
    bytes and `words` states each: a chunk of a gradient, and SETS of all that lies on disk, `working` bytes
    an element of weights among it, and of the shards that are read ahead."""
    gradients, chunk = "gradients" in targets(plan), min(largest, CHUNK)
    if "optimizer" not in targets(plan):
        buffers = SETS if plan.offload.to == "nvme" else 1
        return gradients * buffers * chunk * width + SETS * largest * working
    rounded = plan.precision.rounding == "stochastic"  # a chunk of weights, as they are and widened
    narrow = width if plan.precision.dtype == "fp64" else BF16
    files = SETS * (words + 2 * gradients) + (not gradients)
    buffers = files if plan.offload.to == "nvme" else 1
    found = chunk * (buffers * width + rounded * (width + narrow))
    return found + (plan.offload.to == "nvme") * SETS * (chunk + largest) * working


def problems(job: Request) -> list[Problem]:
    """Targets without a place to go, and shards that cannot be there."""
    plan = job.plan
    if plan.offload.to != "none":
        return _shards(job, f"offload:{plan.offload.to}")
    if not plan.offload.targets:
        return []
    named = ",".join(plan.offload.targets)
    message = f"offload.targets={named} names no arena to go to"
    nearest = str(plan.with_("offload", to="none", targets=()))
    limit = "offload:cpu or offload:nvme beside it"
    return [error("offload", "arena", message, asked=named, limit=limit, nearest=nearest)]


def _shards(job: Request, asked: str) -> list[Problem]:
    """What keeps parameters from lying elsewhere: they are streamed as the shards of stage 3."""
    plan, found = job.plan, []
    if "parameters" not in targets(plan):
        return found
    others = tuple(t for t in targets(plan) if t != "parameters")
    near = str(
        plan.with_("offload", targets=others)
        if others
        else plan.with_("offload", to="none", targets=())
    )
    if plan.mesh.dp_shard == 1 or plan.data.zero_stage != 3:
        message = (
            "parameters that lie elsewhere come as shards, block by block: stage 3 gathers them"
        )
        limit = "dp_shard2 or more, with zero3"
        found.append(error("offload", "shards", message, asked=asked, limit=limit, nearest=near))
    if plan.precision.dtype == "fp8" and plan.offload.to == "nvme":
        message = "fp8 weights carry scales that follow every update: their shards stay in memory"
        limit = "offload:cpu, or another precision"
        found.append(error("offload", "fp8", message, asked=asked, limit=limit, nearest=near))
    return found


def lay(job: Request, program: Program) -> Program:
    """Says where each unit's states lie."""
    arenas = {role: arena_of(job.plan, target) for role, target in STATES.items()}

    def lay_block(block: Block) -> Block:
        placed = {
            n: replace(t, arena=arenas[t.role])
            for n, t in block.tensors.items()
            if t.role in arenas and (t.role != "parameter" or t.axes())
        }
        return replace(block, tensors={**block.tensors, **placed})

    return program.map(lay_block) if targets(job.plan) else program


Made = dict[
    tuple[int, bool], tuple[Block, Block]
]  # (block, whether the stage's last) -> itself, moved


def moves(
    blocks: Sequence[Block], tied: tuple[str, ...], plan: Plan, made: Made
) -> tuple[Block, ...]:
    """The blocks of a stage, finished by every other room, with the regions that move what lies elsewhere.
    `tied`: weights whose gradient leaves from a second holder too, where microbatches go two ways. `made`:
    blocks of this plan that were asked for before; equal ones are one object."""
    if not targets(plan):
        return tuple(blocks)
    found = []
    for at, block in enumerate(blocks):
        key = id(block), at == len(blocks) - 1
        if key not in made:
            made[key] = block, _moving(block, tied, plan, last=key[1])
        found.append(made[key][1])
    return tuple(found)


def _moving(block: Block, tied: tuple[str, ...], plan: Plan, last: bool) -> Block:
    found: dict[str, list[Move]] = {"kept": _kept_events(block, plan, last)}
    for op in block.regions:
        if op.kind == "gather" and arena_of(plan, "parameters") != "device":
            found.setdefault(op.name.rpartition(":")[0], []).extend(_shard_events(op, plan))
    for name in block.tensors:
        if name.endswith(".optimizer"):
            unit = name.removesuffix(".optimizer")
            away = unit in found  # its shard, too
            events = [*_gradient_events(unit, block, plan), *_update_events(unit, plan, away)]
            found.setdefault(unit, []).extend(events)
    for unit in tied:
        if f"{unit}.whole_gradient" in block.tensors and f"{unit}.optimizer" not in block.tensors:
            events = _gradient_events(unit, block, plan)
            found.setdefault(unit, []).extend(e for e in events if e[1].phase == "B")
    regions = (op for unit, events in found.items() for op in _regions(unit, events))
    return replace(block, regions=(*block.regions, *regions))


Move = tuple[str, Event]  # offload | reload | read | write


def _kept_events(block: Block, plan: Plan, last: bool) -> list[Move]:
    """What a block keeps goes in F and comes in B; not its output, which the next block keeps, nor data."""
    arena = arena_of(plan, "activations")
    own = {block.output, *(op.writes for op in block.ops())}  # rows of pixels are a copy
    brought = {n for n in block.kept - own if _is_data(block.tensors[n])}
    names = sorted(block.kept - brought - {block.output})
    if arena == "device" or not names:
        return []
    goes, comes = (Event(p, "copy", names[0], beside=tuple(names[1:]), apart=last) for p in "FB")
    found = [("offload", goes), ("reload", comes)]
    return found + ([("write", goes), ("read", comes)] if arena == "disk" else [])


def _gradient_events(unit: str, block: Block, plan: Plan) -> list[Move]:
    """A gradient leaves when a microbatch has made it, whole or as the shard that B scatters, and is added
    to what lies there. What is summed once a step comes for that and goes again. On disk the norm reads it
    once more."""
    arena = arena_of(plan, "gradients")
    if arena == "device":
        return []
    mine = [op for op in block.regions if op.name.rpartition(":")[0] == unit]
    scatters = any(op.kind == "scatter" and e.phase == "B" for op in mine for e in op.events)
    whole, shard = f"{unit}.whole_gradient", f"{unit}.shard_gradient"
    made = shard if scatters else whole
    summed = any(e.phase == "step" and e.gradient for op in mine for e in op.events)
    found = [("offload", Event("B", "copy", made, weights=True))]
    if summed:
        found += [("reload", _step(made)), ("offload", _step(shard))]
    if arena == "disk":
        found += [
            ("read", Event("B", "copy", made, weights=True, again=True)),
            ("write", Event("B", "copy", made, weights=True)),
            ("read", replace(_step(shard), once=True)),
        ]
        found += [("read", _step(made)), ("write", _step(shard))] if summed else []
    return found


def _is_data(t: Tensor) -> bool:
    """Whether data brings it and keeps it. Images come in fp32: another dtype's are a block's own copy."""
    return t.role in DATA and (t.role != "data" or t.dtype == "fp32")


def _shard_events(gather: Op, plan: Plan) -> list[Move]:
    """A shard that lies elsewhere comes for each gather of it."""
    comes = [Event(e.phase, "copy", e.of) for e in gather.events]
    kinds = ("reload", "read") if arena_of(plan, "parameters") == "disk" else ("reload",)
    return [(kind, event) for event in comes for kind in kinds]


def _update_events(unit: str, plan: Plan, shard_is_away: bool) -> list[Move]:
    """What an update on the host moves: the gradient's shard comes, the working one goes; what lies on disk
    is read, and states are written; without masters the working shard comes too. To one on the device the
    gradient's shard comes from elsewhere; a working shard goes there, and without masters comes."""
    arena, alone = arena_of(plan, "optimizer"), plan.precision.rounding == "stochastic"
    gradient, shard = _step(f"{unit}.shard_gradient"), _step(f"{unit}.shard_parameter")
    found: list[Move] = []
    if shard_is_away and plan.offload.to == "nvme":
        found += [("write", shard), *([("read", shard)] if alone else [])]
    if arena == "device":
        goes: list[Move] = [("offload", shard), *([("reload", shard)] if alone else [])]
        comes = {"device": [], "host": ["reload"], "disk": ["reload", "read"]}
        found += goes if shard_is_away else []
        return found + [(kind, gradient) for kind in comes[arena_of(plan, "gradients")]]
    if not shard_is_away:
        found += [("reload", shard), *([("offload", shard)] if alone else [])]
    come = {"device": [("offload", gradient)], "host": [], "disk": [("read", gradient)]}
    found += come[arena_of(plan, "gradients")]
    if arena == "disk":
        found += [(kind, _step(f"{unit}.optimizer")) for kind in ("read", "write")]
    return found


def _step(tensor: str) -> Event:
    return Event("step", "copy", tensor)


def _regions(unit: str, found: Sequence[Move]) -> Iterator[Op]:
    """One region a kind, on the host's lane."""
    axes = {"offload": "host", "reload": "host", "read": "disk", "write": "disk"}
    for kind, axis in axes.items():
        events = tuple(e for k, e in found if k == kind)
        if events:
            move = (events[0].of, events[0].of)
            yield replace(region(unit, kind, (axis,), move, *events), lane="host")

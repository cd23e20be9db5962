"""Pipeline parallelism (Huang et al. 2019; Narayanan et al. 2019): layers lie on pp.

Any contiguous split of the layers into the stages of the schedule, several a rank, on any; by default the
one whose dearest stage is cheapest, embedding and head counted. A stage sends what its last block's
output is cut to, and the gradient of its first block's input back; neighbours on one rank hand over. A
weight held on two places of pp is added up between them after dp's reduction, before the update: a tied one,
or every weight of a stage with two copies. Held twice on one place, its first holder owns it.

    line    loop (v = 2)   vee        both ways
    0 1     0 1 / 2 3      0 1 / 3 2  0 1 / 1 0     stages by rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from partita.base.errors import PartitaError, Problem, ScheduleError
from partita.parallel.read import STATES, flops
from partita.parallel.room import Request, error, region
from partita.schedule.ir import Action, Schedule
from partita.schedule.make import hold_to_size
from partita.schedule.make import schedule as make_schedule
from partita.spec.plan import Plan
from partita.spec.program import Block, Event, Op, Program, distinct

_PLAIN: dict[str, Any] = {
    "schedule": "1f1b", "virtual_stages": 1, "vertical_sync": False, "costs": (), "limit": 0, "copies": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks of the laid program; `names[i]` is the full name of `blocks[i]`. `places` are
    the pp coordinates that run it: one, or two copies."""

    index: int
    names: tuple[str, ...]
    blocks: tuple[Block, ...]
    places: tuple[int, ...] = (0,)

    def holds(self, weight: str) -> bool:
        """Whether a block of it has the weight."""
        return any(w.name == weight for b in self.blocks for w in b.weights())


def schedule_of(plan: Plan) -> Schedule:
    """The plan's schedule; without a pipeline, microbatches one after the other. Raises what
    `schedule` raises."""
    pp, pipe, m = plan.mesh.pp, plan.pipeline, plan.num_microbatches
    if pp == 1:
        return make_schedule("1f1b", num_ranks=1, num_microbatches=m)
    if pipe.schedule == "auto" and (pipe.costs or pipe.limit or pipe.copies > 1):
        from partita.schedule.make.auto import made_for

        hold_to_size(pp * pipe.virtual_stages, m)
        return made_for(pp, m, pipe.virtual_stages, pipe.costs, pipe.limit, pipe.copies)
    return make_schedule(
        pipe.schedule, num_ranks=pp, num_microbatches=m,
        virtual_stages=pipe.virtual_stages, **({"vertical_sync": True} if pipe.vertical_sync else {}),
    )  # fmt: skip


def forward_of(schedule: Schedule) -> Schedule:
    """One microbatch through the same stages on the same ranks, forward only: evaluation."""
    ranks = [
        tuple(Action(s, "F", 0) for s in range(schedule.num_stages) if schedule.rank_of(s) == rank)
        for rank in range(schedule.num_ranks)
    ]
    way = schedule.direction[:1] if schedule.direction is not None else None
    return replace(
        schedule, num_microbatches=1, ranks=tuple(ranks), direction=way, paired=frozenset()
    )


def lane(what: str, stage: int, schedule: Schedule) -> str:
    """The lane of messages that `stage` consumes: one a direction and chunk."""
    chunk = stage // schedule.num_ranks
    return ("pp_down" if what == "F" else "pp_up") + (f".{chunk}" if chunk else "")


def problems(job: Request) -> list[Problem]:
    """A schedule that exists for these numbers; as many layers as stages; a stated split adds up."""
    plan, layers = job.plan, job.model.layers
    found = _schedule_problems(plan)
    if found:
        return found
    made = schedule_of(plan)
    found = [*_needs_flush(job, made)] if made.is_asynchronous else []
    found += _means_nothing(job, made)
    stages, split = made.num_stages, plan.pipeline.split
    if stages > layers and not split:
        found.append(_too_few_layers(job, stages))
    if split and len(split) == stages and sum(split) == layers and 0 in split[1:-1]:
        found.append(_empty_stage(job))
    elif split and (len(split) != stages or sum(split) != layers or min(split) < 0):
        message = (
            f"pipeline.split={','.join(map(str, split))} has {len(split)} stages and {sum(split)} layers; "
            f"the plan has {stages} stages, the model {layers} layers"
        )
        nearest = str(plan.with_("pipeline", split=()))
        limit = f"{stages} numbers that add up to {layers}"
        found.append(error("pp", "split", message, asked=str(split), limit=limit, nearest=nearest))
    return found


def _too_few_layers(job: Request, stages: int) -> Problem:
    """More stages than layers. Embedding and head may be stages of their own (Llama 3's layout), if the plan
    says so: two stages more than layers have a split, which is the way out."""
    plan, layers = job.plan, job.model.layers
    each = stages // plan.mesh.pp
    message, limit = f"{layers} layers cannot fill {stages} stages", f"at most {layers} stages"
    if stages == layers + 2:
        split = (0, *(1,) * layers, 0)
        near = plan.with_("pipeline", split=split)
        message += ", unless embedding and head are stages of their own: pipeline.split=0,1,...,1,0"
        limit += f", or {stages} with pipeline.split=0,1,...,1,0"
    else:
        near = plan.with_("mesh", pp=min(plan.mesh.pp, layers))
        if each > 1:
            near = near.with_("pipeline", **_PLAIN)
    asked = f"pp{plan.mesh.pp}" + (f" x {each} stages" if each > 1 else "")
    return error("pp", "layers", message, asked=asked, limit=limit, nearest=str(near))


def _needs_flush(job: Request, made: Schedule) -> Iterator[Problem]:
    """What a schedule that updates stage by stage cannot go with."""
    plan, name = job.plan, job.plan.pipeline.schedule
    nearest = str(plan.with_("pipeline", schedule="1f1b", vertical_sync=False))
    asked = f"pp{plan.mesh.pp}:{name}/{plan.num_microbatches}mb"
    shards = plan.mesh.dp_shard > 1 and plan.data.zero_stage > 1
    stated, tied = not made.runs_ahead, job.model.tied and not job.frozen.holds("embedding.table")
    for wrong, rule, message, limit in (
        (made.runs_ahead and plan.num_microbatches < plan.mesh.pp, "microbatches",
         f"a step of {name} has as many microbatches as stages or more: a stage runs ahead by one step at "
         f"most; {plan.num_microbatches} are fewer than {plan.mesh.pp}", f"m >= {plan.mesh.pp}"),
        (plan.precision.dtype == "fp16", "precision", f"{name} has no global step, which the loss scale of "
         "fp16 is kept by", "fp32, bf16 or fp8"),
        (shards, "zero_stage", f"{name} keeps several versions of whole weights, and a gradient until its "
         "stage's update: only the optimizer is sharded", "zero1, zero0 or dp_replicate"),
        (stated and tied, "tied", f"{name} updates the first stage and the last where its list says, each by "
         "itself, and the table that both hold takes one update of both gradients, which pipedream says when",
         "tied=false, or pipedream"),
    ):  # fmt: skip
        if wrong:
            yield error("pp", rule, message, asked=asked, limit=limit, nearest=nearest)


def in_force(plan: Plan) -> Plan:
    """The plan without updates before the norm is known where nobody waits for it: without a pipeline it is
    known at once, and stages that update by themselves have none."""
    if not plan.pipeline.post_validation or (
        plan.mesh.pp > 1 and not schedule_of(plan).is_asynchronous
    ):
        return plan
    return plan.with_("pipeline", post_validation=False)


def _means_nothing(job: Request, made: Schedule) -> Iterator[Problem]:
    """A warning where nothing is to be updated before a norm."""
    near, asked = in_force(job.plan), "pipeline.post_validation=true"
    if near == job.plan:
        return
    late = f"{made.name} updates stage by stage and has no norm to wait for"
    why = late if made.is_asynchronous else "without a pipeline the norm is known at once"
    facts = {"asked": asked, "limit": "pp > 1 and a flush", "nearest": str(near)}
    text = f"{asked} changes nothing: {why}"
    yield error("pp", "post_validation", text, severity="warning", **facts)


def _schedule_problems(plan: Plan) -> list[Problem]:
    """Why the schedule cannot run: unknown, below its floor, or a file that the checker refuses."""
    pipe = plan.pipeline
    asked = f"pp{plan.mesh.pp}:{pipe.schedule}"
    nearest = str(plan.with_("pipeline", **_PLAIN))
    if (pipe.costs or pipe.limit or pipe.copies > 1) and pipe.schedule != "auto":
        message = f"pipeline.costs, limit and copies are of auto; {pipe.schedule} is the same at all costs"
        return [error("pp", "costs", message, asked=asked, limit="pp<n>:auto", nearest=nearest)]
    if pipe.copies > 1 and plan.mesh.pp % 2:
        message = f"pipeline.copies=2: stages lie on ranks r and p-1-r of an even p, not of {plan.mesh.pp}"
        nearest = str(plan.with_("pipeline", copies=1))
        return [error("pp", "copies", message, asked=asked, limit="pp even", nearest=nearest)]
    try:
        made = schedule_of(plan)
    except PartitaError as found:
        if isinstance(found, ScheduleError) and found.problems:  # a file's
            return [
                replace(p, room="pp", asked=p.asked or asked, nearest=nearest)
                for p in found.problems
            ]
        limit = "partita draw shows each schedule's rule"
        return [error("pp", "schedule", found.message, asked=asked, limit=limit, nearest=nearest)]
    if made.is_forward_only:
        message = f"{pipe.schedule} has no backward: it evaluates, and cannot train"
        limit = "a schedule with B, or I and W"
        return [error("pp", "schedule", message, asked=asked, limit=limit, nearest=nearest)]
    return []


def _empty_stage(job: Request) -> Problem:
    split = job.plan.pipeline.split
    empty = [i for i, n in enumerate(split) if n == 0 and 0 < i < len(split) - 1]
    text = ",".join(map(str, split))
    message = f"pipeline.split={text} leaves stage {empty[0]} no embedding, layer or head"
    nearest = str(job.plan.with_("pipeline", split=()))
    limit = "a layer on every stage but the first and the last"
    return error("pp", "split", message, asked=text, limit=limit, nearest=nearest)


def balanced(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Layers of each stage, at least one each, so that the dearest stage is cheapest (exact).

    `costs` = embedding, layers, head. Ties go to the most even split.

    >>> balanced([0, 1, 1, 1, 1, 1, 1, 2], 2)
    (4, 2)
    """
    worst = _cheapest(costs, stages, max, _even(costs, stages))[0]
    return _cheapest(costs, stages, lambda squares, c: squares + c * c, worst)[1]


def _stage_cost(costs: Sequence[float], stages: int) -> Callable[[int, int, int], float]:
    """(stage, first, end of its layers) -> its cost, embedding and head counted."""
    prefix = list(accumulate(costs[1:-1], initial=0.0))

    def cost(stage: int, a: int, b: int) -> float:
        ends = (costs[0] if stage == 0 else 0) + (costs[-1] if stage == stages - 1 else 0)
        return prefix[b] - prefix[a] + ends

    return cost


def _even(costs: Sequence[float], stages: int) -> float:
    """The dearest stage of the split into equal numbers: no better split has a dearer one."""
    layers, cost = len(costs) - 2, _stage_cost(costs, stages)
    at = [i * layers // stages for i in range(stages + 1)]
    return max(cost(i, at[i], at[i + 1]) for i in range(stages))


def _ends(
    cost: Callable[[int, int, int], float], layers: int, stages: int, limit: float
) -> list[int]:
    """Where the layers of each stage end at the earliest, for those behind to hold the rest."""
    ends = [layers] * stages
    for stage in range(stages - 1, 0, -1):
        a = b = ends[stage]
        while a > 0 and cost(stage, a - 1, b) <= limit:
            a -= 1
        ends[stage - 1] = a
    return ends


def _cheapest(
    costs: Sequence[float], stages: int, join: Callable[[float, float], float], limit: float
) -> tuple[float, tuple[int, ...]]:
    """The split whose stages' costs, joined, are least, among those with no stage dearer than `limit`.
    Costs are not negative, so a stage's search ends where it gets too dear."""
    layers, cost = len(costs) - 2, _stage_cost(costs, stages)
    ends = _ends(cost, layers, stages, limit * (1 + 1e-9))
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        new: dict[int, tuple[float, tuple[int, ...]]] = {}
        for a, (value, split) in best.items():
            least = max(a + 1, ends[stage])
            for b in range(least, layers - (stages - 1 - stage) + 1):
                c = cost(stage, a, b)
                if c > limit:
                    break
                joined = join(value, c)
                if b in new and joined > new[b][0]:
                    continue
                if b not in new or (joined, (*split, b - a)) < new[b]:
                    new[b] = joined, (*split, b - a)
        best = new
    return best[layers]


def split_of(job: Request, program: Program) -> tuple[int, ...]:
    """The plan's split, or the balanced one by local FLOPs, forward and backward."""
    if job.plan.pipeline.split:
        return job.plan.pipeline.split
    cached = {
        id(b): float(sum(flops(b, job.plan.sizes).values())) for b, _ in distinct(program.blocks)
    }
    return balanced([cached[id(b)] for b in program.blocks], schedule_of(job.plan).num_stages)


def stages(job: Request, program: Program) -> tuple[Stage, ...]:
    """The laid program cut into stages, with sends and the reductions between places of pp. Equal blocks
    of different stages are one object."""
    schedule, split = schedule_of(job.plan), split_of(job, program)
    last, first = len(split) - 1, 1
    sends = _Sends()
    found = []
    for i, layers in enumerate(split):
        at = list(range(first, first + layers))
        first += layers
        at = ([0] if i == 0 else []) + at + ([len(program.blocks) - 1] if i == last else [])
        blocks = [program.blocks[j] for j in at]
        if i < last and schedule.rank_of(i) != schedule.rank_of(i + 1):
            blocks[-1] = sends(blocks[-1], "F", lane("F", i + 1, schedule))
        if i > 0 and schedule.rank_of(i - 1) != schedule.rank_of(i):
            blocks[0] = sends(blocks[0], "B", lane("B", i - 1, schedule))
        names = tuple(program.names[j] for j in at)
        found.append(Stage(i, names, tuple(blocks), schedule.ranks_of(i)))
    copied = schedule.direction is not None
    return _across(_owned(found, program.tied, copied), program.tied, copied)


class _Sends:
    """Blocks that send their output (F) or the gradient of their input (B), each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, str, str], tuple[Block, Block]] = {}  # keeps its keys alive

    def __call__(self, block: Block, phase: str, on: str) -> Block:
        key = id(block), phase, on
        if key not in self._made:
            tensor = block.output if phase == "F" else block.input
            event = Event(phase, "send", tensor, gradient=phase == "B")
            op = replace(region("", "send", ("pp",), (tensor, tensor), event), name="send", lane=on)
            self._made[key] = block, block.beside(block.tensors, (*block.regions, op))
        return self._made[key][1]


def _owned(found: Sequence[Stage], tied: tuple[str, ...], copied: bool) -> tuple[Stage, ...]:
    """On each place the first holder of a tied weight owns its states."""
    seen: set[tuple[str, frozenset[int]]] = set()
    out = []
    for stage in found:
        blocks = []
        for block in stage.blocks:
            for weight in tied:
                if any(w.name == weight for w in block.weights()):
                    key = weight, frozenset(stage.places)
                    block = _second_holder(block, weight, copied) if key in seen else block
                    seen.add(key)
            blocks.append(block)
        out.append(replace(stage, blocks=tuple(blocks)))
    return tuple(out)


def _across(found: tuple[Stage, ...], tied: tuple[str, ...], copied: bool) -> tuple[Stage, ...]:
    """Sums between the two places of pp that hold a weight: all weights of a stage with two copies
    ('pp/copy'), then a tied one whose owners lie on other places ('tied')."""

    def units(block: Block) -> list[str]:
        return [
            n.removesuffix(".gradient") for n, t in block.tensors.items() if t.role == "gradient"
        ]

    every = [(w, s.places) for s in found for b, _ in distinct(s.blocks) for w in units(b)]
    shared = [w for w in tied if len({frozenset(at) for u, at in every if u == w}) > 1]

    def change(block: Block) -> Block:
        held = units(block)
        ops = [_sum_between(unit, "copies", "pp/copy") for unit in held if copied]
        ops += [_sum_between(unit, "tied", "tied") for unit in held if unit in shared]
        return block.beside(block.tensors, (*block.regions, *ops)) if ops else block

    done = {id(b): change(b) for b, _ in distinct(b for s in found for b in s.blocks)}
    return tuple(replace(s, blocks=tuple(done[id(b)] for b in s.blocks)) for s in found)


def _sum_between(unit: str, kind: str, axis: str) -> Op:
    gradient = f"{unit}.shard_gradient"  # reduced by then: whole where nothing cuts it
    event = Event("step", "all_reduce", gradient, gradient=True)
    return replace(region(unit, kind, (axis,), (gradient, gradient), event), lane="dp")


def _second_holder(block: Block, weight: str, copied: bool) -> Block:
    """It stores nothing, and only gathers for its own forward and backward. Where microbatches go two ways
    (`copied`), one that comes here does not come to the first holder: its gradient is scattered here."""
    states = {
        n for n, t in block.tensors.items() if n.rpartition(".")[0] == weight and t.role in STATES
    }
    tensors = {n: t for n, t in block.tensors.items() if n not in states}
    kinds = ("gather", "scatter") if copied else ("gather",)
    regions: list[Op] = []
    for op in block.regions:
        if op.name.rpartition(":")[0] == weight:
            own = tuple(e for e in op.events if op.kind in kinds and e.phase != "step")
            regions += [replace(op, events=own)] if own else []
        else:
            regions.append(op)
    return block.beside(tensors, tuple(regions))

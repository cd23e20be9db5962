"""Pipeline parallelism (Huang et al. 2019; Narayanan et al. 2019): layers lie on pp.

Any contiguous split of the layers; by default the one whose dearest stage is cheapest, embedding and head
counted. A stage sends what its last block's output is cut to, and the gradient of its first block's input
back. A weight held by two stages is added up between them after dp's reduction, before the update;
held twice by one stage, its first holder owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from partita.base.errors import Problem
from partita.parallel.read import flops
from partita.parallel.room import Request, error, region
from partita.spec.program import Block, Event, Op, Program

SCHEDULES = ("gpipe", "1f1b")


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks of the laid program; `names[i]` is the full name of `blocks[i]`."""

    index: int
    names: tuple[str, ...]
    blocks: tuple[Block, ...]


def problems(job: Request) -> list[Problem]:
    """As many layers as stages; a stated split adds up; a schedule that exists."""
    plan, layers = job.plan, job.model.layers
    pp, pipe, found = plan.mesh.pp, plan.pipeline, []
    if pp > 1 and (pipe.schedule not in SCHEDULES or pipe.virtual_stages > 1):
        asked = f"pp{pp}:{pipe.schedule}" + (
            f"x{pipe.virtual_stages}" if pipe.virtual_stages > 1 else ""
        )
        message = (
            f"the schedule of {asked} is not available in this version: {', '.join(SCHEDULES)}"
        )
        nearest = str(plan.with_("pipeline", schedule="1f1b", virtual_stages=1))
        found.append(
            error(
                "pp", "schedule", message, asked=asked, limit=", ".join(SCHEDULES), nearest=nearest
            )
        )
    if pp > layers:
        message = f"{layers} layers cannot fill {pp} stages"
        nearest = str(plan.with_("mesh", pp=layers))
        found.append(
            error(
                "pp", "layers", message, asked=f"pp{pp}", limit=f"pp <= {layers}", nearest=nearest
            )
        )
    split = pipe.split
    if split and len(split) == pp and sum(split) == layers and 0 in split[1:-1]:
        found.append(_empty_stage(job))
    elif split and (len(split) != pp or sum(split) != layers or min(split) < 0):
        message = (
            f"pipeline.split={','.join(map(str, split))} has {len(split)} stages and {sum(split)} layers; "
            f"the plan has {pp} stages, the model {layers} layers"
        )
        nearest = str(plan.with_("pipeline", split=()))
        limit = f"{pp} numbers that add up to {layers}"
        found.append(error("pp", "split", message, asked=str(split), limit=limit, nearest=nearest))
    return found


def _empty_stage(job: Request) -> Problem:
    split = job.plan.pipeline.split
    empty = [i for i, n in enumerate(split) if n == 0 and 0 < i < len(split) - 1]
    text = ",".join(map(str, split))
    message = (
        f"pipeline.split={text} leaves stage {empty[0]} nothing: it has no embedding, layer or head"
    )
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


def _cheapest(
    costs: Sequence[float], stages: int, join: Callable[[float, float], float], limit: float
) -> tuple[float, tuple[int, ...]]:
    """The split whose stages' costs, joined, are least, among those with no stage dearer than `limit`.
    Costs are not negative, so a stage's search ends where it gets too dear."""
    layers, cost = len(costs) - 2, _stage_cost(costs, stages)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        new: dict[int, tuple[float, tuple[int, ...]]] = {}
        for a, (value, split) in best.items():
            least = layers if stage == stages - 1 else a + 1
            for b in range(least, layers - (stages - 1 - stage) + 1):
                c = cost(stage, a, b)
                if c > limit:
                    break
                joined = join(value, c)
                if b not in new or (joined, (*split, b - a)) < new[b]:
                    new[b] = joined, (*split, b - a)
        best = new
    return best[layers]


def split_of(job: Request, program: Program) -> tuple[int, ...]:
    """The plan's split, or the balanced one by local FLOPs, forward and backward."""
    pp = job.plan.mesh.pp
    if job.plan.pipeline.split:
        return job.plan.pipeline.split
    cached: dict[int, float] = {}
    for b in program.blocks:
        if id(b) not in cached:
            cached[id(b)] = float(sum(flops(b, job.plan.sizes).values()))
    return balanced([cached[id(b)] for b in program.blocks], pp)


def stages(job: Request, program: Program) -> tuple[Stage, ...]:
    """The laid program cut into stages, with sends and the tied weight's reduction."""
    split = split_of(job, program)
    last, first = len(split) - 1, 1
    found = []
    for i, layers in enumerate(split):
        at = list(range(first, first + layers))
        first += layers
        at = ([0] if i == 0 else []) + at + ([len(program.blocks) - 1] if i == last else [])
        blocks = [program.blocks[j] for j in at]
        if i < last:
            blocks[-1] = _sends(blocks[-1], "F", blocks[-1].output)
        if i > 0:
            blocks[0] = _sends(blocks[0], "B", blocks[0].input)
        blocks = _tie(blocks, program.tied, len(split))
        found.append(Stage(i, tuple(program.names[j] for j in at), tuple(blocks)))
    return tuple(found)


def _sends(block: Block, phase: str, tensor: str) -> Block:
    event = Event(phase, "send", tensor, gradient=phase == "B")
    lane = "pp_down" if phase == "F" else "pp_up"
    op = replace(region("", "send", ("pp",), (tensor, tensor), event), name="send", lane=lane)
    return replace(block, regions=(*block.regions, op))


def _tie(blocks: list[Block], tied: tuple[str, ...], num_stages: int) -> list[Block]:
    """The first holder on a stage owns a tied weight's states; with several stages it adds its gradient
    to the other stage's."""
    out = list(blocks)
    for weight in tied:
        holders = [i for i, b in enumerate(out) if any(w.name == weight for w in b.weights())]
        for i in holders[1:]:
            out[i] = _second_holder(out[i], weight)
        for i in holders[:1] if num_stages > 1 else []:
            out[i] = replace(out[i], regions=(*out[i].regions, _tied_sum(weight)))
    return out


def _tied_sum(weight: str) -> Op:
    gradient = f"{weight}.gradient"
    event = Event("step", "all_reduce", gradient, gradient=True)
    op = region(weight, "tied", ("tied",), (gradient, gradient), event)
    return replace(op, lane="dp")


def _second_holder(block: Block, weight: str) -> Block:
    states = {f"{weight}.{role}" for role in ("parameter", "gradient", "optimizer")}
    tensors = {n: t for n, t in block.tensors.items() if n not in states}
    regions = tuple(op for op in block.regions if op.reads[0] not in states)
    return replace(block, tensors=tensors, regions=regions)

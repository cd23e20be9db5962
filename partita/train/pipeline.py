"""The executors of one rank, built from the laid program: its stages, their channels, what they receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from partita.comm.context import Context
from partita.parallel.dp.replicate import Reducer, UnitComms
from partita.parallel.dp.zero import DataParallel, Gatherer, Needs, Parameters
from partita.parallel.laid import Laid
from partita.parallel.offload.activations import Activations, StageKept
from partita.parallel.pp.executor import Channel, Executor
from partita.parallel.pp.rules import Stage, forward_of, lane
from partita.parallel.pp.versions import Flow, Late, Versions, updates_behind, version_rule
from partita.parallel.units import Away, Shards, Unit
from partita.train.stage import StageBlocks


def make_executor(
    laid: Laid, context: Context, blocks: Mapping[int, list[Any]], data: Mapping[int, DataParallel],
    dtype: torch.dtype, kept: Activations | None = None,
) -> Executor:  # fmt: skip
    """The executor of a step. `blocks` are this rank's stages by index, built; `kept`: where what they keep
    lies until backward."""
    place = context.coords["pp"]
    modules = {i: StageBlocks(b, data[i], _kept(kept, b, data[i])) for i, b in blocks.items()}
    reducer = next(iter(data.values())).reducer
    return Executor(
        modules, laid.schedule, place, _channels(laid, context), context.where,
        _activation(laid, dtype, context.device), reducer.queue,
        lambda stage: reducer.arm(laid.stages[stage].names), overlaps=overlaps(laid),
        actions=laid.actions[place], kept=kept,
    )  # fmt: skip


def _kept(kept: Activations | None, blocks: Sequence[Any], data: DataParallel) -> StageKept | None:
    if kept is None:
        return None
    tables = [t for block in blocks for t in getattr(block, "tables", ())]
    return StageKept(kept, len(blocks), data.gatherer.parameters.units, tables)


def overlaps(laid: Laid) -> bool:
    """Whether a forward and a backward that the schedule pairs have something to run under each other: rows
    that travel to experts."""
    blocks = {id(b): b for s in laid.stages for b in s.blocks}.values()
    travel = any(op.kind == "all_to_all" and op.events for b in blocks for op in b.ops())
    return bool(laid.schedule.paired) and travel


def data_parallel(
    laid: Laid,
    context: Context,
    units: Sequence[Unit],
    away: Away | None = None,
    shards: Shards | None = None,
) -> tuple[Reducer, Parameters, dict[int, DataParallel]]:
    """What a rank's units need of other ranks, as the regions of its blocks say; and for each of its
    stages what is done around its blocks."""
    comms = {}
    for unit in units:
        spec = unit.spec
        other = [a for a in spec.axes if a not in spec.shard]
        comms[unit.name] = UnitComms(
            context.comm(*spec.shard, lane="dp") if spec.shard else None,
            context.comm(*other, lane="dp") if other else None,
            tuple(context.comm(axis, lane="dp") for axis in spec.across),
        )
    stages = laid.stages_of(context.coords["pp"])
    two_ways = laid.schedule.direction is not None
    visits = [frozenset(s.names) for s in stages] if two_ways else []
    trained = [unit for unit in units if not unit.spec.frozen]
    prefetch = laid.request.plan.data.prefetch
    reducer = Reducer(trained, comms, context.where, units[0].queue, visits, away, prefetch > 0)
    parameters = Parameters(units, comms, context.where, shards)
    found = {}
    for stage in stages:
        gatherer = Gatherer(parameters, _needs(laid, stage, units), prefetch)
        found[stage.index] = DataParallel(stage.names, reducer, gatherer)
    return reducer, parameters, found


def _needs(laid: Laid, stage: Stage, units: Sequence[Unit]) -> list[Needs]:
    """Block by block, the stage-3 units it gathers in each phase."""
    known = {unit.name: unit for unit in units if unit.spec.stage == 3}
    needs = []
    for name, block in zip(stage.names, stage.blocks, strict=True):
        found: dict[str, list[Unit]] = {"F": [], "B": [], "step": []}
        for op in block.regions:
            unit = known.get(laid.site(name, op.name).rpartition(":")[0])
            if op.kind == "gather" and unit is not None:
                for event in op.events:
                    found[event.phase].append(unit)
        needs.append(Needs(*map(tuple, found.values())))
    return needs


def make_flow(
    executor: Executor,
    laid: Laid,
    units: Sequence[Unit],
    parameters: Parameters,
    reducer: Reducer,
    away: bool = False,
) -> Flow:
    """How an asynchronous schedule runs on this rank: its stages' own weights, and on the last stage a table
    that the first one holds too. `away`: masters lie elsewhere."""
    late = [u for u in units if u.spec.across and executor.place > 0]
    rule = version_rule(laid.schedule)
    alone = laid.request.plan.precision.rounding == "stochastic"
    own = {}
    for stage in laid.stages_of(executor.place):
        here = [u for u in units if u.spec.blocks[0] in stage.names]
        here = [u for u in here if u not in late and not u.spec.frozen]
        own[stage.index] = Versions(here, rule, parameters.refresh, away, alone, reducer.renew)
    flow = Flow(executor, own)
    if late:
        rule = version_rule(laid.schedule, tied=True)
        versions = Versions(late, rule, parameters.refresh, away, alone, reducer.renew)
        flow.late = Late(versions, updates_behind(laid.schedule), reducer.spend)
    return flow


def make_evaluator(executor: Executor) -> Executor:
    """The executor of one microbatch, forward only, on the same modules."""
    return Executor(
        executor.modules, forward_of(executor.schedule), executor.place, executor.channels,
        executor.where, executor.activation,
    )  # fmt: skip


def _channels(laid: Laid, context: Context) -> dict[tuple[str, int], Channel]:
    """One a direction and consuming stage, to and from the stages of this rank."""
    found: dict[tuple[str, int], Channel] = {}
    for stage in laid.stages[:-1]:
        after = laid.stages[stage.index + 1]
        for what, consumer, sender in (
            ("F", after.index, stage.names[-1]),
            ("B", stage.index, after.names[0]),
        ):
            comm = context.comm("pp", lane=lane(what, consumer, laid.schedule))
            found[what, consumer] = Channel(comm, f"{sender}:send")
    return found


def _activation(
    laid: Laid, dtype: torch.dtype, device: torch.device
) -> Callable[[int, Any, str], Tensor]:
    """Tensors shaped like a stage's input (F) or output (B), of one element's memory, read off the laid
    program."""

    @cache
    def shape_of(stage: int, what: str) -> tuple[int, ...]:
        blocks = laid.stages[stage].blocks
        t = (
            blocks[0].tensors[blocks[0].input]
            if what == "F"
            else blocks[-1].tensors[blocks[-1].output]
        )
        return tuple(d.local(laid.sizes) for d in t.dims)

    one = torch.empty((), dtype=dtype, device=device)

    def like(stage: int, batch: Any, what: str) -> Tensor:
        shape = shape_of(stage, what)
        if batch is not None:
            shape = (batch.ids.shape[0], *shape[1:])
        return one.expand(shape)

    return like

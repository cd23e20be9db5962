"""The executors of one rank, built from the laid program: its stages, their channels, what they receive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from partita.comm.context import Context
from partita.parallel.dp.replicate import Reducer
from partita.parallel.laid import Laid
from partita.parallel.pp.executor import Channel, Executor
from partita.parallel.pp.rules import forward_of, lane
from partita.train.stage import StageBlocks


def make_executor(
    laid: Laid, context: Context, blocks: Mapping[int, list[Any]], reducer: Reducer,
    dtype: torch.dtype,
) -> Executor:  # fmt: skip
    """The executor of a step. `blocks` are this rank's stages by index, built."""
    modules = {i: StageBlocks(b, laid.stages[i].names, reducer) for i, b in blocks.items()}
    return Executor(
        modules, laid.schedule, context.coords["pp"], _channels(laid, context), context.where,
        _activation(laid, dtype, context.device), reducer.queue,
        lambda stage: reducer.arm(laid.stages[stage].names),
    )  # fmt: skip


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
    """Empty tensors shaped like a stage's input (F) or output (B), read off the laid program."""

    def empty(stage: int, batch: Any, what: str) -> Tensor:
        blocks = laid.stages[stage].blocks
        t = (
            blocks[0].tensors[blocks[0].input]
            if what == "F"
            else blocks[-1].tensors[blocks[-1].output]
        )
        shape = [d.local(laid.sizes) for d in t.dims]
        if batch is not None:
            shape[0] = batch.ids.shape[0]
        return torch.empty(shape, dtype=dtype, device=device)

    return empty

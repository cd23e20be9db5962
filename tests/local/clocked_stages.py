"""Stages whose compute is a sleep of a stated length: the real executor, Comm, messages, kept tensors, so
that any number of ranks runs truthfully on two cores."""

from __future__ import annotations

import time
from types import SimpleNamespace

import torch
from torch import Tensor

from partita.comm.protocol import Where
from partita.comm.threads.local import LocalWorld
from partita.parallel.deferred import WeightQueue
from partita.parallel.pp.executor import Channel, Executor
from partita.parallel.pp.rules import lane
from partita.record.span import Span
from partita.schedule.ir import Schedule

SHAPE = (64, 64)


class Asleep(torch.autograd.Function):
    """F sleeps and keeps x; backward sleeps for I, and hands W's sleep to the queue."""

    @staticmethod
    def forward(ctx, x: Tensor, queue: WeightQueue, costs: SimpleNamespace) -> Tensor:
        time.sleep(costs.F)
        ctx.save_for_backward(x)
        ctx.queue, ctx.costs = queue, costs
        return x + 1

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        time.sleep(ctx.costs.I)
        ctx.queue.add(lambda dy, x: time.sleep(ctx.costs.W), dy, x)
        return dy, None, None


def clocked_executor(world: LocalWorld, schedule: Schedule, costs: SimpleNamespace) -> Executor:
    """The executor of one rank; every stage costs the same."""
    queue = WeightQueue()

    def module(stage: int):
        def run(x: Tensor | None, batch: object) -> Tensor:
            x = torch.zeros(SHAPE, requires_grad=True) if x is None else x
            y = Asleep.apply(x, queue, costs)
            return y.sum() if stage == schedule.num_stages - 1 else y

        return run

    channels = {}
    for what in "FB":
        for stage in range(schedule.num_stages):
            made = world.make(range(world.size), axis="pp", lane=lane(what, stage, schedule))
            channels[what, stage] = Channel(made, f"{stage}:send")
    return Executor(
        {s: module(s) for s in schedule.stages_of(world.rank)}, schedule, world.rank, channels,
        Where(), lambda stage, batch, what: torch.empty(SHAPE), queue, update=lambda stage: None,
    )  # fmt: skip


def clocked_run(world: LocalWorld, schedule: Schedule, costs: SimpleNamespace) -> list[Span]:
    """What the rank did when, on the host's clock; all ranks start together."""
    executor, spans = clocked_executor(world, schedule, costs), []

    class Noted:
        def __init__(self, action):
            self.action = action

        def __enter__(self):
            self.start = time.perf_counter()

        def __exit__(self, *_):
            end, (stage, kind, m) = time.perf_counter(), self.action
            spans.append(
                Span(world.rank, "compute", kind, str(self.action), self.start, end, stage, m)
            )

    executor.span = Noted
    world.comm("world", lane="start").barrier(site="start")
    executor.run([None] * schedule.num_microbatches)
    return spans

"""What routers did in a step, added up over ranks: auxiliary losses, dropped rows, rows of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from partita.comm.protocol import Done, Handle
from partita.parallel.ep.log import Routed, RouterLog
from partita.parallel.laid_step import ROUTING_SUMS

if TYPE_CHECKING:
    from partita.train.step import Model


def logs(model: Model) -> Iterator[tuple[str, RouterLog]]:
    """(block, log) of every layer with experts on this rank."""
    for name, block in zip(model.names, model.blocks, strict=True):
        if getattr(block, "log", None) is not None:
            yield name, block.log


def begin_routing(model: Model, loss_scale: float) -> None:
    """Nothing of the step has been routed yet, but by stages of an asynchronous pipeline that ran ahead."""
    flow = model.flow
    for _, log in logs(model):
        log.clear(0 if flow is None else flow.first)
        log.loss_scale = loss_scale * (1.0 if flow is None else flow.per_step)


def sum_routing(model: Model, end: int | None = None) -> Routed:
    """The step's, the same on every rank; `end`: of the microbatches before that number.

    Communicates: all_reduce of 8 bytes a layer and expert, and 3 sums, over what cuts tokens and layers."""
    return start_routing(model, end)()


def start_routing(model: Model, end: int | None = None) -> Callable[[], Routed]:
    """The same under way; called, it waits for the sum."""
    spec = model.laid.request.model
    if not spec.experts:
        return Routed
    model.context.where.phase = "step"
    layers, experts = spec.expert_layers, spec.experts
    sums = torch.zeros(ROUTING_SUMS + layers * experts, dtype=torch.float64)
    for name, log in logs(model):
        at = ROUTING_SUMS + spec.experts_before(int(name.rpartition(".")[2])) * experts
        seen = log.total(end)
        sums[:ROUTING_SUMS] += torch.stack(
            [seen.balance.double().cpu(), seen.z.double().cpu(), torch.tensor(float(seen.dropped))]
        )
        sums[at : at + experts] = seen.counts.double()
    if model.comms.routing is None:
        return partial(_routed, model, Done(sums))
    site = "step.routing:reduce_from"
    return partial(_routed, model, model.comms.routing.start_all_reduce(sums, site=site))


def _routed(model: Model, handle: Handle) -> Routed:
    sums, spec = handle.wait(), model.laid.request.model
    layers, experts, samples = spec.expert_layers, spec.experts, model.laid.samples
    balance, z, dropped = sums[:ROUTING_SUMS].tolist()
    counts = sums[ROUTING_SUMS:].view(layers, experts).long().tolist()
    return Routed(balance / samples, z / samples, round(dropped), tuple(map(tuple, counts)))

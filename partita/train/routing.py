"""What routers did in a step, added up over ranks: auxiliary losses, dropped rows, rows of each expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from partita.comm.context import Context
from partita.comm.protocol import Comm, Done, Handle
from partita.parallel.ep.log import Routed, RouterLog
from partita.parallel.laid import Laid
from partita.parallel.laid_step import ROUTING_SUMS
from partita.parallel.pp.versions import Flow


class Routing(Protocol):
    """What is asked of a rank's part of a model: its blocks in a row, their names, where they lie, and what
    runs ahead under an asynchronous schedule."""

    laid: Laid
    context: Context
    blocks: Sequence[Any]
    flow: Flow | None

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of `blocks`."""
        ...


def logs(model: Routing) -> Iterator[tuple[str, RouterLog]]:
    """(block, log) of every layer with experts on this rank."""
    for name, block in zip(model.names, model.blocks, strict=True):
        if getattr(block, "log", None) is not None:
            yield name, block.log


def begin_routing(model: Routing, loss_scale: float) -> None:
    """Nothing of the step has been routed yet, but by stages of an asynchronous pipeline that ran ahead."""
    flow = model.flow
    for _, log in logs(model):
        log.clear(0 if flow is None else flow.first)
        log.loss_scale = loss_scale * (1.0 if flow is None else flow.per_step)


def sum_routing(model: Routing, comm: Comm | None, end: int | None = None) -> Routed:
    """The step's, the same on every rank; `end`: of the microbatches before that number.

    Communicates: all_reduce of 8 bytes a layer and expert, and 3 sums, over what cuts tokens and layers."""
    return start_routing(model, comm, end)()


def start_routing(
    model: Routing, comm: Comm | None, end: int | None = None
) -> Callable[[], Routed]:
    """The same under way; called, it waits for the sum."""
    spec = model.laid.request.model
    if not spec.experts:
        return Routed
    model.context.where.phase = "step"
    layers, experts = spec.expert_layers, spec.experts
    sums = torch.zeros(ROUTING_SUMS + layers * experts, dtype=torch.float64)
    found = {name: log.total(end) for name, log in logs(model)}
    each = found.values()
    balance, z, counts = map(
        _told, ([s.balance for s in each], [s.z for s in each], [s.counts for s in each])
    )
    for i, (name, seen) in enumerate(found.items()):
        at = ROUTING_SUMS + spec.experts_before(int(name.rpartition(".")[2])) * experts
        sums[0] += balance[i]
        sums[1] += z[i]
        sums[2] += seen.dropped
        sums[at : at + experts] = counts[i]
    if comm is None:
        return partial(_routed, model, Done(sums))
    site = "step.routing:reduce_from"
    return partial(_routed, model, comm.start_all_reduce(sums, site=site))


def _told(of_layers: list[torch.Tensor]) -> torch.Tensor:
    """A tensor of each layer, float64 on the host, which waits once for all of a device's."""
    if not of_layers:
        return torch.empty(0, dtype=torch.float64)
    if len({one.device for one in of_layers}) > 1:
        of_layers = [one.cpu() for one in of_layers]
    return torch.stack(of_layers).double().cpu()


def _routed(model: Routing, handle: Handle) -> Routed:
    sums, spec = handle.wait(), model.laid.request.model
    layers, experts, samples = spec.expert_layers, spec.experts, model.laid.samples
    balance, z, dropped = sums[:ROUTING_SUMS].tolist()
    counts = sums[ROUTING_SUMS:].view(layers, experts).long().tolist()
    return Routed(balance / samples, z / samples, round(dropped), tuple(map(tuple, counts)))

"""Layers that run beside those of other ranks: how much longer they take than alone is what ranks lose by
evicting each other's caches and sharing the memory's bandwidth.

Ranks that outnumber the units meet after each layer, forward and backward, as those of a step do: whoever
waits hands its core to another rank, whose layers it finds in the caches when it is back."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from partita.comm.protocol import Comm
from partita.tune.pieces import Bench

CROWD = (2, 128, 256, 2048)  # samples, positions, hidden, vocabulary: of a small microbatch
SITE = "calibrate:meeting"


class _Meet(torch.autograd.Function):
    """x, once all are there; its gradient likewise."""

    @staticmethod
    def forward(ctx, x: Tensor, comm: Comm) -> Tensor:
        """Meets."""
        ctx.comm = comm
        comm.barrier(site=SITE)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Meets."""
        ctx.comm.barrier(site=SITE)
        return g, None


class Layers:
    """Layers one behind the other, as in a model of a small microbatch. `meetings`: by ranks that are busy,
    where they meet."""

    def __init__(self, meetings: Mapping[int, Comm]) -> None:
        self.bench, self.meetings = Bench("fp32", CROWD, 0.0, {}), meetings
        samples, seq, hidden, _ = self.bench.shape
        self.x = self.bench.ones(samples, seq, hidden)
        self.seed = torch.ones_like(self.x)
        self.run(None)  # warms up

    def run(self, comm: Comm | None) -> None:
        """Forward and backward through all."""
        y: Tensor = self.x.clone().requires_grad_()
        for layer in self.bench.layers:
            y = layer(y, self.bench.batch)
            if comm is not None:
                y = _Meet.apply(y, comm)  # type: ignore[assignment]
        torch.autograd.backward(y, self.seed)

    def a_second(self, seconds: float, busy: int) -> float:
        """How many layers a second beside those of the other busy ranks, measured for so long; ranks that
        meet end together."""
        comm = self.meetings.get(busy)
        done, start = 0, time.perf_counter()
        while not _is_over(time.perf_counter() - start >= seconds, comm):
            self.run(comm)
            done += len(self.bench.layers)
        return done / (time.perf_counter() - start)


def _is_over(mine: bool, comm: Comm | None) -> bool:
    """Whether this rank is through, or any that it meets."""
    if comm is None:
        return mine
    return bool(comm.all_reduce(torch.tensor([float(mine)]), site=SITE, op="max"))

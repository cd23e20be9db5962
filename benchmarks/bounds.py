"""The least a step could take: matmul seconds at the measured peak, bytes at the measured bandwidth.

Both are taken from the laid program, for the rank that has most of them: its FLOPs (attention causal, so
half its square), and every byte that it declares to hand to a collective, each copied once.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch

from partita.parallel.kernels.product import PLAIN
from partita.parallel.laid import Laid, lay
from partita.parallel.read import backward_factor, op_flops
from partita.simulate.predict import request_of
from partita.spec.job import Job

SIDE = 1024  # of the square matmul whose rate is the peak
COPY = 16 << 20  # bytes of the copy whose rate is the bandwidth


def rates(dtype: torch.dtype, repetitions: int = 15) -> tuple[float, float]:
    """(FLOP/s of a square matmul, bytes/s of a copy) of this rank, as busy as its peers leave the machine."""
    a, b = torch.ones(SIDE, SIDE, dtype=dtype), torch.ones(COPY, dtype=torch.uint8)
    into = torch.empty_like(b)

    def seconds(call) -> float:
        times = []
        for _ in range(repetitions + 2):
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
        return median(times[2:])

    matmul = seconds(lambda: PLAIN.forward(a, a))
    return 2 * SIDE**3 / matmul, COPY / seconds(lambda: into.copy_(b))


def bound(job: Job, flops_per_s: float, bytes_per_s: float) -> tuple[float, float]:
    """(matmul seconds, transfer seconds) of a step on the busiest rank."""
    laid = lay(request_of(job))
    ranks = range(job.plan.world_size)
    work = max(_flops(laid, laid.mesh.coords(rank)["pp"]) for rank in ranks)
    sent = max(sum(line.bytes for line in laid.traffic(rank)) for rank in ranks)
    return work / flops_per_s, sent / bytes_per_s


def _flops(laid: Laid, place: int) -> float:
    found = 0.0
    for stage in laid.stages_of(place):
        for block in stage.blocks:
            for op in block.ops():
                share = 0.5 if op.kind == "attention" else 1.0
                found += share * (1 + backward_factor(op)) * op_flops(op, laid.sizes)
    return found * laid.request.plan.num_microbatches

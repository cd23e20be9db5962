"""The judge of asynchronous schedules: the same delayed updates in a plain loop on one device.

An update is of one microbatch (pipedream) or of a step's (pipedream_2bw). Stage s of p computes microbatch k
with the weights it had after so many updates:

    pipedream       max(0, k - (p-1-s))       each stage another version
    pipedream_2bw   max(0, k // m - 1)        all stages the same

A step's token counts alike in all of its updates: each starts backward from (updates a step) / N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from partita.model.reference import Reference, loss_and_gradients, weight_shapes
from partita.parallel.laid import Laid, lay
from partita.simulate.predict import request_of
from partita.spec.job import Job
from partita.train.build import DTYPES
from partita.train.data import Dataset
from partita.train.optim import learning_rate, make_optimizer
from partita.train.step import Microbatch, decays_weight
from partita.verify.batches import whole_batch
from partita.verify.runs import STEPS, StepSeen, start_value

Weights = dict[str, Tensor]


def is_delayed(job: Job) -> bool:
    """Whether the plan's schedule updates stages before the step is over."""
    return lay(request_of(job)).schedule.is_asynchronous


def run_delayed(job: Job, data: Dataset) -> list[StepSeen]:
    """STEPS steps without a drain between."""
    laid, dtype = lay(request_of(job)), DTYPES[job.plan.precision.dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = {
        n: start_value(job, n, s, tuple((0, k) for k in s), wide)
        for n, s in weight_shapes(job.model).items()
    }
    optimizer = make_optimizer([(n, w, decays_weight(n)) for n, w in weights.items()], job.train)
    history, m = [_copy(weights)], job.plan.num_microbatches
    size = m if laid.schedule.versions == "previous" else 1
    found = []
    for step in range(STEPS):
        batches = whole_batch(data, job, step)
        counts = [int(b.valid.sum()) for b in batches]
        loss, gradients = 0.0, {}
        for first in range(0, m, size):
            gradients = {n: torch.zeros_like(w) for n, w in weights.items()}
            for i in range(first, first + size):
                seen = _weights_of(laid, history, step * m + i)
                part, of = _one(Reference(job.model, seen, dtype, job.seed), batches[i], step)
                share = max(counts[i], 1) / max(sum(counts), 1)
                loss += part * share
                for n, g in of.items():
                    gradients[n] += g * (share * (m // size))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(job.train, step + 1)
            for n, w in weights.items():
                w.grad = gradients[n].clone()
            optimizer.step()
            history.append(_copy(weights))
        squares = torch.stack([g.double().square().sum() for g in gradients.values()])
        norm = float(squares.sum().sqrt())
        dense = (0.0, 0.0, 0.0)  # no auxiliary losses
        found.append(StepSeen(loss, norm, gradients, _copy(weights), dense))
    return found


def _one(judge: Reference, batch: Microbatch, step: int) -> tuple[float, Weights]:
    judge.step = step
    return loss_and_gradients(judge, [batch])


def _copy(weights: Weights) -> Weights:
    return {n: w.detach().clone() for n, w in weights.items()}


def _weights_of(laid: Laid, history: list[Weights], microbatch: int) -> Weights:
    """Each weight in the version that its stage uses for a microbatch."""
    m, last = laid.request.plan.num_microbatches, len(laid.stages) - 1
    found = {}
    for s in laid.stages:
        version = microbatch - (last - s.index)
        if laid.schedule.versions == "previous":
            version = microbatch // m - 1
        for name, block in zip(s.names, s.blocks, strict=True):
            for w in block.weights():
                full = laid.full_name(name, w.name)
                found[full] = history[max(0, version)][full]
    return found

"""The judge of asynchronous schedules: the same delayed updates in a plain loop on one device.

An update is of one microbatch (pipedream) or of a step's (pipedream_2bw). Stage s of p computes microbatch k
with the weights it had after so many updates:

    pipedream       max(0, k - (p-1-s))       each stage another version
      vertical      max(0, k - (p-1))         all stages that of the first; so does a tied table always
    pipedream_2bw   max(0, k // m - 1)        all stages the same

A step's token counts alike in all of its updates: each starts backward from (updates a step) / N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partita.model.reference import Reference, loss_and_gradients
from partita.model.reference_moe import Auxiliary, Told
from partita.parallel.laid import Laid, lay
from partita.simulate.predict import request_of
from partita.spec.job import Job
from partita.train.build import DTYPES
from partita.train.data import Dataset
from partita.train.step import Microbatch
from partita.verify.batches import whole_batch
from partita.verify.judge import JudgeUpdate, wide_dtype
from partita.verify.runs import StepSeen, judged_routing, linear_of, steps_of

Weights = dict[str, Tensor]


def is_delayed(job: Job) -> bool:
    """Whether the plan's schedule updates stages before the step is over."""
    return lay(request_of(job)).schedule.is_asynchronous


def run_delayed(job: Job, data: Dataset, told: Told | None = None) -> list[StepSeen]:
    """A plan's steps without a drain between. `told`: whom the plan's routers chose."""
    laid, update = lay(request_of(job)), JudgeUpdate.of(job, wide_dtype(job))
    history, m = [_copy(update.weights)], job.plan.num_microbatches
    return [
        delayed_step(laid, update, history, whole_batch(data, job, step), step, step * m, told)
        for step in range(steps_of(job.plan))
    ]


def delayed_step(
    laid: Laid, update: JudgeUpdate, history: list[Weights], batches: Sequence[Microbatch],
    step: int, begun: int = 0, told: Told | None = None,
) -> StepSeen:  # fmt: skip
    """One step, `begun` microbatches after the pipeline was last empty. `history`: the weights at that time
    and after each update since; this step's are added."""
    job, m = update.job, len(batches)
    dtype, weights = DTYPES[job.plan.precision.dtype], update.weights
    samples = job.train.global_batch_size
    size = m if laid.schedule.versions == "previous" else 1
    loss, gradients, norm, seen = 0.0, {}, 0.0, Auxiliary()
    for first in range(0, m, size):
        gradients = {n: torch.zeros_like(w) for n, w in weights.items() if n not in update.frozen}
        for i in range(first, first + size):
            judge = Reference(
                job.model,
                _weights_of(laid, history, begun + i),
                dtype,
                job.seed,
                linear=linear_of(job),
                told=told,
            )
            judge.step = step
            part, of = loss_and_gradients(judge, [batches[i]], whole=batches, frozen=update.frozen)
            loss += part
            seen.add(judge.auxiliary)
            for n, g in of.items():
                gradients[n] += g * (m // size)
        norm = update.norm(gradients)
        update.step(gradients, norm, step, (step * m + first) // size)
        history.append(_copy(weights))
    auxiliary, loads = judged_routing(seen, samples)
    return StepSeen(loss, norm, gradients, _copy(weights), auxiliary, loads=loads)


def _copy(weights: Weights) -> Weights:
    return {n: w.detach().clone() for n, w in weights.items()}


def _weights_of(laid: Laid, history: list[Weights], microbatch: int) -> Weights:
    """Each weight in the version that its stage uses for a microbatch; a tied one has the first stage's."""
    m, last = laid.request.plan.num_microbatches, len(laid.stages) - 1
    found = {}
    for s in laid.stages:
        for name, block in zip(s.names, s.blocks, strict=True):
            for w in block.weights():
                full = laid.full_name(name, w.name)
                first = laid.schedule.versions == "vertical" or full in laid.program.tied
                version = microbatch - (last if first else last - s.index)
                if laid.schedule.versions == "previous":
                    version = microbatch // m - 1
                found[full] = history[max(0, version)][full]
    return found

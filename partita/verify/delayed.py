"""The judge of asynchronous schedules: the same delayed updates in a plain loop on one device.

An update is of one microbatch (pipedream) or of a step's (pipedream_2bw). Stage s of p computes microbatch k
with the weights it had after so many updates:

    pipedream       max(0, k - (p-1-s))       each stage another version
      vertical      max(0, k - (p-1))         all stages that of the first; so does a tied table always
    pipedream_2bw   max(0, k // m - 1)        all stages the same

      stated        a file's: what the U before its F in the list have made; from step to step nothing is left

A step's token counts alike in all of its updates: each starts backward from (updates a step) / N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from partita.model.reference import Reference, loss_and_gradients
from partita.model.reference_moe import Auxiliary, Told
from partita.parallel.laid import Laid, lay
from partita.schedule.versions import versions_used
from partita.simulate.predict import request_of
from partita.spec.job import Job
from partita.train.build import DTYPES
from partita.train.data.dataset import Dataset
from partita.train.step import Microbatch
from partita.verify.batches import whole_batch
from partita.verify.judge import JudgeUpdate, wide_dtype
from partita.verify.runs import StepSeen, judged_routing, linear_of, steps_of

Weights = dict[str, Tensor]


def is_delayed(job: Job) -> bool:
    """Whether the plan's schedule updates stages before the step is over."""
    return lay(request_of(job)).schedule.is_asynchronous


def run_delayed(
    job: Job,
    data: Dataset,
    told: Told | None = None,
    moved: Callable[[Weights], Weights] = lambda weights: weights,
) -> list[StepSeen]:
    """A plan's steps without a drain between. `told` and `moved` as run_judge takes them."""
    laid, update = lay(request_of(job)), JudgeUpdate.of(job, wide_dtype(job))
    if not laid.schedule.runs_ahead:
        return [
            stated_step(laid, update, whole_batch(data, job, step), step, told, moved)
            for step in range(steps_of(job.plan))
        ]
    history, m = [_copy(update.weights)], job.plan.num_microbatches
    return [
        delayed_step(
            laid, update, history, whole_batch(data, job, step), step, step * m, told, moved
        )
        for step in range(steps_of(job.plan))
    ]


def delayed_step(
    laid: Laid, update: JudgeUpdate, history: list[Weights], batches: Sequence[Microbatch],
    step: int, begun: int = 0, told: Told | None = None,
    moved: Callable[[Weights], Weights] = lambda weights: weights,
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
                moved(_weights_of(laid, history, begun + i)),
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


def stated_step(
    laid: Laid, update: JudgeUpdate, batches: Sequence[Microbatch], step: int, told: Told | None = None,
    moved: Callable[[Weights], Weights] = lambda weights: weights,
) -> StepSeen:  # fmt: skip
    """One step of a list that ends it: of every microbatch and every update what comes next is made as
    soon as all that it needs is there."""
    job, dtype = update.job, DTYPES[update.job.plan.precision.dtype]
    used, covers = versions_used(laid.schedule), _covered(laid)
    names = [_names(laid, s.index) - update.frozen for s in laid.stages]
    history = [[_copy(update.weights)] for _ in laid.stages]
    made: dict[int, Weights] = {}
    loss, last, seen = 0.0, Weights(), Auxiliary()
    while any(len(done) <= len(each) for done, each in zip(history, covers, strict=True)):
        for k in (k for k in range(len(batches)) if k not in made):
            at = [used[s.index, k] for s in laid.stages]
            if all(v < len(done) for v, done in zip(at, history, strict=True)):
                weights = dict(update.weights)
                for s, v, done in zip(laid.stages, at, history, strict=True):
                    weights |= {n: done[v][n] for n in _names(laid, s.index)}
                judge = Reference(
                    job.model, moved(weights), dtype, job.seed, linear=linear_of(job), told=told
                )
                judge.step = step
                part, made[k] = loss_and_gradients(
                    judge, [batches[k]], whole=batches, frozen=update.frozen
                )
                loss += part
                seen.add(judge.auxiliary)
        for own, each, done in zip(names, covers, history, strict=True):
            number = len(done) - 1
            if number < len(each) and all(k in made for k in each[number]):
                sums = {n: sum(made[k][n] for k in each[number]) * len(each) for n in own}
                update.step(sums, 0.0, step, step * len(each) + number)
                last |= sums
                done.append(_copy(update.weights))
    auxiliary, loads = judged_routing(seen, job.train.global_batch_size)
    return StepSeen(loss, update.norm(last), last, _copy(update.weights), auxiliary, loads=loads)


def _covered(laid: Laid) -> list[list[list[int]]]:
    """Of each stage the microbatches whose gradients each of its updates takes."""
    found: list[list[list[int]]] = [[] for _ in laid.stages]
    since: list[list[int]] = [[] for _ in laid.stages]
    for stage, kind, microbatch in laid.schedule.actions():
        if kind in ("B", "W"):
            since[stage].append(microbatch)
        elif kind == "U":
            found[stage].append(since[stage])
            since[stage] = []
    return found


def _names(laid: Laid, stage: int) -> set[str]:
    s = laid.stages[stage]
    each = zip(s.names, s.blocks, strict=True)
    return {laid.full_name(name, w.name) for name, block in each for w in block.weights()}


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

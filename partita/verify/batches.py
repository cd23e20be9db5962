"""The batches that verify judges on: the job's own, with targets masked unevenly.

A whole microbatch has no valid target, and so has a whole data-parallel rank in another one; others in the
next step, so that each has some in one of the two, and the last one, which drains a pipeline, in the last
step. Of the other samples each keeps a share of its own.
The mask belongs to samples: every plan and the judge see the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from partita.comm.random.seeds import uniform
from partita.spec.job import Job
from partita.train.build import Built, microbatch, open_job_data
from partita.train.data.dataset import Dataset
from partita.train.data.streams import Batch
from partita.train.step import Microbatch, StepBatch


def open_data(job: Job, original: Job) -> Dataset:
    """The job's data; ids are folded into a shrunk vocabulary when they are used. Where tokens are masked
    half of them are at least: of few tokens none may be."""
    data = open_job_data(replace(original, train=job.train))
    masking = data.masking
    if masking is not None:
        masking = replace(masking, probability=max(masking.probability, 0.5))
    size = job.train.global_batch_size
    return replace(data, seq_len=job.train.seq_len, global_batch_size=size, masking=masking)


def samples_of(data: Dataset, job: Job, step: int, samples: Sequence[int]) -> Microbatch:
    """These samples of a step, masked."""
    raw = data.microbatch(step, samples)
    vocab = job.model.vocab
    valid = raw.valid.clone()
    for row, sample in enumerate(samples):
        valid[row] &= keep(job, step, sample, valid.shape[1])
    ids = raw.ids if raw.ids.is_floating_point() else raw.ids % vocab
    part = Batch(ids, raw.targets % vocab, valid, raw.documents)
    return microbatch(part, samples, step)


def keep(job: Job, step: int, sample: int, seq_len: int) -> torch.Tensor:
    """bool [seq]: the targets of a sample that count."""
    plan, size = job.plan, job.micro_batch_size
    ways, m = plan.data_parallel_size, plan.num_microbatches
    number, place = divmod(sample, size * ways)
    empty_microbatch = m > 1 and number == (m + 1) // 2 - min(step, 1)
    empty_rank = ways > 1 and number == 0 and place // size == (ways - 1 + step) % ways
    if empty_microbatch or empty_rank:
        return torch.zeros(seq_len, dtype=torch.bool)
    if seq_len == 1:  # images: few, and each has one label
        return torch.tensor([sample % 4 != 3])
    share = 0.3 + 0.6 * float(uniform(job.seed, "verify/share", torch.tensor([sample])))
    dice = uniform(job.seed + step, f"verify/mask/{sample}", torch.arange(seq_len))
    return dice < share


def rank_batch(built: Built, step: int) -> StepBatch:
    """A rank's part of the step."""
    found = [samples_of(built.data, built.job, step, list(s)) for s in built.samples()]
    return StepBatch(step, [built.own(whole) for whole in found])


def whole_batch(data: Dataset, job: Job, step: int) -> list[Microbatch]:
    """The step's samples microbatch by microbatch, all ranks' together."""
    each = job.micro_batch_size * job.plan.data_parallel_size
    starts = range(0, job.plan.num_microbatches * each, each)
    return [samples_of(data, job, step, list(range(s, s + each))) for s in starts]

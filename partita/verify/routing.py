"""What routers chose on a plan's ranks, put together for a judge that follows it at low precision: there
the plan's scores are rounded otherwise than the judge's, and of two experts that are all but as good each may
take another. What the judge could not have chosen, it does not follow (`Told`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from partita.model.reference_moe import Told
from partita.spec.job import Job
from partita.train.routing import logs
from partita.train.step import Microbatch, Model
from partita.verify.watch import places, share_of

Choices = dict[tuple[int, str, int], tuple[Tensor, Tensor]]  # (step, layer, sample) -> at, chosen


def keep_choices(model: Model) -> None:
    """From now on, at low precision, routers remember whom they chose."""
    for _, log in logs(model):
        log.keeps = model.laid.request.plan.precision.dtype != "fp64"


def choices(model: Model, step: int, batches: Sequence[Microbatch]) -> Choices:
    """Whom this rank's tokens were sent to in the microbatches of a step, and of those behind it that an
    asynchronous pipeline has begun; `at` are a token's positions."""
    m, length = model.laid.request.plan.num_microbatches, model.laid.request.seq_len
    begun = step * m if model.laid.schedule.runs_ahead else 0
    cut_by = ("cp", "ulysses", "tp") if model.context.plan.mesh.sp else ("cp", "ulysses")
    found: Choices = {}
    for name, log in logs(model):
        for number, seen in log.seen.items():
            if seen.chosen is None:
                continue
            batch = batches[number - begun]
            at = places(batch, seen.chosen.shape[1], share_of(model, cut_by))
            for row, sample in enumerate(batch.samples.tolist()):
                key, real = (step + (number - begun) // m, name, sample), at[row] < length
                found[key] = at[row][real], seen.chosen[row].cpu()[real]
    return found


def told(job: Job, ranks: Iterable[Choices], near: float) -> Told | None:
    """All ranks' choices as the judge asks for them, for scores that may lie `near` apart; None in float64,
    where it makes its own."""
    whole: dict[tuple[int, str, int], Tensor] = {}
    for held in ranks:
        for key, (at, chosen) in held.items():
            shape = (job.train.seq_len, chosen.shape[-1])
            whole.setdefault(key, torch.zeros(shape, dtype=torch.int64))[at] = chosen
    return Told(whole, near) if whole else None

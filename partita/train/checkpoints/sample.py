"""Text that a checkpoint's model writes, on one device: the job's, where this host has it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from partita.base.errors import CheckpointError, UsageError
from partita.comm.protocol import Where
from partita.comm.single import SingleWorld
from partita.model.generate import continued, drawn, likeliest
from partita.parallel.laid import lay
from partita.simulate.predict import request_of
from partita.spec.job import Job
from partita.spec.plan import Plan
from partita.train.build import make_context, make_model, open_job_data
from partita.train.checkpoints.checkpoint import load
from partita.train.checkpoints.pieces import Wanted
from partita.train.devices import reading_device
from partita.train.step import Model


@dataclass(frozen=True)
class Text:
    """What was written: the prompt's continuation."""

    text: str
    token_ids: list[int]


def job_of(step_folder: Path) -> Job:
    """The job that wrote a checkpoint: job.toml of its run folder."""
    path = step_folder.parent.parent / "job.toml"
    if not path.exists():
        raise CheckpointError(
            f"{step_folder} is no checkpoint of a run, runs/NAME/checkpoints/step-N, which is read with its "
            f"run's job.toml: {path} is missing",
            file=str(step_folder),
        )
    return Job.load(path)


def load_single(step_folder: Path, job: Job) -> Model:
    """The whole model of a checkpoint on one rank, fp32, on the job's device (none here: the CPU)."""
    plan = Plan().with_("pipeline", num_microbatches=1)
    train = replace(job.train, global_batch_size=1, micro_batch_size=1)
    alone = replace(job, plan=plan, train=train)
    laid = lay(request_of(alone))
    device = reading_device(job)
    context = make_context(laid, alone, SingleWorld(), Where(), device=device)
    model = make_model(alone, laid, context, lambda unit: None)
    wanted = []
    for unit in model.units:
        for weight, first, size in unit.places:
            shape = laid.layouts[weight].shape
            whole = tuple((0, n) for n in shape)
            wanted.append(
                Wanted(
                    weight, "weight", shape, whole, unit.master[first : first + size].view(shape)
                )
            )
    load(step_folder, wanted)
    model.parameters.refresh()
    for block in model.blocks:
        block.training = False
    return model


def continue_text(
    step_folder: Path, prompt: str, new_tokens: int, temperature: float = 0.0
) -> Text:
    """Continuation of `prompt`, greedy, or drawn by the job's seed at a temperature above 0. Raises
    UsageError where the run has no tokenizer."""
    job = job_of(step_folder)
    data = open_job_data(job)
    if data.tokenizer is None:
        raise UsageError(
            f"{job.data.source} has no tokenizer: nothing can be read or written as text"
        )
    ids = list(data.tokenizer.encode(prompt))
    if not ids:
        raise UsageError("the prompt is empty: give at least one character", key="prompt")
    model = load_single(step_folder, job)
    choose = drawn(job.seed, temperature) if temperature else likeliest
    window, vocab = job.train.seq_len, job.model.vocab
    device = model.context.device
    new = continued(model.blocks, ids, new_tokens, window, vocab, choose, device)
    return Text(data.tokenizer.decode(new), new)

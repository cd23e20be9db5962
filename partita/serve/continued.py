"""One text continued by a checkpoint's model, on the ranks of a plan."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from partita.base.errors import NonFiniteError, PeerError, UsageError
from partita.serve.engine import Engine
from partita.serve.request import SamplingParams
from partita.serve.runner import open_runner
from partita.serve.weights import StepWeights, found
from partita.train.build import open_job_data
from partita.train.checkpoints.sample import Text, job_of
from partita.train.data.tokenizer import Tokenizer, open_tokenizer
from partita.train.devices import reading_device

PAGE = 16  # tokens


@dataclass(frozen=True)
class Source:
    """What a folder says of its text: `window` is how many tokens its model has learned to see; `special`,
    whether a prompt begins as the tokenizer's file says (a <s>, mostly): not in runs of ours."""

    tokenizer: Tokenizer
    window: int
    device: str
    special: bool = False


def source_of(folder: Path) -> Source:
    """A run's as its job has it, on the job's device (none here: the CPU); a Hugging Face folder's as its
    files have it. Raises UsageError where there is no tokenizer."""
    spec, weights = found(folder)
    if not isinstance(weights, StepWeights):
        return Source(open_tokenizer(str(folder), vocab=spec.vocab), spec.max_seq_len, "cpu", True)
    job = job_of(weights.folder)
    tokenizer = open_job_data(job).tokenizer
    if tokenizer is None:
        text = f"{job.data.source} has no tokenizer: nothing can be read or written as text"
        raise UsageError(text)
    return Source(tokenizer, min(job.train.seq_len, spec.max_seq_len), str(reading_device(job)))


def continued(folder: Path, prompt: str, params: SamplingParams, plan: str = "") -> Text:
    """`params.max_tokens` tokens behind a prompt, whatever they are; a text longer than the model sees is
    continued by its end, computed again for each token."""
    source = source_of(folder)
    ids = source.tokenizer.encode(prompt, source.special)
    if not ids:
        raise UsageError("the prompt is empty: give at least one character", key="prompt")
    whole = len(ids) + params.max_tokens
    pages = -(-min(whole, source.window + 1) // PAGE)
    runner = open_runner(folder, plan, pages=pages, page_size=PAGE, device=source.device)
    window = min(source.window, runner.max_len - 1)
    with closing(Engine(runner, source.tokenizer, max_sequences=1)) as engine:
        while len(ids) < whole:
            room = max(window + 1 - len(ids), 1)
            asked = replace(params, max_tokens=min(whole - len(ids), room), ignore_eos=True)
            (output,) = engine.submit(ids[-window:], asked).collect()
            if output.error is not None:
                raise (PeerError if engine.stats().failed else NonFiniteError)(output.error)
            ids += output.token_ids
            if params.seed is not None:  # a request counts its own tokens
                params = replace(params, seed=params.seed + 1)
    new = ids[whole - params.max_tokens :]
    return Text(source.tokenizer.decode(new), new)

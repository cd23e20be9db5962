"""What is decided before any rank starts, by one process: the launcher, or rank 0 under torchrun.

Which run folder, which checkpoint to go on from, whether the job may, whether the data can be read and
whether the disk has room for what will be saved. Nothing of an older run is touched before all that holds.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from partita.base.errors import WriteError
from partita.base.units import format_bytes
from partita.parallel.laid import lay
from partita.record.run import (
    FACTS,
    RunFacts,
    forget_measured,
    read_metrics,
    write_record,
    write_trace,
)
from partita.record.run import FOLDER as RECORDS
from partita.simulate.forecast import forecast
from partita.simulate.predict import Prediction, request_of
from partita.spec.job import Job
from partita.train.build import fingerprint, open_job_data
from partita.train.checkpoints.checkpoint import list_checkpoints, newest_complete
from partita.train.checkpoints.manifest import read_manifest
from partita.train.checkpoints.resume import Stated, check_resumes, header, verify_run
from partita.train.checkpoints.sample import continue_text
from partita.train.data.tokenizer import write_whole
from partita.train.launch.failure import forget
from partita.train.optimizer.optim import state_names
from partita.train.recorder import machine
from partita.train.track import absent

ROOT = Path("runs")
METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
WRITTEN = ("job.toml", METRICS, "trace.json", "failure.json", "sample.txt")
UPDATES = ("lr", "lr_schedule", "warmup_steps", "min_lr", "weight_decay", "clip_grad_norm")
PROMPT, SAMPLE_TOKENS = "def ", 96
TEMPERATURE = 0.8  # the likeliest words of a small model repeat themselves


@dataclass(frozen=True)
class Start:
    """Where a run goes on: `checkpoint` None from the beginning; `step` updates are done."""

    checkpoint: Path | None
    step: int
    notices: tuple[str, ...] = ()


def run_folder(job: Job, fresh: bool) -> Path:
    """runs/<name> of the current folder, absolute; with `fresh` the first of <name>, <name>-2, ... that
    is not there. Raises WriteError where it cannot be written."""
    folder = ROOT / job.name
    number = 2
    while fresh and folder.exists():
        folder = ROOT / f"{job.name}-{number}"
        number += 1
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        shut = list(_shut(folder))
    except OSError as error:
        told = f"cannot write the run folder {folder}: {error.strerror}"
        raise WriteError(told, file=str(folder)) from error
    if shut:
        told = "; ".join(f"{path}: {why}" for path, why in shut)
        raise WriteError(f"cannot write {told}", file=str(shut[0][0]))
    return folder.absolute()


def _shut(folder: Path) -> Iterator[tuple[Path, str]]:
    """What of a run folder the run could not write, and why; seen before the steps are done that it would
    lose. Raises OSError where nothing can be written in the folder itself."""
    _probe(folder)
    for part in (folder / "logs", folder / CHECKPOINTS, folder / RECORDS):
        try:
            if part.exists():
                _probe(part)
        except OSError as error:
            yield part, error.strerror or str(error)
    logs = (folder / "logs").iterdir() if os.access(folder / "logs", os.R_OK | os.X_OK) else ()
    for path in (*map(folder.joinpath, WRITTEN), *logs):
        if path.exists() and not path.is_file():
            yield path, "it is no plain file"
        elif path.exists() and not os.access(path, os.R_OK | os.W_OK):
            yield path, "no permission to read and write it"


def _probe(folder: Path) -> None:
    probe = folder / ".probe"
    probe.write_text("partita")
    probe.unlink()


def prepare(job: Job, prediction: Prediction, folder: Path, allow_fallback: bool) -> Start:
    """Finds where to go on and writes job.toml and the prediction; the caller holds the folder's lock.

    Raises CheckpointError (the newest is damaged), UsageError (the job differs from the checkpoint),
    DataError, WriteError (no room for the checkpoints to come).
    """
    data = open_job_data(job)
    checkpoints = folder / CHECKPOINTS
    newest = newest_complete(checkpoints, allow_fallback=allow_fallback, check=verify_run)
    notices: list[str] = []
    step = 0
    layouts = lay(request_of(job)).layouts
    mine = header(job, Stated(layouts, 0, fingerprint(data)))
    if newest is not None:
        check_resumes(newest, mine)
        step = read_manifest(newest).step
        skipped = list_checkpoints(checkpoints)[0]
        if skipped != newest:
            notices.append(f"{skipped} is damaged: going on from {newest}")
    if step < job.train.steps:
        _check_room(job, mine.tensors, checkpoints, step)
        notices += [p.message for p in prediction.problems if p.severity == "warning"]
        notices += absent(job.train.track)
        notices += _begin(folder, step, _changed(job, folder / "job.toml"))
        forget_measured(folder)
        write_whole(folder / "job.toml", job.to_toml().encode())
        write_record(folder / RECORDS / "prediction.json", forecast(prediction))
    forget(folder)
    return Start(newest, step, tuple(notices))


def _changed(job: Job, before: Path) -> str:
    """What of the updates to come is not as the start before had it: allowed, yet never without a word."""
    try:
        then = tomllib.loads(before.read_text(encoding="utf-8"))["train"]
    except (OSError, ValueError, KeyError):  # none, or none of ours
        return ""
    now = tomllib.loads(job.to_toml())["train"]
    keys = [k for k in UPDATES if then.get(k) != now.get(k)]
    if now["lr_schedule"] == "cosine" and then.get("steps") != now["steps"]:
        keys.append("steps")
    told = (f"train.{k} = {now.get(k)} (it was {then.get(k)})" for k in keys)
    return f" with {', '.join(told)}" if keys else ""


def _begin(folder: Path, step: int, changed: str) -> list[str]:
    """What a start says that is not the folder's first. Metrics of steps that no checkpoint holds are kept
    beside those to come, as metrics-1.jsonl, metrics-2.jsonl, ...: they may be all that is left of a run."""
    metrics = folder / METRICS
    done = max((x["step"] for x in read_metrics(metrics)), default=0) if metrics.exists() else 0
    run = ROOT / folder.name
    if step:
        return [f"{run} goes on from step {step}{changed}"]
    if not done:
        return []
    number = 1
    while (aside := folder / f"metrics-{number}.jsonl").exists():
        number += 1
    metrics.rename(aside)
    return [
        f"{run} holds no checkpoint, so it starts anew; the metrics of {done} step{'s' * (done > 1)} done "
        f"before are in {aside.name}"
    ]


def checkpoint_bytes(job: Job, tensors: dict[str, tuple[int, ...]]) -> int:
    """Of one checkpoint: every weight and its optimizer states."""
    each = 8 if job.plan.precision.dtype == "fp64" else 4
    return sum(map(prod, tensors.values())) * each * (1 + len(state_names(job.train)))


def _check_room(job: Job, tensors: dict[str, tuple[int, ...]], folder: Path, step: int) -> None:
    """WriteError where the checkpoints that will stand side by side cannot fit the disk."""
    one = checkpoint_bytes(job, tensors)
    every, steps = job.train.checkpoint_every, job.train.steps
    saves = steps // every - step // every + bool(steps % every) if every else 1
    kept = len(list_checkpoints(folder))
    more = max(1, min(job.train.keep_last + 1, kept + saves) - kept)
    free = shutil.disk_usage(folder.parent).free
    if free < more * one:
        raise WriteError(
            f"{folder}: {more} more checkpoint{'s' * (more > 1)} of {format_bytes(one)} will stand here "
            f"and {format_bytes(free)} are free: make room, or lower train.keep_last",
            file=str(folder),
        )


def answer(job: Job, folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics with the run's folder, as the user named it, and its plan."""
    return {**metrics, "run": str(ROOT / folder.name), "plan": str(job.plan)}


def finished(job: Job, folder: Path, start: Start) -> dict[str, Any]:
    """What a finished run answers when it is started again, with the plan it was trained under last. What
    a start that was killed at the end did not come to write is written now."""
    assert start.checkpoint is not None
    lines = [x for x in read_metrics(folder / METRICS) if x["step"] <= start.step]
    found = answer(job, folder, lines[-1] if lines else {"step": start.step})
    found |= {"plan": read_manifest(start.checkpoint).header.plan, "already_done": True}
    whole = (folder / RECORDS / FACTS).exists()
    return found if whole else with_text(job, folder, found)


def with_text(job: Job, folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Adds what a finished run is judged by: the unigram entropy, and a few lines the model wrote."""
    data = open_job_data(job)
    entropy = data.unigram_entropy()
    found = {**metrics, "unigram_entropy": entropy}
    newest = newest_complete(folder / CHECKPOINTS, allow_fallback=True)
    if job.model.causal and data.tokenizer is not None and newest is not None:
        written = continue_text(newest, PROMPT, SAMPLE_TOKENS, TEMPERATURE)
        found["sample"] = PROMPT + written.text
        (folder / "sample.txt").write_text(found["sample"] + "\n", encoding="utf-8")
    text = found.get("sample", "").removeprefix(PROMPT)
    write_trace(folder)
    write_record(folder / RECORDS / FACTS, RunFacts(machine(), entropy, PROMPT, text))
    return found

"""How verbs take a job: a file with overrides, or a model and a cluster with a plan's line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.base.errors import UsageError
from partita.cli.out import note, waiting
from partita.spec.calibrated import calibrated
from partita.spec.job import Job
from partita.spec.model import ModelSpec

JobFile = Annotated[str, typer.Argument(metavar="JOB.toml", help="The job file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...", help='Overrides, e.g. plan="tp2+sp" train.lr=1e-3.'
    ),
]
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="JOB.toml [SECTION.FIELD=VALUE]... | MODEL CLUSTER",
        help="A job file and overrides; or a model (a preset, a Hugging Face folder, a TOML) and a cluster "
        '(a preset such as "16xh100" or a TOML).',
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
PlanLine = Annotated[
    str | None, typer.Option("--plan", help='A plan, e.g. "pp2:1f1b/8mb tp2+sp bf16".')
]
GlobalBatchSize = Annotated[int | None, typer.Option(help="Sequences a step.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens a sequence; 1 of images.")]
MicroBatchSize = Annotated[int | None, typer.Option(help="Sequences a microbatch and replica.")]


def load(
    path: str, overrides: list[str] | None, plan: str | None = None, quiet: bool = False
) -> Job:
    """The job of a file, `plan` and overrides applied, on this machine as measured; for 'auto' the plan is
    searched. Raises UsageError, PlanError where nothing fits."""
    return with_auto(_load(path, overrides, plan), quiet)


def with_auto(job: Job, quiet: bool = False) -> Job:
    """The job with the plan that 'auto' stands for, which is told; that it is searched for, too, unless
    `quiet`."""
    if not job.auto:
        return job
    from partita.planner.answers.ask import AUTO_S, resolved

    with waiting(f'plan = "auto"  searching, {AUTO_S:g} s at most', quiet):
        found = resolved(job)
    note(f'plan = "auto" is {found.plan}')
    return found


def _load(path: str, overrides: list[str] | None, plan: str | None) -> Job:
    extra = [f"plan={plan}"] if plan is not None else []
    return _measured(Job.load(path, *(overrides or []), *extra))


def _measured(job: Job) -> Job:
    found = calibrated(job.cluster)
    return job if found == job.cluster else replace(job, cluster=found)


def from_words(words: list[str], plan: str | None, batch: dict[str, Any]) -> Job:
    """`JOB.toml [overrides]`, or `MODEL CLUSTER` with --plan, --global-batch-size and --seq-len,
    which is 1 of images."""
    alone = len(words) == 1 or "=" in words[1]
    if alone and not words[0].endswith(".toml") and not Path(words[0]).exists():
        text = f"{words[0]} alone is no job file; a model takes a cluster behind it: {words[0]} 16xh100"
        raise UsageError(text)
    if len(words) < 2 or "=" in words[1] or _is_job(words[0]):
        extra = [f"train.{k}={v}" for k, v in batch.items() if v is not None]
        return _load(words[0], [*words[1:], *extra], plan)
    stated = {k: v for k, v in batch.items() if v is not None}
    if ModelSpec.load(words[0]).image is not None:
        stated.setdefault("seq_len", 1)
    missing = [
        f"--{k.replace('_', '-')}" for k in ("global_batch_size", "seq_len") if k not in stated
    ]
    if missing:
        raise UsageError(f"{words[0]} on {words[1]} needs {' and '.join(missing)}")
    job = Job.of(words[0], words[1], plan or "", **stated)
    if len(words) > 2:
        raise UsageError(f"overrides ({words[2]}) go with a job file")
    return _measured(job)


def _is_job(path: str) -> bool:
    """A TOML file with the sections of a job, not of a model."""
    if not path.endswith(".toml") or not Path(path).is_file():
        return path.endswith(".toml") and not Path(path).exists()
    from partita.base.config import load_toml

    return "model" in load_toml(path)

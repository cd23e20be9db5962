"""A job whose ranks torchrun started: this process is one of them.

Rank 0 decides what a launcher would (launch/start.py), holds the run folder's lock, and tells the others
through torchrun's store: folder and checkpoint, or the error that ends all of them. The folder is one that
all hosts share. Ranks of one host meet in shared memory, as local ranks do, and give the same numbers.
"""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from partita.base import errors
from partita.base.errors import PartitaError, UsageError
from partita.comm.liveness.lifeline import Lifeline, Lost
from partita.comm.liveness.rollcall import RollCall
from partita.comm.processes import is_one_host, torchrun_rank
from partita.simulate.predict import Prediction
from partita.spec.job import Job
from partita.train.checkpoints.checkpoint import outlook
from partita.train.control import Control
from partita.train.launch.examine import Needs, needs_of
from partita.train.launch.failure import Failure
from partita.train.launch.lock import RunLock
from partita.train.launch.rank import Report, RunSpec, new_scratch, run_rank
from partita.train.launch.stacks import leave_stacks
from partita.train.launch.start import answer, finished, prepare, run_folder, with_text

KEY = "partita/start"


class _Sink:
    """Takes a rank's reports where there is no launcher."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def send(self, report: Report) -> None:
        """Keeps it."""
        self.reports.append(report)


@dataclass(frozen=True)
class _Told:
    """What rank 0 tells the others: where the run is, and how many updates are done."""

    folder: str
    checkpoint: str | None
    step: int
    scratch: str | None  # on one host the folder of what its ranks share


def for_started(job: Job) -> Job:
    """The job under the plan that it keeps for as many ranks as torchrun started, if its own has more; each
    rank finds the same. Rank 0 says so."""
    rank, world, _ = torchrun_rank() or (0, job.plan.world_size, 0)
    found = job.for_ranks(world)
    if found is not job and rank == 0:
        logging.getLogger("partita").warning(
            "%d of %d ranks are there: trains under %s", world, job.plan.world_size, found.plan
        )
    return found


def hold_world(job: Job, started: int) -> None:
    """Raises UsageError where torchrun started more or fewer ranks than the plan has."""
    if started != job.plan.world_size:
        kept = f", and no plan of survive has {started}" if job.survive else ""
        raise UsageError(
            f"torchrun started {started} ranks, the plan {job.plan} needs {job.plan.world_size}{kept}: "
            "change --nproc-per-node or --nnodes, or the plan"
        )


def train_as_rank(
    job: Job,
    prediction: Prediction,
    line: Lifeline,
    fresh: bool,
    allow_fallback: bool,
    preflight: bool = True,
) -> dict[str, Any]:
    """Runs this rank to its end; the answer of `train` on rank 0, an empty one on the others.

    Raises what `train` raises; an error of rank 0's start is raised on every rank.
    """
    from partita.comm.distributed.stores import rendezvous

    rank, world, _ = torchrun_rank() or (0, 1, 0)
    hold_world(job, world)
    looks = needs_of(job, prediction) if preflight else None
    roll = rendezvous(job.train.comm_timeout_s, line)
    if rank > 0:
        told = _hear(roll)
        return {} if told.step >= job.train.steps else _run(rank, job, told, roll, looks)
    try:
        folder = run_folder(job, fresh)
        line.last = partial(_note, line, folder)
        lock = RunLock(folder)
    except PartitaError as error:
        _tell_error(roll, error)
        raise
    with lock:
        try:
            start = prepare(job, prediction, folder, allow_fallback)
        except PartitaError as error:
            _tell_error(roll, error)
            raise
        notices = tuple(x for x in (lock.took_over, *start.notices) if x)
        for notice in notices:
            logging.getLogger("partita").warning(notice)
        checkpoint = str(start.checkpoint) if start.checkpoint else None
        told = _Told(str(folder), checkpoint, start.step, None)
        if start.step < job.train.steps and is_one_host():
            scratch = new_scratch()
            Control(RunSpec(job, folder, scratch=scratch).control_path, world, create=True)
            told = replace(told, scratch=str(scratch))
        roll.store.set(KEY, json.dumps(vars(told)))
        if start.step >= job.train.steps:
            return finished(job, folder, start)
        metrics = _run(rank, job, told, roll, looks, notices)
        return with_text(job, folder, answer(job, folder, metrics))


def _note(line: Lifeline, folder: Path, lost: Lost) -> None:
    """What a rank leaves that is ended on account of another."""
    step, activity = line.where()
    Failure(lost.rank, activity, step, "", lost.text).write(folder, replace=False)


def _end(line: Lifeline, spec: RunSpec, lost: Lost) -> None:
    """The same of a rank that has begun; where it stands is in its log."""
    leave_stacks(spec.log_of(line.rank))
    spec.clean()
    _note(line, spec.folder, lost)


def _tell_error(roll: RollCall, error: PartitaError) -> None:
    told = {"kind": type(error).__name__, "message": error.message}
    roll.store.set(KEY, json.dumps(told))


def _hear(roll: RollCall) -> _Told:
    heard = json.loads(roll.hear(KEY))
    if "kind" in heard:
        raise getattr(errors, heard["kind"])(heard["message"])
    return _Told(**heard)


def _run(
    rank: int, job: Job, told: _Told, roll: RollCall, looks: Needs | None,
    notices: tuple[str, ...] = (),
) -> dict[str, Any]:  # fmt: skip
    checkpoint = Path(told.checkpoint) if told.checkpoint else None
    shared, line = told.scratch is not None, roll.line
    spec = RunSpec(
        job, Path(told.folder), checkpoint, notices, takes_ctrl_c=True,
        scratch=Path(told.scratch) if told.scratch else new_scratch(),
        roll=None if shared else roll, looks=looks,
    )  # fmt: skip
    if shared:
        roll.close()
    elif line is not None:
        line.last = partial(_end, line, spec)
    sink = _Sink()
    try:
        run_rank(rank, sink, spec)
    finally:
        spec.clean()
    report = sink.reports[-1]
    error = report.error
    if error is not None:
        if not (shared or error.echoes):
            roll.call(f"rank {rank} failed: {error.message.splitlines()[0]}")
        step, activity = report.where
        guilty = rank if error.rank is None else error.rank
        Failure(guilty, activity, step, error.key or "", error.message).write(
            spec.folder, replace=not error.echoes
        )
        raise error
    if report.stopped_by:
        name, step = signal.Signals(report.stopped_by).name, report.metrics.get("step", told.step)
        then = outlook(spec.folder / "checkpoints")
        raise errors.StoppedError(f"stopped by {name} after step {step}; {then}", report.stopped_by)
    return report.metrics if rank == 0 else {}

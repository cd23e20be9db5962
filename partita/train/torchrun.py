"""A job whose ranks torchrun started: this process is one of them.

Rank 0 decides what a launcher would (train/start.py), holds the run folder's lock, and tells the others
through torchrun's store: folder and checkpoint, or the error that ends all of them. The folder is one that
all hosts share.
"""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

from partita.base import errors
from partita.base.errors import PartitaError, UsageError
from partita.simulate.predict import Prediction
from partita.spec.job import Job
from partita.train.lock import RunLock
from partita.train.rank import Report, RunSpec, run_rank
from partita.train.start import Start, answer, finished, prepare, run_folder, with_text

KEY = "partita/start"
PREPARE_S = 3600.0  # rank 0 may have a tokenizer to train first


class _Sink:
    """Takes a rank's reports where there is no launcher."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def send(self, report: Report) -> None:
        """Keeps it."""
        self.reports.append(report)


def train_as_rank(
    job: Job, prediction: Prediction, place: tuple[int, int, int], fresh: bool, allow_fallback: bool
) -> dict[str, Any]:
    """Runs this rank to its end; the answer of `train` on rank 0, an empty one on the others.

    Raises what `train` raises; an error of rank 0's start is raised on every rank.
    """
    from partita.comm.torch import rendezvous

    rank, world, _ = place
    if world != job.plan.world_size:
        raise UsageError(
            f"torchrun started {world} ranks, the plan {job.plan} needs {job.plan.world_size}: "
            "change --nproc-per-node or --nnodes, or the plan"
        )
    store = rendezvous()
    if rank > 0:
        folder, start = _hear(store)
        return {} if start.step >= job.train.steps else _run(rank, job, folder, start, store)
    try:
        folder = run_folder(job, fresh)
        lock = RunLock(folder)
    except PartitaError as error:
        _tell(store, {"kind": type(error).__name__, "message": error.message})
        raise
    with lock:
        try:
            start = prepare(job, prediction, folder, allow_fallback)
        except PartitaError as error:
            _tell(store, {"kind": type(error).__name__, "message": error.message})
            raise
        for notice in (lock.took_over, *start.notices):
            if notice:
                logging.getLogger("partita").warning(notice)
        checkpoint = str(start.checkpoint) if start.checkpoint else None
        _tell(store, {"folder": str(folder), "checkpoint": checkpoint, "step": start.step})
        if start.step >= job.train.steps:
            return finished(job, folder, start.step)
        metrics = _run(rank, job, folder, start, store)
        return with_text(job, folder, answer(job, folder, metrics))


def _tell(store: Any, what: dict[str, Any]) -> None:
    store.set(KEY, json.dumps(what))


def _hear(store: Any) -> tuple[Path, Start]:
    store.wait([KEY], timedelta(seconds=PREPARE_S))
    heard = json.loads(store.get(KEY))
    if "kind" in heard:
        raise getattr(errors, heard["kind"])(heard["message"])
    checkpoint = Path(heard["checkpoint"]) if heard["checkpoint"] else None
    return Path(heard["folder"]), Start(checkpoint, heard["step"])


def _run(rank: int, job: Job, folder: Path, start: Start, store: Any) -> dict[str, Any]:
    spec = RunSpec(job, folder, start.checkpoint, start.notices, store=store)
    sink = _Sink()
    try:
        run_rank(rank, sink, spec)
    finally:
        spec.clean()
    report = sink.reports[-1]
    if report.error is not None:
        raise report.error
    if report.stopped_by:
        raise errors.StoppedError(
            f"rank {rank} stopped after step {report.metrics.get('step', start.step)}; start the job "
            "again to go on",
            report.stopped_by,
        )
    return report.metrics if rank == 0 else {}

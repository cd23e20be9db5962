"""Runs a job: local ranks as processes, or this process as one rank under torchrun.

The launcher owns the run folder's lock, starts ranks, and stays out of their way. A rank that dies
without a word is the cause of what the others then say, so it is named first; everybody else is stopped,
`failure.json` is written, and the error raised with its exit code. SIGTERM and Ctrl-C ask the ranks to
save and leave; a second one stops at once.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from partita.base.errors import (
    PartitaError,
    PeerError,
    PlanError,
    StoppedError,
    UsageError,
    WriteError,
)
from partita.comm.processes import start_ranks, torchrun_rank
from partita.planner.judge import fit_error
from partita.record.run import FOLDER as RECORDS
from partita.record.run import RunFacts, write_record, write_trace
from partita.simulate.forecast import forecast
from partita.simulate.predict import simulate
from partita.spec.job import Job
from partita.train.build import open_job_data
from partita.train.checkpoint import newest_complete
from partita.train.control import Control
from partita.train.lock import RunLock
from partita.train.rank import Report, RunSpec, run_rank
from partita.train.recorder import machine
from partita.train.sample import continue_text

PROMPT, SAMPLE_TOKENS = "def ", 96
GRACE_S = 3.0  # for the others to say what they saw, once one has failed


@dataclass
class Failure:
    """`failure.json`: the first cause, and what followed from it."""

    rank: int
    phase: str
    step: int
    site: str
    message: str
    secondary: list[str] = field(default_factory=list)


def train(
    job: Job, *, force: bool = False, fresh: bool = False, allow_fallback: bool = False
) -> dict[str, Any]:
    """Trains the job under runs/<name>/ of the current folder; returns the last metrics line with
    "run" and "plan".

    Starts plan.world_size local ranks, or is one rank under torchrun. Resumes from the newest
    complete checkpoint; a finished run returns at once. Raises PlanError (illegal, or does not fit
    unless `force`), UsageError, DataError, CheckpointError, PeerError, NonFiniteError, WriteError,
    BusyError, StoppedError.
    """
    prediction = simulate(job)
    if any(p.severity == "error" for p in prediction.problems):
        raise PlanError(f"{job.plan} cannot run {job.name}", prediction.problems)
    if not prediction.fits and not force:
        raise fit_error(job, prediction)
    spec = RunSpec(job, _run_folder(job, fresh), allow_fallback)
    place = torchrun_rank()
    if place is not None:
        return _as_torchrun_rank(spec, place)
    with RunLock(spec.folder) as lock:
        if lock.took_over:
            spec.notices.append(lock.took_over)
        (spec.folder / "job.toml").write_text(job.to_toml())
        write_record(spec.folder / RECORDS / "prediction.json", forecast(prediction))
        open_job_data(job)  # bad data is found here, once, before any rank starts
        return _with_text(Launcher(spec).run(), spec)


def _with_text(metrics: dict[str, Any], spec: RunSpec) -> dict[str, Any]:
    """Adds what a finished run is judged by: the unigram entropy, and a few lines the model wrote."""
    data = open_job_data(spec.job)
    entropy = data.unigram_entropy()
    found = {**metrics, "unigram_entropy": entropy}
    newest = newest_complete(spec.folder / "checkpoints")
    if data.tokenizer is not None and newest is not None:
        found["sample"] = PROMPT + continue_text(newest, PROMPT, SAMPLE_TOKENS).text
        (spec.folder / "sample.txt").write_text(found["sample"] + "\n")
    text = found.get("sample", "").removeprefix(PROMPT)
    write_record(spec.folder / RECORDS / "run.json", RunFacts(machine(), entropy, PROMPT, text))
    write_trace(spec.folder)
    return found


def _run_folder(job: Job, fresh: bool) -> Path:
    root = Path("runs")
    folder = root / job.name
    if fresh and folder.exists():
        number = 2
        while (root / f"{job.name}-{number}").exists():
            number += 1
        folder = root / f"{job.name}-{number}"
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise WriteError(
            f"cannot write the run folder {folder}: {error.strerror}", file=str(folder)
        ) from error
    return folder


def _as_torchrun_rank(spec: RunSpec, place: tuple[int, int, int]) -> dict[str, Any]:
    rank, world, _ = place
    if world != spec.job.plan.world_size:
        raise UsageError(
            f"torchrun started {world} ranks, the plan {spec.job.plan} needs {spec.job.plan.world_size}: "
            "change --nproc-per-node or --nnodes, or the plan"
        )
    reports: list[Report] = []
    run_rank(rank, _Sink(reports), spec, backend="torchrun")
    error = next((r.error for r in reports if r.error is not None), None)
    if error is not None:
        raise error
    return reports[-1].metrics


class _Sink:
    """Takes a rank's reports where there is no launcher."""

    def __init__(self, reports: list[Report]) -> None:
        self.reports = reports

    def send(self, report: Report) -> None:
        """Keeps it."""
        self.reports.append(report)


class Launcher:
    """Starts the ranks of one run on this host and waits for them."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self.world = spec.job.plan.world_size
        self.control = Control(spec.control_path, self.world, create=True)
        self.reports: dict[int, Report] = {}
        self.dead: dict[int, int] = {}  # rank -> exit code, without a report
        self.signals = 0

    def run(self) -> dict[str, Any]:
        """Returns the last metrics, or raises the first cause."""
        ranks: list[tuple[BaseProcess, Connection]] = []
        try:
            with self._signals():
                ranks = start_ranks(self.world, run_rank, (self.spec,))
                self._wait(ranks)
        finally:
            for process, _ in ranks:
                if process.is_alive():
                    process.kill()
            for process, _ in ranks:
                process.join(5)
            self.control.close(remove=True)
            self.spec.clean()
        return self._result()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def ask(number: int, _: object) -> None:
            self.signals += 1
            self.control.ask_stop(number)

        try:
            before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: a notebook; signals stay as they are
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _wait(self, ranks: list[tuple[BaseProcess, Connection]]) -> None:
        """Until all have reported or died; after a first failure the others have GRACE_S to speak."""
        open_ranks = dict(enumerate(ranks))
        deadline: float | None = None
        while open_ranks:
            sources: dict[Any, int] = {}
            for rank, (process, reader) in open_ranks.items():
                sources[reader] = sources[process.sentinel] = rank
            ready = wait(list(sources), timeout=0.2)
            for source in ready:
                rank = sources[source]
                if rank in open_ranks and self._heard(rank, *open_ranks[rank]):
                    del open_ranks[rank]
            failed = bool(self.dead) or any(r.error for r in self.reports.values())
            if failed and deadline is None:
                deadline = time.monotonic() + GRACE_S
            if self.signals > 1 or (deadline is not None and time.monotonic() > deadline):
                return

    def _heard(self, rank: int, process: BaseProcess, reader: Connection) -> bool:
        """Takes a report; True when nothing more can come from the rank."""
        try:
            if reader.poll():
                self.reports[rank] = reader.recv()
                return True
        except (EOFError, OSError):
            pass
        if process.is_alive():
            return False
        process.join(1)
        self.dead[rank] = process.exitcode or 0
        return True

    def _result(self) -> dict[str, Any]:
        error = self._first_error()
        if error is not None:
            raise error
        stopped = next((r.stopped_by for r in self.reports.values() if r.stopped_by), 0)
        number = stopped or (self.control.stop_signal if self.signals > 1 else 0)
        metrics = self.reports[0].metrics if 0 in self.reports else {}
        if number:
            name = signal.Signals(number).name
            raise StoppedError(
                f"stopped by {name} after step {metrics.get('step', 0)}; start the job again to go on",
                number,
            )
        done = any(r.already_done for r in self.reports.values())
        out = {**metrics, "run": str(self.spec.folder), "plan": str(self.spec.job.plan)}
        return {**out, "already_done": True} if done else out

    def _first_error(self) -> PartitaError | None:
        """The cause: a rank that died without a word, else an error of a rank's own, else a peer's."""
        errors = [(r, x.error) for r, x in sorted(self.reports.items()) if x.error is not None]
        secondary = [f"rank {r}: {e.message}" for r, e in errors]
        if self.dead and not self.control.stop_signal:
            rank, code = min(self.dead.items())
            step, activity = self.control.where(rank)
            how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
            message = f"rank {rank} {how} in step {step} ({activity})"
            self._write(Failure(rank, activity, step, "", message, secondary))
            return PeerError(
                f"{message}; the other ranks were stopped: start the job again to resume"
            )
        if not errors:
            return None
        own = [(r, e) for r, e in errors if not isinstance(e, PeerError)]
        rank, error = (own or errors)[0]
        step, activity = self.control.where(rank)
        others = [s for r, s in zip([r for r, _ in errors], secondary, strict=True) if r != rank]
        self._write(Failure(rank, activity, step, "", error.message, others))
        return error

    def _write(self, failure: Failure) -> None:
        path = self.spec.folder / "failure.json"
        try:
            path.write_text(json.dumps(asdict(failure), indent=1) + "\n")
        except OSError:  # a full disk: the error itself is still raised
            return


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} ({number})"
    except ValueError:
        return f"signal {number}"

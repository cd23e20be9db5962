"""Runs a job: local ranks as processes, or this process as one rank under torchrun.

The launcher owns the run folder's lock, starts ranks, and stays out of their way. A rank that dies
without a word is the cause of what the others then say, so it is named first; everybody else is stopped,
`failure.json` is written, and the error raised with its exit code. SIGTERM and Ctrl-C ask the ranks to
save and leave; a second one stops at once.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from partita.base.errors import PartitaError, PeerError, PlanError, StoppedError
from partita.base.units import format_bytes
from partita.comm.liveness.lifeline import Lifeline
from partita.comm.processes import STOPS, UNKNOWN, end_ranks, server_is_gone, start_ranks
from partita.planner.answers.judge import fit_error, judged
from partita.spec.job import Job, require_job
from partita.train.checkpoints.checkpoint import outlook
from partita.train.control import Control
from partita.train.devices import computes_on_gpu
from partita.train.launch.examine import needs_of
from partita.train.launch.failure import Failure
from partita.train.launch.lock import RunLock
from partita.train.launch.oom import Killed, advice, own_group
from partita.train.launch.rank import Report, RunSpec, run_rank
from partita.train.launch.stacks import asked, crashed, short, size_of
from partita.train.launch.start import answer, finished, prepare, run_folder, with_text
from partita.train.launch.torchrun import for_started, train_as_rank

GRACE_S = 2.0  # for the others to say what they saw, once one has failed
TOGETHER_S = 0.2  # signals closer than that are one: `timeout` sends its own to the launcher and to its group


def train(
    job: Job,
    *,
    force: bool = False,
    fresh: bool = False,
    allow_fallback: bool = False,
    preflight: bool = True,
    line: Lifeline | None = None,
) -> dict[str, Any]:
    """Trains the job under runs/<name>/ of the current folder; returns the last metrics line with
    "run" and "plan", and nothing on a torchrun rank other than 0.

    Starts plan.world_size local ranks, or is one rank under torchrun, whose `line` may be held already.
    Resumes from the newest complete checkpoint; a finished run returns at once, with "already_done". Raises
    PlanError (illegal, or does not fit unless `force`), UsageError (also where ranks run different versions,
    unless `preflight` is False), DataError, CheckpointError, PeerError, NonFiniteError, WriteError,
    BusyError, StoppedError.
    """
    require_job(job, "train")
    job = for_started(job)
    computes_on_gpu(job)
    prediction = judged(job)
    if any(p.severity == "error" for p in prediction.problems):
        raise PlanError(f"{job.plan} cannot run {job.name}", prediction.problems)
    if not prediction.fits and not force:
        raise fit_error(job, prediction)
    line = line or Lifeline.hold()
    if line is not None:
        return train_as_rank(job, prediction, line, fresh, allow_fallback, preflight)
    with Stops() as stops:
        folder = run_folder(job, fresh)
        with RunLock(folder) as lock:
            start = prepare(job, prediction, folder, allow_fallback)
            notices = tuple(x for x in (lock.took_over, *start.notices) if x)
            for notice in notices:
                logging.getLogger("partita").warning(notice)
            stops.check()
            if start.step >= job.train.steps:
                return finished(job, folder, start)
            looks = needs_of(job, prediction) if preflight else None
            spec = RunSpec(job, folder, start.checkpoint, notices, looks=looks)
            metrics = Launcher(spec, stops).run()
            return with_text(job, folder, answer(job, folder, metrics))


class Stops:
    """SIGTERM and Ctrl-C, counted; several at once count as one. The first one asks the ranks when there is
    a `control`; without one, and at the second, the launcher is left with StoppedError."""

    def __init__(self) -> None:
        self.count = self.number = 0
        self.control: Control | None = None
        self.held = False  # only counted, while ranks are ended
        self._last_s = -TOGETHER_S
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, _: object) -> None:
        now = time.monotonic()
        if now - self._last_s < TOGETHER_S:
            return
        self._last_s = now
        self.count, self.number = self.count + 1, number
        if self.control is not None:
            self.control.ask_stop(number)
        if not self.held and (self.count == 2 or self.control is None):
            self.check()

    def check(self) -> None:
        """Raises StoppedError when a stop was asked for: a handler's error may be lost in the code
        that it meets."""
        if self.count:
            raise StoppedError(f"stopped by {signal.Signals(self.number).name}", self.number)

    def __enter__(self) -> Stops:
        with suppress(ValueError):  # not the main thread: a notebook; signals stay as they are
            self._before = {s: signal.signal(s, self._ask) for s in STOPS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Launcher:
    """Starts the ranks of one run on this host and waits for them."""

    def __init__(self, spec: RunSpec, stops: Stops) -> None:
        self.spec, self.stops = spec, stops
        self.world = spec.job.plan.world_size
        self.control = Control(spec.control_path, self.world, create=True)
        stops.control = self.control  # from now on a stop only asks: what is made is cleared away
        self.reports: dict[int, Report] = {}  # in the order they came
        self.dead: dict[int, int] = {}  # rank -> exit code, without a report
        self.stacks: dict[int, list[str]] = {}  # of ranks that hang or have crashed
        self._places: dict[int, tuple[int, str]] = {}  # of those that hang, before they were asked
        self.killed = Killed.now(own_group())
        self._logged = [size_of(spec.log_of(r)) for r in range(self.world)]

    def run(self) -> dict[str, Any]:
        """Returns the last metrics, or raises the first cause."""
        ranks: list[tuple[BaseProcess, Connection]] = []
        try:
            self.stops.check()
            ranks = start_ranks(self.world, run_rank, (self.spec,))
            self._wait(ranks)
            self._ask(ranks)
        except StoppedError as stopped:
            number = stopped.exit_code - 128
            raise self._stopped(number, f"at once, in step {self._last_step()}") from None
        finally:
            self.stops.held = True
            end_ranks(ranks)
            self.control.close(remove=True)
            self.spec.clean()
            self.stops.control, self.stops.held = None, False
        return self._result()

    def _wait(self, ranks: list[tuple[BaseProcess, Connection]]) -> None:
        """Until all have reported or died. They end together: after the first the others have
        comm_timeout_s, after a failure GRACE_S to speak."""
        open_ranks = dict(enumerate(ranks))
        deadline = math.inf
        while open_ranks:
            sources: dict[Any, int] = {}
            for rank, (process, reader) in open_ranks.items():
                sources[reader] = sources[process.sentinel] = rank
            ready = wait(list(sources), timeout=0.2)
            for source in ready:
                rank = sources[source]
                if rank in open_ranks and self._heard(rank, *open_ranks[rank]):
                    del open_ranks[rank]
            if self.dead or self.reports:
                failed = bool(self.dead) or any(r.error for r in self.reports.values())
                patience_s = GRACE_S if failed else self.spec.job.train.comm_timeout_s
                deadline = min(deadline, time.monotonic() + patience_s)
            if time.monotonic() > deadline:
                return

    def _ask(self, ranks: list[tuple[BaseProcess, Connection]]) -> None:
        """For the stacks of those that hang, where that is why the run ends. A signal may end the call in
        which one hangs, so where it was is read before."""
        if self.dead or any(x.error and not x.error.echoes for x in self.reports.values()):
            return
        for rank, (process, _) in enumerate(ranks):
            if rank not in self.reports and process.is_alive() and process.pid is not None:
                self._places[rank] = self.control.where(rank)
                self.stacks[rank] = asked(process.pid, self.spec.log_of(rank))

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
        if stopped:
            raise self._stopped(stopped, f"after step {self._last_step()}")
        return self.reports[0].metrics

    def _where(self, rank: int) -> tuple[int, str]:
        return self._places.get(rank) or self.control.where(rank)

    def _last_step(self) -> int:
        return max(self.control.where(r)[0] for r in range(self.world))

    def _stopped(self, number: int, how: str) -> StoppedError:
        name = signal.Signals(number).name
        return StoppedError(f"stopped by {name} {how}; {self._outlook()}", number)

    def _outlook(self) -> str:
        return outlook(self.spec.folder / "checkpoints")

    def _first_error(self) -> PartitaError | None:
        """The cause: a rank's own error, else one that died without a word, else one that was waited
        for and never came, else what the first peer said. Writes failure.json."""
        errors = {r: x.error for r, x in self.reports.items() if x.error is not None}
        own = {r: e for r, e in errors.items() if not e.echoes}
        silent = [r for r in range(self.world) if r not in self.reports and r not in self.dead]
        if own:
            rank, error = next(iter(own.items()))
        elif self.dead:
            rank, code = min(self.dead.items(), key=lambda x: (x[1] != -signal.SIGKILL, x[0]))
            error = self._ended(rank, code)
        elif silent:
            waited_for = [e.rank for e in errors.values() if e.rank is not None]
            rank = next((r for r in waited_for if r in silent), min(silent))
            error = self._lost(rank, "hangs")
        elif errors:
            rank, error = next(iter(errors.items()))
        else:
            return None
        rank = rank if error.rank is None else error.rank
        step, activity = self._where(rank)
        site = error.key or next((e.key for e in errors.values() if e.key), "")
        others = [f"rank {r}: {e.message}" for r, e in errors.items() if e is not error]
        stack = self.stacks.get(rank, [])
        failure = Failure(rank, activity, step, site or "", error.message, others, stack)
        failure.write(self.spec.folder)
        return error

    def _ended(self, rank: int, code: int) -> PeerError:
        """A rank that ended without a word: by a signal that tells where it stood, or for want of memory."""
        self.stacks[rank] = crashed(self.spec.log_of(rank), self._logged[rank])
        struck = self.killed.since() if code == -signal.SIGKILL else ""
        if not struck:
            return self._lost(rank, _end(code))
        job = self.spec.job
        planned = needs_of(job, judged(job)).memory_bytes
        return self._lost(rank, struck, advice(self.killed, self.world, planned))

    def _lost(self, rank: int, how: str, more: str = "") -> PeerError:
        step, activity = self._where(rank)
        at = short(self.stacks.get(rank, []))
        return PeerError(
            f"rank {rank} {how} in step {step} ({activity}){at}{more}; the other ranks were stopped; "
            f"{self._outlook()}"
        )


def _end(code: int) -> str:
    """How a process ended."""
    if code == UNKNOWN and server_is_gone():
        return "ended with the fork server of all ranks, which has died,"
    return f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"


def _signal_name(number: int) -> str:
    try:
        name = f"{signal.Signals(number).name} ({number})"
    except ValueError:
        return f"signal {number}"
    if number == signal.SIGBUS:
        return f"{name}{_shared_memory()},"
    return f"{name}, by hand or for want of memory," if number == signal.SIGKILL else name


def _shared_memory() -> str:
    """What a write to a mapped file that has no room ends in: containers have little by default."""
    try:
        held = shutil.disk_usage("/dev/shm")
    except OSError:
        return ""
    room = f"/dev/shm has {format_bytes(held.total)} in all, {format_bytes(held.free)} free"
    return f", for want of shared memory ({room}; docker: --shm-size)"

"""Measures a rank's steps: where its time goes in one, what it holds at most, what it sends.

    first steps of this start     measured for memory (the dispatch mode slows them down)
    the step after them           measured for time and traffic, undisturbed
    every MEMORY_EVERY steps      memory again, and in the last one: a leak would show

The record goes to records/rank-N.json of the run folder; the launcher merges all into trace.json. A run
of one or two steps measures both in the last. On a GPU spans are when the device computed (clock.py); those
of collectives and waits are the host's calls.
"""

from __future__ import annotations

import logging
import platform
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from partita.base.errors import WriteError
from partita.base.units import format_bytes
from partita.comm.threads.local import LocalWorld
from partita.parallel.pp.versions import Versions
from partita.parallel.read import state_bytes
from partita.record.ledger import Ledger
from partita.record.run import FOLDER, RankRecord, write_record
from partita.record.span import Span
from partita.record.transfer import Transfer, summarise
from partita.schedule.ir import Action
from partita.train.allocation import KEEPING, Allocations
from partita.train.build import Built
from partita.train.clock import Clock, clock_of

MEMORY_FIRST, MEMORY_EVERY = 2, 50
OF_UNITS = ("gather", "scatter", "reduce", "tied", "copies")  # kinds of regions of flat units
Stamped = tuple[Span, Any, Any]  # a span, and the stamps of its clock that say when


class StepRecorder:
    """One rank's recorder. The loop enters `step` around each step and `span` around its parts."""

    def __init__(self, built: Built, folder: Path, steps: int, clock: Clock | None = None) -> None:
        self.built, self.folder, self.last_step = built, folder, steps - 1
        context = built.context
        self.where, self.rank = context.where, context.rank
        alone = not isinstance(context.world, LocalWorld)
        self.allocations = Allocations(self.where, context.device.type, alone)
        self.record = RankRecord(self.rank, host=socket.gethostname())
        self.aside: list[Span] = []  # checkpoints and evaluations, outside the recorded step
        self._first: int | None = None
        self.clock = clock or clock_of(context.device)
        self._spans: list[Stamped] | None = None
        self._ledger = Ledger(self.rank)
        self._peak = 0
        context.recorder.active = False

    def peak_bytes(self) -> int:
        """The largest peak measured so far; on CUDA, the allocator's of this process."""
        if self.allocations.device == "cuda":
            return torch.cuda.max_memory_allocated(self.built.context.device)
        return self._peak

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a whole step (counted from 0)."""
        if self._first is None:
            self._first = step
        number = step - self._first
        timed = number == MEMORY_FIRST or (step == self.last_step and number < MEMORY_FIRST)
        memory = number < MEMORY_FIRST or step % MEMORY_EVERY == 0 or step == self.last_step
        watched = memory and number != MEMORY_FIRST
        with (
            self._memory() if watched else nullcontext(),
            self._timed(step) if timed else nullcontext(),
        ):
            yield
        if timed:
            self.write()

    @contextmanager
    def span(self, kind: str, name: str, lane: str = "compute") -> Iterator[None]:
        """Around a part of a step, a checkpoint or an evaluation."""
        start, spans = time.perf_counter(), self._spans
        stamp = None if spans is None else self.clock.stamp()
        try:
            yield
        finally:
            found = Span(
                self.rank, lane, kind, name, start, time.perf_counter(), step=self.where.step
            )
            if spans is not None:
                spans.append((found, stamp, self.clock.stamp()))
            elif kind in ("checkpoint", "eval"):
                self.aside.append(found)

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        """Around a forward or a backward of the executor."""
        spans = self._spans
        start = None if spans is None else self.clock.stamp()
        yield
        if self.where.phase == action.kind and action.kind in KEEPING:
            self.allocations.leaves_behind()
        else:
            self.allocations.backward_over()
        if spans is not None:
            stage, kind, microbatch = action
            found = Span(
                self.rank,
                "compute",
                kind,
                str(action),
                0.0,
                0.0,
                stage,
                microbatch,
                self.where.step,
            )
            spans.append((found, start, self.clock.stamp()))

    @contextmanager
    def _memory(self) -> Iterator[None]:
        model, seen = self.built.model, self.allocations
        self._claim()
        seen.adopt()
        with self._hooked(), seen.watch():
            yield
        self._claim()
        if seen.peak >= self._peak:
            self._peak, self._ledger = seen.peak, seen.ledger(self.rank)
        disk = model.arenas.disk
        self.record = replace(
            self.record, ledger=self._ledger, declared=self._declared("device"),
            host_ledger=seen.ledger(self.rank, "host"), declared_host=self._declared("host"),
            disk_ledger=Ledger(self.rank, "disk", disk.sizes() if disk else {}),
        )  # fmt: skip

    def _declared(self, arena: str) -> Ledger:
        """What the laid program says lies in an arena for the whole run."""
        model = self.built.model
        blocks = [b for s in model.laid.stages_of(model.place) for b in s.blocks]
        found = sum((state_bytes(b, model.laid.sizes, arena) for b in blocks), start=Counter())
        return Ledger(self.rank, arena, dict(found))

    def _claim(self) -> None:
        """Tells the long-lived storages apart. Moments are there from the first update on."""
        seen, update = self.allocations, self.built.update
        for category, tensors in self.built.model.arenas.host.held.items():
            seen.claim(category, tensors, arena="host")
        for unit in self.built.model.units:
            seen.claim("optimizer", [unit.master])
            seen.claim("gradients", [unit.gradient])
            seen.claim("parameters", [unit.working])
        if self.built.model.guess is not None:
            seen.claim("optimizer", self.built.model.guess.copies())
        for versions in self._versions:
            for stashed in versions.stash.values():
                seen.claim("parameters", stashed)
        seen.resizes([unit.gradient for unit in self.built.model.units if unit.spec.cuts_gradient])
        for states in update.optimizer.state.values():
            seen.claim("optimizer", [s for s in states.values() if isinstance(s, torch.Tensor)])
        seen.claimed()

    @property
    def _versions(self) -> list[Versions]:
        """Of the weights under an asynchronous schedule."""
        flow = self.built.model.flow
        return [] if flow is None else flow.each

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        executor = self.built.model.executor
        kept = executor.kept
        before, executor.span = executor.span, self.action
        if kept is not None:
            kept.watcher = self.allocations.kept
        for versions in self._versions:
            versions.changed = self._claim
        try:
            yield
        finally:
            executor.span = before
            for versions in self._versions:
                versions.changed = lambda: None
            if kept is not None:
                kept.watcher = None

    @contextmanager
    def _timed(self, step: int) -> Iterator[None]:
        recorder = self.built.context.recorder
        recorder.take()
        self.clock.begin()
        recorder.active, self._spans = True, []
        with self._hooked():
            yield
        recorder.active = False
        waits = recorder.take_waits()
        transfers = recorder.take()
        stamped, self._spans = self._spans, None
        spans = comm_spans(transfers, waits, self.rank, recorder.origin_s)
        spans += read_spans(stamped, self.clock)
        spans = [replace(s, step=step + 1) for s in sorted(spans, key=lambda s: s.start_s)]
        self.record = replace(
            self.record,
            step=step + 1,
            spans=tuple(spans),
            traffic=tuple(summarise(transfers)),
        )

    def write(self) -> None:
        """Writes the rank's record as it is now; a disk that refuses is no reason to stop."""
        record = replace(self.record, ledger=self._ledger, aside=tuple(self.aside))
        try:
            write_record(self.folder / FOLDER / f"rank-{self.rank}.json", record)
        except WriteError as error:
            logging.warning("%s; training goes on", error)

    def finish(self) -> None:
        """The run is over: the record with its last memory, checkpoints and evaluations."""
        if self._first is not None:
            self.write()


def read_spans(stamped: Sequence[Stamped], clock: Clock) -> list[Span]:
    """Spans with the times of their stamps, on the host's clock."""
    times = clock.read([stamp for _, *both in stamped for stamp in both])
    starts, ends = times[::2], times[1::2]
    return [
        replace(span, start_s=start, end_s=end)
        for (span, *_), start, end in zip(stamped, starts, ends, strict=True)
    ]


def comm_spans(
    transfers: Sequence[Transfer],
    waits: Sequence[tuple[str, float, float]],
    rank: int,
    origin_s: float,
) -> list[Span]:
    """Recorded collectives and waits as spans on their lanes; times on the host's clock."""
    found = [
        Span(
            rank, lane_of(t), "comm", f"{t.op} {t.site}", t.start_s + origin_s, t.end_s + origin_s,
            microbatch=t.microbatch,
        )
        for t in transfers
    ]  # fmt: skip
    return found + [
        Span(rank, "host", "wait", f"wait {axis}".strip(), start, end) for axis, start, end in waits
    ]


def lane_of(transfer: Transfer) -> str:
    """The lane a transfer lies on in a trace: messages of stages, states of units, rows to experts; what is
    left, by its axis."""
    axes, kind = transfer.axis.split("."), transfer.site.rpartition(":")[2]
    if transfer.op == "send" and transfer.axis == "pp":
        return "pp_down" if transfer.phase == "F" else "pp_up"
    if kind in OF_UNITS or any(a.startswith("dp") for a in axes):
        return "dp"
    if axes[0] in ("ep", "etp"):
        return "ep"
    return "tp" if any(a.startswith("tp") for a in axes) else "compute"


def machine() -> str:
    """This host in a line: processor, memory, Python and torch."""
    memory = format_bytes(psutil.virtual_memory().total)
    return (
        f"{psutil.cpu_count()} x {platform.processor() or platform.machine()}, {memory}, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    )

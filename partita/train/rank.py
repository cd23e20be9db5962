"""One rank of a run: joins the others, builds its part of the model, runs the loop, reports how it ended.

Preloaded by the fork server, so that a rank starts without importing anything.
"""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from partita.base.errors import PartitaError
from partita.comm.processes import torchrun_store
from partita.comm.protocol import Where, World
from partita.comm.single import SingleWorld
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.control import Control
from partita.train.loop import Loop
from partita.train.metrics import log_to


@dataclass
class RunSpec:
    """What every rank of a run is given. `scratch` holds what the run needs and nobody keeps."""

    job: Job
    folder: Path
    allow_fallback: bool = False
    notices: list[str] = field(default_factory=list)
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="partita-")))

    @property
    def control_path(self) -> Path:
        """The mapped file between launcher and ranks."""
        return self.scratch / "control"

    def clean(self) -> None:
        """Removes the scratch folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass
class Report:
    """How a rank ended."""

    rank: int
    metrics: dict[str, Any] = field(default_factory=dict)
    stopped_by: int = 0
    already_done: bool = False
    error: PartitaError | None = None


class Channel(Protocol):
    """The way to the launcher."""

    def send(self, report: Report) -> None:
        """Hands a report over."""
        ...


def run_rank(rank: int, channel: Channel, spec: RunSpec, backend: str = "host") -> None:
    """Runs one rank to its end and reports; never raises."""
    try:
        channel.send(_run(rank, spec, backend))
    except PartitaError as error:
        logging.error("%s", error)
        channel.send(Report(rank, error=error))
    except Exception as error:  # our own fault: the log has the trace, the user a line
        trace = traceback.format_exc()
        logging.error("%s", trace)
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno}, rank {rank})"
        channel.send(Report(rank, error=PartitaError(message)))


def _run(rank: int, spec: RunSpec, backend: str) -> Report:
    job = spec.job
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    log_to(spec.folder / "logs" / f"rank-{rank}.log")
    for notice in spec.notices:
        logging.warning("%s", notice)
    world_size = job.plan.world_size
    where = Where()
    own = backend == "torchrun"
    control = Control(
        _own_control(spec, rank) if own else spec.control_path, world_size, create=own
    )
    control.mirror(rank, where)
    signal.signal(signal.SIGTERM, lambda number, _: control.ask_stop(number))
    world = join(rank, world_size, spec, where, backend)
    try:
        built = assemble(job, world, where)
        loop = Loop(job, built, spec.folder, control, spec.allow_fallback)
        outcome = loop.run()
        where.activity = "finished"
    finally:
        world.close()
    return Report(rank, outcome.metrics, outcome.stopped_by, outcome.already_done)


def _own_control(spec: RunSpec, rank: int) -> Path:
    return spec.scratch / f"control-{rank}"


def join(rank: int, world_size: int, spec: RunSpec, where: Where, backend: str) -> World:
    """The world of this rank: alone, shared memory between CPU ranks of one host, gloo where that is
    missing, or what torchrun's rendezvous says."""
    timeout_s = spec.job.train.comm_timeout_s
    if world_size == 1:
        return SingleWorld()
    if backend == "torchrun":
        from partita.comm.torch import TorchWorld

        return TorchWorld.from_torchrun(torchrun_store(), timeout_s=timeout_s, where=where)
    from partita.comm import shm

    if shm.available():
        path = spec.scratch / "segment"
        return shm.ShmWorld(rank, world_size, path, timeout_s=timeout_s, where=where)
    from partita.comm.torch import TorchWorld

    path = spec.scratch / "rendezvous"
    return TorchWorld(rank, world_size, path, timeout_s=timeout_s, where=where)

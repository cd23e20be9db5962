"""One rank of a run: joins the others, builds its part of the model, runs the loop, reports how it ended.

Preloaded by the fork server, so that a rank starts without importing anything.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from partita.base.errors import PartitaError
from partita.base.refused import not_installed, refused
from partita.comm.liveness.rollcall import RollCall
from partita.comm.processes import STOPS, this_host, torchrun_store
from partita.comm.protocol import Where, World
from partita.comm.shm import shm
from partita.comm.single import SingleWorld
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.control import Control
from partita.train.devices import computes_on_gpu, device_of
from partita.train.launch.examine import Needs, at_start
from partita.train.launch.heap import keep_freed_memory
from partita.train.launch.preflight import preflight
from partita.train.launch.stacks import tell_stacks
from partita.train.loop import Loop
from partita.train.metrics import log_to

SEGMENT = "segment"
SCRATCH, CONTROL = "partita-", "control"


def new_scratch() -> Path:
    """An empty folder of this host, for one run. Removes those that killed launchers left."""
    for control in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/{CONTROL}"):
        if shm.is_abandoned(control):
            shutil.rmtree(control.parent, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=SCRATCH))


@dataclass
class RunSpec:
    """What every rank of a run is given. `scratch` holds what the run needs and nobody keeps; ranks of
    one host share it. `roll` is the rendezvous of ranks on several hosts, else None."""

    job: Job
    folder: Path
    checkpoint: Path | None = None
    notices: Sequence[str] = ()
    scratch: Path = field(default_factory=new_scratch)
    roll: RollCall | None = None
    looks: Needs | None = field(default_factory=Needs)  # as ranks begin; None: nobody looks
    takes_ctrl_c: bool = False  # a launcher takes it for its ranks; torchrun's take it themselves

    @property
    def control_path(self) -> Path:
        """The mapped file between launcher and ranks."""
        return self.scratch / CONTROL

    def log_of(self, rank: int) -> Path:
        """Where a rank logs."""
        return self.folder / "logs" / f"rank-{rank}.log"

    def clean_after_joining(self) -> None:
        """All have mapped what they share: a run that is killed from now on leaves nothing. Gloo and nccl go
        on using their files."""
        alone = self.job.plan.world_size == 1
        if alone or (shm.available() and not computes_on_gpu(self.job)):
            self.clean()

    def clean(self) -> None:
        """Removes the scratch folder, and the segment of ranks that died before they had joined."""
        name = str(self.scratch / SEGMENT).strip("/").replace("/", "-")
        for left in Path("/dev/shm").glob(f"{name}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


@dataclass
class Report:
    """How a rank ended."""

    rank: int
    metrics: dict[str, Any] = field(default_factory=dict)
    stopped_by: int = 0
    already_done: bool = False
    error: PartitaError | None = None
    where: tuple[int, str] = (0, "starting")  # the step and activity of an error


class Channel(Protocol):
    """The way to the launcher."""

    def send(self, report: Report) -> None:
        """Hands a report over."""
        ...


def run_rank(rank: int, channel: Channel, spec: RunSpec) -> None:
    """Runs one rank to its end and reports; never raises."""
    logging.raiseExceptions = False  # a log on a full disk must not write on stderr instead
    where = Where()
    try:
        own = spec.roll is not None
        world_size = spec.job.plan.world_size
        control = Control(spec.control_path, world_size, create=own, shared=not own)
        where = control.where_of(rank)
        channel.send(_run(rank, spec, control, where))
    except PartitaError as error:
        logging.error("%s", error)
        channel.send(Report(rank, error=error, where=(where.step, where.activity)))
    except Exception as error:
        logging.error("%s", traceback.format_exc())
        named = _named(rank, error)
        channel.send(Report(rank, error=named, where=(where.step, where.activity)))


def _named(rank: int, error: Exception) -> PartitaError:
    """A system that refuses and a library that lacks are the user's to mend; anything else our own fault:
    the log has the trace, the user a line."""
    told = refused(error) if isinstance(error, OSError) else None
    told = not_installed(error) if isinstance(error, ModuleNotFoundError) else told
    if told is not None:
        return type(told)(f"rank {rank}: {told.message}", file=told.file)
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}, rank {rank}"
    return PartitaError(f"{type(error).__name__}: {error} ({place})")


def _run(rank: int, spec: RunSpec, control: Control, where: Where) -> Report:
    job = spec.job
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Each torch.empty is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False
    log_to(spec.log_of(rank))
    tell_stacks(spec.log_of(rank))
    for notice in spec.notices:
        logging.warning("%s", notice)
    for number in STOPS if spec.takes_ctrl_c else (signal.SIGTERM,):
        signal.signal(number, lambda number, _: control.ask_stop(number))
    device = device_of(job, rank)
    world = join(rank, job.plan.world_size, spec, where)
    if rank == 0 and control.shared:
        spec.clean_after_joining()
    try:
        met = None if spec.looks is None else preflight(world, spec.folder)
        built = assemble(job, world, where, device=device)
        if spec.looks is not None and met is not None:
            between_hosts = spec.roll is not None and not computes_on_gpu(job)
            for text in at_start(built, met, spec.looks, between_hosts):
                _warn(rank, text)
        loop = Loop(job, built, spec.folder, control, spec.checkpoint)
        outcome = loop.run()
        where.activity = "finished"
        built.agree(
            True
        )  # rank 0 reads what all have recorded; one that is stopped by now is missed
    except BaseException:
        world.close(drain=False)
        raise
    world.close()
    return Report(rank, outcome.metrics, outcome.stopped_by, outcome.already_done)


def _warn(rank: int, text: str) -> None:
    """All ranks know it; the first tells the user."""
    logging.warning("%s", text)
    if rank == 0:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def join(rank: int, world_size: int, spec: RunSpec, where: Where) -> World:
    """The world of this rank: alone, shared memory between CPU ranks of one host, gloo where that is missing,
    both where there are several hosts, nccl between GPUs."""
    timeout_s, gpus = spec.job.train.comm_timeout_s, computes_on_gpu(spec.job)
    if world_size == 1:
        return SingleWorld()
    device_of(spec.job, rank)  # on GPUs groups are connected as they are made
    if spec.roll is not None:
        from partita.comm.distributed.hierarchical import join_hosts
        from partita.comm.distributed.torch import TorchWorld

        between = TorchWorld.from_torchrun(
            torchrun_store(), spec.roll, timeout_s=timeout_s, where=where, gpus=gpus
        )
        return between if gpus else join_hosts(between, this_host(), timeout_s)
    if shm.available() and not gpus:
        path = spec.scratch / SEGMENT
        return shm.ShmWorld(rank, world_size, path, timeout_s=timeout_s, where=where)
    from partita.comm.distributed.torch import TorchWorld

    path = spec.scratch / "rendezvous"
    return TorchWorld(rank, world_size, path, timeout_s=timeout_s, where=where, gpus=gpus)

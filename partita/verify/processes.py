"""verify on real processes: the same rank function over shared memory or gloo, or on GPUs over nccl."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from partita.base.errors import PartitaError, PeerError, UsageError
from partita.comm.processes import start_ranks
from partita.comm.protocol import World
from partita.spec.job import Job
from partita.train.data.dataset import Dataset
from partita.train.devices import use_gpu
from partita.verify.runs import RankSeen, run_rank


def run_processes(job: Job, data: Dataset, backend: str) -> list[RankSeen]:
    """What every rank saw, from processes of this host."""
    have, need = torch.cuda.device_count(), job.plan.world_size
    accepted = ("shm", "gloo", "nccl") if have >= need else ("shm", "gloo")
    if backend not in accepted:
        why = f" ({need} ranks, {have} GPUs on this host)" if backend == "nccl" else ""
        raise UsageError(
            f"--backend {backend}{why}: accepted here are local, {', '.join(accepted)}"
        )
    folder = Path(tempfile.mkdtemp(prefix="partita-verify-"))
    ranks = start_ranks(job.plan.world_size, _enter, (job, data, backend, str(folder / "world")))
    found: list[RankSeen] = []
    try:
        for rank, (_, reader) in enumerate(ranks):
            try:
                answer = pickle.loads(reader.recv_bytes())  # our own processes' words
            except EOFError:
                raise PeerError(f"rank {rank} died during verify") from None
            if isinstance(answer, PartitaError):
                raise answer
            found.append(answer)
    finally:
        for process, _ in ranks:
            process.join(0.5 if len(found) == len(ranks) else 0)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _enter(rank: int, writer: Connection, job: Job, data: Dataset, backend: str, path: str) -> None:
    torch.set_num_threads(1)
    try:
        device = use_gpu(rank) if backend == "nccl" else None
        world = _join(rank, job, backend, Path(path))
        _tell(writer, run_rank(world, job, data, device=device))
        world.close()
    except PartitaError as error:
        _tell(writer, error)
    except Exception as error:
        _tell(writer, PartitaError(f"rank {rank}: {type(error).__name__}: {error}"))


def _tell(writer: Connection, answer: RankSeen | PartitaError) -> None:
    """By value: torch's own way through a pipe shares memory, which is gone when this process is."""
    writer.send_bytes(pickle.dumps(answer))


def _join(rank: int, job: Job, backend: str, path: Path) -> World:
    size, timeout_s = job.plan.world_size, job.train.comm_timeout_s
    if size == 1:
        from partita.comm.single import SingleWorld

        return SingleWorld()
    if backend == "shm":
        from partita.comm.shm.shm import ShmWorld

        return ShmWorld(rank, size, path, timeout_s=timeout_s)
    from partita.comm.distributed.torch import TorchWorld

    return TorchWorld(rank, size, path, timeout_s=timeout_s, gpus=backend == "nccl")

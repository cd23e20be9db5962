"""`partita doctor`: the ranks of a job, or of this machine, are started and looked at before they train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from partita.base.errors import PartitaError, PeerError, PlanError
from partita.comm.processes import is_one_host, start_ranks, torchrun_rank
from partita.comm.protocol import Where
from partita.parallel.laid import lay
from partita.simulate.predict import request_of, simulate
from partita.spec.calibrated import PRESET, calibrated
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.train.launch.diagnosis import Diagnosis
from partita.train.launch.examine import Needs, examine, needs_of
from partita.train.launch.rank import RunSpec, join, new_scratch
from partita.train.launch.torchrun import hold_world

TIMEOUT_S = 20.0
KEY = "partita/doctor"


def this_machine() -> Job:
    """What is looked at without a job: two to four data-parallel ranks of this machine, or torchrun's."""
    place = torchrun_rank()
    n = place[1] if place else max(2, min(4, psutil.cpu_count() or 2))
    cluster = calibrated(Cluster.load(PRESET))
    if n > cluster.devices:
        cluster = replace(cluster, devices=n)
    return Job.load(
        {
            "name": "doctor",
            "plan": f"dp_replicate{n}",
            "model": {"preset": "tiny"},
            "cluster": cluster.to_toml(),
            "train": {"global_batch_size": n, "seq_len": 32},
        }
    )


def doctor(job: Job) -> Diagnosis:
    """Looks at the ranks that the job would train on: as many processes of this host as its plan has, or
    those that torchrun started, each of which calls it and has the same answer.

    Raises PlanError, UsageError where torchrun started another number of ranks, and PeerError where a rank is
    lost on the way.
    """
    job = replace(job, train=replace(job.train, comm_timeout_s=TIMEOUT_S))
    prediction = simulate(job)
    wrong = [p for p in prediction.problems if p.severity == "error"]
    if wrong:
        raise PlanError(f"{job.plan} cannot run {job.name}", wrong)
    needs = needs_of(job, prediction)
    place = torchrun_rank()
    if place is not None:
        hold_world(job, place[1])
        return _as_rank(job, needs, place[0])
    spec = RunSpec(job, Path.cwd())
    ranks = start_ranks(job.plan.world_size, _enter, (spec, needs))
    try:
        return _hear([reader for _, reader in ranks])
    finally:
        for process, _ in ranks:
            process.join(0.5)
            process.kill()
        spec.clean()


def _hear(readers: Sequence[Connection]) -> Diagnosis:
    """Rank 0's answer; else the first error that is a rank's own."""
    answers: list[Diagnosis | PartitaError] = []
    for rank, reader in enumerate(readers):
        try:
            answers.append(reader.recv())
        except EOFError:
            lost = PeerError(f"rank {rank} died while it was looked at")
            lost.echoes = False
            answers.append(lost)
    errors = [a for a in answers if isinstance(a, PartitaError)]
    if errors:
        raise min(errors, key=lambda e: e.echoes)
    assert isinstance(answers[0], Diagnosis)
    return answers[0]


def _enter(rank: int, writer: Connection, spec: RunSpec, needs: Needs) -> None:
    try:
        writer.send(_look(rank, spec, needs))
    except PartitaError as error:
        writer.send(error)
    except Exception as error:
        writer.send(PartitaError(f"rank {rank}: {type(error).__name__}: {error}"))


def _look(rank: int, spec: RunSpec, needs: Needs) -> Diagnosis:
    torch.set_num_threads(1)
    world = join(rank, spec.job.plan.world_size, spec, Where(activity="doctor"))
    try:
        found = examine(spec.job, lay(request_of(spec.job)), world, spec.folder, needs)
    except BaseException:
        world.close(drain=False)
        raise
    world.close()
    return found


def _as_rank(job: Job, needs: Needs, rank: int) -> Diagnosis:
    """One of torchrun's ranks; those of one host meet as they do when they train."""
    from partita.comm.distributed.stores import rendezvous

    roll = rendezvous(job.train.comm_timeout_s)
    if not is_one_host():
        return _look(rank, RunSpec(job, Path.cwd(), roll=roll), needs)
    if rank == 0:
        roll.store.set(KEY, str(new_scratch()))
    spec = RunSpec(job, Path.cwd(), scratch=Path(roll.hear(KEY)))
    roll.close()
    try:
        return _look(rank, spec, needs)
    finally:
        if rank == 0:
            spec.clean()

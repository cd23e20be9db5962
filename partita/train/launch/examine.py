"""Looks at the real ranks, in seconds: are they alike, have they room, is one of them or a link slow?

    versions, clock, disk, memory    of every rank; what the job needs where there is one
    data                             of every rank: the files the job reads are there, as long as rank 0's
    compute                          every rank at once, a matrix product; against the median
    link                             each rank to the next and back, alone; against the median of its kind,
                                     and a tenth of the cluster file's rate
    <collective> over <axes>         every kind the plan uses, in all its groups at once, as in training;
                                     against the cluster file

A rate counts as through a rank's link (nccl-tests call it bus bandwidth): bytes that cross it / time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from partita.base.errors import PartitaError
from partita.base.units import format_bytes, format_rate, format_seconds
from partita.comm.context import Context
from partita.comm.protocol import Comm, Key, Where, World
from partita.cost.comm import steps_and_bytes
from partita.parallel.laid import Laid, lay
from partita.parallel.room import axis_name
from partita.simulate.predict import Prediction, request_of
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.train.build import Built, make_context
from partita.train.data.present import data_files
from partita.train.launch.calls import COLLECTIVES, Calls
from partita.train.launch.diagnosis import Check, Diagnosis
from partita.train.launch.preflight import Facts, Met, exchange, mismatches, tell_all
from partita.train.launch.start import checkpoint_bytes
from partita.train.launch.timing import matmul_flops

SLOW = 3.0  # times the median of its kind: a link; a rank counts half of that
BELOW = 4.0  # times below the cluster file: a collective
FAR = 10.0  # times below it: a link, which has no peer to be held to where there are two ranks
CLOCK_S = 1.0  # clocks of hosts may differ by so much
LINK_BYTES = GROUP_BYTES = 1 << 22
REPETITIONS = 3
SITE = "doctor"


@dataclass(frozen=True)
class Needs:
    """Bytes that a job will take: one checkpoint on the run folder's disk, a rank's peak in memory."""

    disk_bytes: int = 0
    memory_bytes: int = 0


@dataclass
class Found:
    """What one rank measured."""

    flops: float
    data: tuple[int, int, str]  # files, their bytes, what is wrong with them
    links: dict[int, float]  # to which rank -> bytes/s
    groups: list[
        tuple[str, str, float, list[int]]
    ]  # axes, collective, bytes/s through a link, ranks


def matmul_rate() -> float:
    """FLOP/s of this rank in a product of 512 rows, while the others do the same."""
    return matmul_flops(512, 512, 512, torch.float32, 0.3)


def needs_of(job: Job, prediction: Prediction) -> Needs:
    """What the job is predicted to take, where ranks are a CPU's."""
    laid = prediction.laid or lay(request_of(job))
    tensors = {n: x.shape for n, x in laid.layouts.items()}
    peak = max((x.peak_bytes for x in prediction.ledgers), default=0)
    return Needs(checkpoint_bytes(job, tensors), peak if job.cluster.device == "CPU" else 0)


def examine(
    job: Job, laid: Laid, world: World, folder: Path, needs: Needs,
    work: Callable[[], float] = matmul_rate,
) -> Diagnosis:  # fmt: skip
    """Looks at everything; every rank calls it and has the same answer."""
    comm = world.make(range(world.size), axis="world", lane=SITE)
    assert comm is not None
    about = exchange(comm, folder)
    context = make_context(laid, job, world, Where(activity="doctor"))
    return Diagnosis((*_alike(about, needs), *_measured(job, laid, context, comm, about, work)))


def at_start(built: Built, met: Met, needs: Needs, between_hosts: bool) -> list[str]:
    """What is not well of ranks that begin to train, a line each; all but their versions, of which preflight
    has told. Every rank calls it and has the same answer. `between_hosts`: what passes between ranks is
    measured too, on the groups that train."""
    checks = _alike(met.about, needs)
    if between_hosts:
        laid = built.model.laid
        checks += _measured(built.job, laid, built.context, met.comm, met.about, matmul_rate)
        built.waited()  # no step's
    return [f"{c.name}, rank {c.rank}: {c.message}" for c in checks if not c.ok]


def _measured(
    job: Job, laid: Laid, context: Context, comm: Comm, about: Sequence[Facts],
    work: Callable[[], float],
) -> list[Check]:  # fmt: skip
    comm.barrier(site=SITE)
    flops = work()
    mine = Found(flops, _data(job), _links(comm), _groups(laid, context, comm))
    found = [Found(**json.loads(x)) for x in tell_all(comm, json.dumps(asdict(mine)))]
    return [
        *_data_checks(found, about),
        *_compute(found),
        *_link_checks(found, about, job.cluster),
        *_group_checks(found, job.cluster),
    ]


def _data(job: Job) -> tuple[int, int, str]:
    """What training would read here."""
    try:
        sizes = [path.stat().st_size for path in data_files(job)]
    except (PartitaError, OSError) as error:
        return 0, 0, str(error)
    return len(sizes), sum(sizes), ""


def _links(comm: Comm) -> dict[int, float]:
    """Bytes/s to the next rank and to the one before, of 4 MB and an 8-byte answer; in rounds, in which no
    rank takes part twice. The best of some: others only ever slow a link down."""
    n, found = comm.size, {}
    pairs = [(r, (r + 1) % n) for r in range(n if n > 2 else n - 1)]
    last = pairs[n - 1 :] if n % 2 else []
    rounds = [pairs[0 : len(pairs) - len(last) : 2], pairs[1 : len(pairs) - len(last) : 2], last]
    number = 0
    for pair_list in rounds:
        for turn in (0, 1):
            comm.barrier(site=SITE)
            mine = next((p for p in pair_list if comm.rank in p), None)
            if mine is not None:
                source, to = mine if turn == 0 else mine[::-1]
                rate = _link(comm, source, to, number)
                if comm.rank == source:
                    found[to] = rate
            number += REPETITIONS + 1
    return found


def _link(comm: Comm, source: int, to: int, number: int) -> float:
    x, word = torch.ones(LINK_BYTES // 4), torch.ones(1)
    times: list[float] = []
    for i in range(number, number + REPETITIONS + 1):  # the first one warms up
        there, back = Key("F", 1, i), Key("B", 0, i)
        start = time.perf_counter()
        if comm.rank == source:
            sent = comm.send(x, to, key=there, site=SITE)
            comm.receive(word, to, key=back, site=SITE).wait()
            sent.wait()
        else:
            comm.receive(x, source, key=there, site=SITE).wait()
            comm.send(word, source, key=back, site=SITE).wait()
        times.append(time.perf_counter() - start)
    return x.nbytes / min(times[1:])


def _groups(laid: Laid, context: Context, world: Comm) -> list[tuple[str, str, float, list[int]]]:
    """Every collective that the plan uses, over each of its axes; messages are the links' matter."""
    used = {
        (call.axes, call.collective): call.lane
        for place in range(laid.sizes["pp"])
        for call, _ in laid.calls(place)
        if call.collective in COLLECTIVES and call.collective != "send"
    }
    found = []
    for (axes, collective), lane in sorted(used.items()):
        comm = context.comm(*axes, lane=lane)
        world.barrier(site=SITE)
        if comm.size > 1:
            seconds = _seconds(comm, collective)
            _, through = steps_and_bytes(collective, comm.size, GROUP_BYTES)
            found.append((axis_name(axes), collective, through / seconds, list(comm.ranks)))
    return found


def _seconds(comm: Comm, collective: str) -> float:
    x = torch.ones(GROUP_BYTES // 4 // comm.size * comm.size)
    call = getattr(Calls(comm, x, SITE), collective)
    times: list[float] = []
    for i in range(REPETITIONS + 1):
        comm.barrier(site=SITE)
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _alike(about: Sequence[Facts], needs: Needs) -> list[Check]:
    different, checks = mismatches(about), []
    for x in about:
        told = ", ".join(f"{k} {v}" for k, v in x.versions.items())
        wrong = different.get(x.rank)
        text = f"{x.host}: {wrong}" if wrong else f"{x.host}: {told}"
        checks.append(Check("versions", x.rank, wrong is None, x.versions["code"], text))
    for x in about:
        skew = x.clock_s - about[0].clock_s
        text = f"{format_seconds(skew)} off rank 0's clock"
        checks.append(Check("clock", x.rank, abs(skew) <= CLOCK_S, skew, text))
    for x in about:
        text = f"{format_bytes(x.disk_free_bytes)} free, a checkpoint takes {format_bytes(needs.disk_bytes)}"
        ok = x.disk_free_bytes >= max(needs.disk_bytes, 1)
        checks.append(Check("disk", x.rank, ok, x.disk_free_bytes, text))
    for x in about:
        ranks = sum(y.host == x.host for y in about)
        text = (
            f"{format_bytes(x.memory_free_bytes)} free on {x.host} for {ranks} ranks, "
            f"{format_bytes(needs.memory_bytes)} wanted by each"
        )
        ok = x.memory_free_bytes >= ranks * needs.memory_bytes
        checks.append(Check("memory", x.rank, ok, x.memory_free_bytes, text))
    return checks


def _data_checks(found: Sequence[Found], about: Sequence[Facts]) -> list[Check]:
    """Every rank reads for itself."""
    checks, first = [], found[0].data
    for x, where in zip(found, about, strict=True):
        files, size, wrong = x.data
        text = wrong or f"{files} {'file' if files == 1 else 'files'}, {format_bytes(size)}"
        if not wrong and not first[2] and x.data[:2] != first[:2]:
            wrong = f"; rank 0 on {about[0].host} has {first[0]}, {format_bytes(first[1])}"
            text += wrong
        checks.append(Check("data", where.rank, not wrong, size, f"{where.host}: {text}"))
    return checks


def _compute(found: Sequence[Found]) -> list[Check]:
    middle = statistics.median(x.flops for x in found)
    return [
        Check(
            "compute", rank, x.flops * SLOW / 2 >= middle, x.flops,
            f"{format_rate(x.flops, 'FLOP')}, {x.flops / middle:.2f} of the median",
        )
        for rank, x in enumerate(found)
    ]  # fmt: skip


def _link_checks(found: Sequence[Found], about: Sequence[Facts], cluster: Cluster) -> list[Check]:
    """Links of one tier are of one kind. Ranks that the file has in one node meet through its memory."""
    kinds: dict[str, list[float]] = {}
    for rank, x in enumerate(found):
        for to, rate in x.links.items():
            kinds.setdefault(cluster.link_for((rank, int(to))).name, []).append(rate)
    checks, turns = [], _turns(len(found), cluster)
    for rank, x in enumerate(found):
        for to, rate in ((int(to), rate) for to, rate in x.links.items()):
            tier = cluster.link_for((rank, to))
            middle = statistics.median(kinds[tier.name])
            text = (
                f"{rank} -> {to}: {format_rate(rate)}, {rate / middle:.2f} of the median of {tier.name}; the "
                f"cluster file says {format_rate(tier.bytes_per_s)}"
            )
            apart = about[rank].host != about[to].host
            strange = apart and cluster.node_of(rank) == cluster.node_of(to)
            if strange:
                text += f", of one node: they run on {about[rank].host} and {about[to].host}"
            ok = rate * SLOW >= middle and rate * FAR * turns >= tier.bytes_per_s
            checks.append(Check("link", rank, ok and not strange, rate, text))
    return checks


def _turns(ranks: int, cluster: Cluster) -> float:
    """CPU ranks that share cores take turns: how many do."""
    if not cluster.cores_shared:
        return 1.0
    return max(1.0, min(ranks, cluster.devices_per_node) / cluster.cores_shared)


def _group_checks(found: Sequence[Found], cluster: Cluster) -> list[Check]:
    """The slowest group of each kind; `rank` is its first."""
    turns = _turns(len(found), cluster)
    slowest: dict[tuple[str, str], tuple[float, list[int]]] = {}
    for x in found:
        for axes, collective, rate, ranks in x.groups:
            key = (axes, collective)
            slowest[key] = min(slowest.get(key, (rate, ranks)), (rate, ranks))
    checks = []
    for (axes, collective), (rate, ranks) in sorted(slowest.items()):
        tier = cluster.link_for(ranks)
        text = (
            f"ranks {', '.join(map(str, ranks))}: {format_rate(rate)} through a rank's link; the cluster "
            f"file says {format_rate(tier.bytes_per_s)} ({tier.name})"
            + f", cores are shared by {turns:g}"
            * (turns > 1)
        )
        ok = rate * BELOW * turns >= tier.bytes_per_s
        checks.append(Check(f"{collective} over {axes}", ranks[0], ok, rate, text))
    return checks

"""What ranks measured becomes a cluster that jobs can read; wrong measurements would show."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from partita.base.config import to_toml
from partita.base.errors import UsageError
from partita.cost.comm import AlphaBeta, seconds
from partita.simulate.predict import simulate
from partita.spec.calibrated import adopt, calibrated, calibration_path
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.train.step import Update
from partita.tune import device, pieces
from partita.tune.calibrate import calibrate, compute_units, fit, slowest_calls, summarise
from partita.tune.device import Setup, Timer, calibrate_on
from partita.tune.probes import COLLECTIVES, COMM_BYTES, MATMUL_SIZES, Call, Found

LINK = AlphaBeta(latency_s=20e-6, bytes_per_s=3e9)


def calls_of(link: AlphaBeta, backend: str = "shm") -> list[Call]:
    return [
        Call(backend, op, n, size, seconds(op, 2 if op == "send" else n, size, link))
        for op in COLLECTIVES
        for n in (2, 4)
        for size in COMM_BYTES
    ]


def found_of(rank: int, busy: dict[int, float]) -> Found:
    rates = {f"{r}x{i}x{c}": 40e9 for r, i, c in MATMUL_SIZES}
    matmul = {"fp32": rates, "bf16": {s: 2 * x for s, x in rates.items()}} if rank < 2 else {}
    slow = AlphaBeta(10 * LINK.latency_s, LINK.bytes_per_s / 10)
    calls = calls_of(LINK) + calls_of(slow, "gloo")
    crowded = {n: rate / 40e9 / (1.2 if n == 4 else 1.0) for n, rate in busy.items()}
    rate, update = (8e9, 6e9) if rank < 2 else (0, 0)
    pieces = {"fp32": {"norm": {"64": 1e-3 * (1 + 2 * rank)}}} if rank < 2 else {}
    return Found(rank, busy, matmul, rate, update, calls, pieces, crowded)


def machine() -> list[Found]:
    """Four ranks on two cores."""
    return [
        found_of(rank, {n: min(1, 2 / n) * 40e9 for n in (1, 2, 4) if rank < n})
        for rank in range(4)
    ]


def test_fit_finds_the_link_that_made_the_times() -> None:
    found = fit(calls_of(LINK))
    assert found.latency_s == pytest.approx(LINK.latency_s, rel=1e-6)
    assert found.bytes_per_s == pytest.approx(LINK.bytes_per_s, rel=1e-6)


@pytest.mark.parametrize(
    ("busy", "units"),
    [({1: 40.0, 2: 40.0, 4: 20.0}, 2), ({1: 40.0, 2: 20.0, 4: 10.0}, 1), ({1: 40.0, 4: 30.0}, 3)],
)
def test_units_are_how_many_ranks_run_at_full_speed(busy: dict[int, float], units: int) -> None:
    assert compute_units(busy) == units


def test_ranks_that_do_not_slow_down_share_the_whole_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("psutil.cpu_count", lambda: 16)
    assert compute_units({1: 40.0, 2: 40.0, 4: 39.0}) == 16


def test_a_collective_lasts_as_long_as_its_last_rank() -> None:
    quick, slow = Call("shm", "send", 2, 8, 1.0), Call("shm", "send", 2, 8, 3.0)
    assert slowest_calls([Found(0, calls=[quick]), Found(1, calls=[slow])]) == [slow]


def test_the_cluster_keeps_the_limits_and_takes_the_rates(tmp_path) -> None:
    base = Cluster.load("laptop")
    found = summarise(base, machine(), has_bf16=True)
    made = found.cluster
    assert (made.devices, made.memory_bytes, made.memory_limit_bytes) == (
        base.devices,
        base.memory_bytes,
        base.memory_limit_bytes,
    )
    assert made.cores_shared == 2
    assert made.crowding == pytest.approx({"1": 1.0, "2": 1.0, "4": 1.2})
    assert [made.crowded(n) for n in (1, 3, 64)] == pytest.approx([1.0, 1.1, 1.2])
    assert made.peak_flops == pytest.approx({"fp32": 40e9, "bf16": 80e9, "fp64": 20e9})
    assert made.matmul_flops_per_s == found.matmul
    assert made.piece_seconds == {"fp32": {"norm": {"64": pytest.approx(2e-3)}}}
    assert made.links[0].name == "shared memory"
    assert made.links[0].bytes_per_s == pytest.approx(3e9)
    path = tmp_path / "cluster.toml"
    path.write_text(to_toml(made.to_toml()))
    assert Cluster.load(path) == made
    assert "slow-down" in str(found)
    assert found.to_json()["cluster"]["devices"] == base.devices


def test_another_base_adopts_the_rates() -> None:
    measured = summarise(Cluster.load("laptop"), machine(), has_bf16=False).cluster
    other = Cluster.load({"preset": "laptop", "devices": 2, "memory_bytes": 10**9})
    made = adopt(other, measured)
    assert (made.devices, made.memory_bytes) == (2, 10**9)
    assert made.links[0].devices == 2
    assert made.peak_flops == measured.peak_flops and made.crowding == measured.crowding


def test_a_job_that_states_no_rates_takes_this_hosts(tmp_path, monkeypatch) -> None:
    measured = summarise(Cluster.load("laptop"), machine(), has_bf16=True).cluster
    other = Cluster.load({"preset": "laptop", "devices": 2, "memory_bytes": 10**9})
    assert calibrated(other, tmp_path) == other  # not measured yet
    calibration_path(Cluster.load("laptop"), tmp_path).write_text(to_toml(measured.to_toml()))
    assert calibrated(other, tmp_path) == adopt(other, measured) != other
    stated = Cluster.load({"preset": "laptop", "memory_bytes_per_s": 1e9})
    assert calibrated(stated, tmp_path) == stated
    assert calibrated(Cluster.load("8xh100"), tmp_path) == Cluster.load("8xh100")
    assert calibrated(measured, tmp_path) == measured
    monkeypatch.setattr("partita.spec.calibrated.MEASURED", "other pieces")
    assert calibrated(other, tmp_path) == other  # what was measured otherwise is not read


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be measured")
def test_a_device_that_is_not_here_is_not_measured() -> None:
    with pytest.raises(UsageError, match="sees no GPU"):
        calibrate(Cluster.load("8xh100"))


class HostEvent:
    """A device that does what it is told at once."""

    at_s = 0.0

    def record(self) -> None:
        self.at_s = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1e3 * (end_event.at_s - self.at_s)


def test_a_gpu_keeps_its_published_rates_and_takes_pieces_and_its_link() -> None:
    base, told, spun = Cluster.load("1xh100"), [], []
    timer = Timer(HostEvent, lambda: None, spun.append, torch.device("cpu"), 64)
    small = Setup(
        ((1, 8, 32, 32),), ((8, 8, 8),), head=16, elements=64, seconds_each=0.0, dtypes=("bf16",)
    )
    found = calibrate_on(base, small, timer, "stand-in", lambda *line: told.append(line))
    made = found.cluster
    assert (made.peak_flops, made.memory_bytes_per_s) == (base.peak_flops, base.memory_bytes_per_s)
    assert made.host_link == min(found.up_bytes_per_s, found.down_bytes_per_s)
    assert [done for _, done, _ in told] == [0, 1, 2]
    assert min(spun) == 0.0
    assert max(spun) > 0.0, "a device runs behind its host, but while that warms up"
    pieces = made.piece_seconds
    assert pieces is not None
    assert pieces["bf16"]["linear"].keys() == {str(2 * 8 * 32 * n) for n in (32, 88, 176)}
    assert all(s >= 0 for by in pieces.values() for x in by.values() for s in x.values())
    assert Cluster.load(made.to_toml()).piece_seconds == pieces
    assert "stand-in" in str(found)


def test_pieces_of_a_gpu_lie_on_it(monkeypatch) -> None:
    """On `meta`, where an op of two devices raises as on a GPU."""
    monkeypatch.setattr(device, "_moves", lambda *_: (1.0, 1.0, 1.0))
    monkeypatch.setattr(pieces, "_fill", lambda _: None)
    monkeypatch.setattr(
        Update, "gradient_norm", lambda _: 1.0
    )  # the one number that the host reads
    small = Setup(((1, 8, 32, 32),), ((8, 8, 8),), head=16, elements=64, seconds_each=0.0)
    timer = Timer(HostEvent, lambda: None, lambda _: None, torch.device("meta"), 64)
    found = calibrate_on(Cluster.load("1xh100"), small, timer, "stand-in", lambda *_: None)
    assert found.cluster.piece_seconds.keys() == {"bf16", "fp32"}


def test_a_step_of_a_measured_gpu_is_the_sum_of_its_pieces() -> None:
    job = Job.load(
        {
            "name": "measured", "plan": "1mb bf16", "cluster": {"preset": "1xh100"},
            "model": {
                "family": "llama", "layers": 2, "hidden": 32, "heads": 2, "ffn_hidden": 88, "vocab": 32,
                "max_seq_len": 8,
            },
            "train": {"global_batch_size": 1, "seq_len": 8},
        }
    )  # fmt: skip
    both_ways = "linear", "norm", "rotate", "split", "gate", "add", "lookup", "loss"
    names = ["linear.weight", "update", "action", *both_ways, *(f"{x}.back" for x in both_ways)]
    names += [f"{x} {keys}" for x in ("attention", "attention.back") for keys in (8, 16)]
    both = [
        simulate(replace(job, cluster=replace(job.cluster, piece_seconds={"bf16": made})))
        for made in ({n: {"1": s, str(10**9): s} for n in names} for s in (1.0, 2.0))
    ]
    once, twice = (x.time["compute_s"] for x in both)
    assert twice == pytest.approx(2 * once)

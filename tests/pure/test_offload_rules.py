"""What offload declares: bytes a parameter by arena and phase, where states lie, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest

import partita as pt
from partita.parallel.laid import Laid, lay
from partita.parallel.offload.rules import CHUNK, SETS, staging_bytes
from partita.simulate.memory import arena_ledger
from partita.simulate.predict import request_of
from partita.spec.plan import Plan

MB = 4  # microbatches of every plan here


def job(line: str, cluster: str = "16xh100") -> pt.Job:
    return pt.Job.of("llama3-8b", cluster, line, global_batch_size=8, seq_len=1024)


def moved(laid: Laid) -> Counter[tuple[str, str, str]]:
    """Bytes of a rank's step by (axis, kind of move, phase)."""
    found: Counter[tuple[str, str, str]] = Counter()
    for t in laid.traffic(0):
        if t.axis in ("host", "disk"):
            found[t.axis, t.site.rpartition(":")[2], t.phase] += t.bytes
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_update_brings_a_gradient_down_and_a_weight_up(stage: int) -> None:
    """bf16: 4 and 2 bytes a parameter of the shard, the states stay; on disk 12 are read and written."""
    shards = 8 if stage else 1
    line = f"dp_shard8.zero{stage} 1mb bf16 offload.targets=optimizer"
    here = job("").model.parameters() / shards
    for to in ("cpu", "nvme"):
        found = moved(lay(request_of(job(f"{line} offload:{to}"))))
        assert found.pop(("host", "offload", "step")) == pytest.approx(4 * here, rel=1e-4)
        assert found.pop(("host", "reload", "step")) == pytest.approx(2 * here, rel=1e-4)
        if to == "nvme":
            for kind in ("read", "write"):
                assert found.pop(("disk", kind, "step")) == pytest.approx(12 * here, rel=1e-4)
        assert not found


@pytest.mark.parametrize("to", ["cpu", "nvme"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_optimizer_on_the_device_is_brought_its_gradients(stage: int, to: str) -> None:
    """4 bytes a parameter of the shard up; from disk it is read twice, for the norm and for that."""
    line = f"dp_shard8.zero{stage} 1mb bf16 offload.targets=gradients offload:{to}"
    laid, here = lay(request_of(job(line))), job("").model.parameters() / (8 if stage else 1)
    found, summed = moved(laid), 8 * here if stage == 1 else here * (stage == 0)
    close = pytest.approx
    assert found["host", "reload", "step"] == close(4 * (here + summed), rel=1e-4)
    assert found["host", "offload", "step"] == close(4 * here * (stage < 2), rel=1e-4)
    assert found["disk", "read", "step"] == close(
        (to == "nvme") * 4 * (2 * here + summed), rel=1e-4
    )
    assert found["disk", "write", "step"] == close(
        (to == "nvme") * 4 * here * (stage < 2), rel=1e-4
    )
    buffers = arena_ledger(laid, 0, "host").at_peak["buffers"]
    assert buffers == CHUNK * 4 * (SETS if to == "nvme" else 1)


def test_without_masters_the_weight_comes_too() -> None:
    """Rounded at random: 4 and 2 bytes a parameter down, 2 up, and 8 of moments elsewhere."""
    line = "1mb bf16 precision.rounding=stochastic offload:cpu offload.targets=optimizer"
    laid, here = lay(request_of(job(line))), job("").model.parameters()
    found = moved(laid)
    assert found.pop(("host", "offload", "step")) == pytest.approx(6 * here, rel=1e-4)
    assert found.pop(("host", "reload", "step")) == pytest.approx(2 * here, rel=1e-4)
    assert not found
    assert arena_ledger(laid, 0, "host").at_peak["optimizer"] == 8 * here
    assert arena_ledger(laid, 0, "host").at_peak["buffers"] == CHUNK * (4 + 4 + 2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_leave_in_every_microbatch(stage: int) -> None:
    """Below stage 2 whole, and up once more for their sum; from there on as the shard that B scatters."""
    line = f"dp_shard2.zero{stage} {MB}mb bf16 offload:nvme"
    laid = lay(request_of(job(line)))
    found, whole = moved(laid), 4 * job("").model.parameters()
    shard = whole / (2 if stage else 1)
    made = shard if stage == 2 else whole
    summed = stage < 2  # once a step, over dp
    close = pytest.approx
    assert found["host", "offload", "B"] == close(MB * made, rel=1e-4)
    assert found["host", "offload", "step"] == close(shard * summed, rel=1e-4)
    assert found["host", "reload", "step"] == close(whole * summed + shard / 2, rel=1e-4)
    assert found["disk", "write", "B"] == close(MB * made, rel=1e-4)
    assert found["disk", "read", "B"] == close((MB - 1) * made, rel=1e-4)  # the first is put there
    read = 3 * shard + 2 * shard + made * summed  # states; norm and update; the sum
    assert found["disk", "read", "step"] == close(read, rel=1e-4)
    assert found["disk", "write", "step"] == close(3 * shard + shard * summed, rel=1e-4)


@pytest.mark.parametrize(("schedule", "updates"), [("pipedream", MB), ("pipedream_2bw", 1)])
def test_gradients_start_anew_behind_each_update(schedule: str, updates: int) -> None:
    """On disk only what is added to is read; the norm is read once a step, whatever its updates."""
    laid = lay(request_of(job(f"pp2:{schedule}/{MB}mb bf16 offload:nvme")))
    found = moved(laid)
    gradient = found["disk", "write", "B"] / MB
    assert gradient == 4 * sum(b.numel() for u in laid.units(0) for _, b, _ in u.weights)
    assert found["disk", "read", "B"] == (MB - updates) * gradient
    assert found["disk", "write", "step"] == updates * 3 * gradient  # masters and two moments
    assert found["disk", "read", "step"] == updates * (3 + 1) * gradient + gradient


def test_arenas_add_up_to_eighteen_bytes_a_parameter() -> None:
    parameters = job("").model.parameters()
    for line, host, disk in (
        ("", 0, 0),
        ("offload:cpu offload.targets=optimizer", 12, 0),
        ("offload:nvme offload.targets=gradients", 0, 4),
        ("offload:cpu", 16, 0),
        ("offload:nvme", 0, 16),
    ):
        laid = lay(request_of(job(f"1mb bf16 {line}")))
        buffers = arena_ledger(laid, 0, "host").at_peak.get("buffers", 0)
        assert arena_ledger(laid, 0, "host").peak_bytes - buffers == host * parameters
        assert arena_ledger(laid, 0, "disk").peak_bytes == disk * parameters


def test_host_memory_is_bounded_by_its_buffers() -> None:
    plan = Plan.parse("offload:nvme")
    words = SETS * (3 + 2)  # masters and two moments; gradients added to, and updated with
    assert staging_bytes(plan, 3, 10**9, 4) == staging_bytes(plan, 3, CHUNK, 4) == words * CHUNK * 4
    assert staging_bytes(plan, 3, 100, 4) == words * 400


@pytest.mark.parametrize(("target", "size"), [("optimizer", 24), ("gradients", 12)])
def test_an_update_takes_the_slowest_of_host_link_and_disk(target: str, size: int) -> None:
    """By a disk's rate that is halved the step grows by what it reads and writes: of gradients B's 4 bytes a
    parameter among them."""

    def seconds(rate: float) -> float:
        table = {"preset": "8xh100", "disk_bytes_per_s": rate}
        made = pt.Job.load(
            {
                "name": "x", "plan": "tp8+sp 1mb bf16 offload:nvme offload.targets=" + target,
                "model": {"preset": "llama3-8b"}, "cluster": table,
                "data": {"source": "python-stdlib"}, "train": {"global_batch_size": 8, "seq_len": 1024},
            }
        )  # fmt: skip
        found = pt.simulate(made)
        assert found.step_time_s is not None
        return found.step_time_s

    total = 8 * size * job("").model.parameters() / 8
    assert seconds(2e9) - seconds(4e9) == pytest.approx(total / 2e9 - total / 4e9, rel=0.01)


@pytest.mark.parametrize(
    "line, rule",
    [
        ("offload.targets=optimizer", "arena"),
        ("offload:cpu offload.targets=parameters", "shards"),
        ("dp_shard2.zero3 fp8 offload:nvme offload.targets=parameters", "fp8"),
    ],
)
def test_what_cannot_be_says_why_and_what_can(line: str, rule: str) -> None:
    found = [p for p in pt.simulate(job(line)).problems if p.severity == "error"]
    assert [p.rule for p in found if p.room == "offload"] == [rule]
    for problem in found:
        assert problem.nearest
        again = pt.simulate(job(problem.nearest)).problems
        assert not [p for p in again if p.severity == "error" and p.room == "offload"]

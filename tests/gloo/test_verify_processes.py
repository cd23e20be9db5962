import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "local"))
import verify_jobs
import worlds

from partita.comm.processes import start_ranks
from partita.verify.parity import verify
from partita.verify.processes import _tell
from partita.verify.runs import run_rank


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("plan", ["tp2+sp", "pp2:1f1b/4mb", "tp2+sp pp2/2mb recompute:full"])
def test_a_plan_equals_one_device_on_processes(plan, backend, tmp_path):
    found = verify(verify_jobs.job(tmp_path, f"{plan} fp64"), backend=backend)
    assert found.equal, str(found)


@pytest.mark.parametrize(
    ("plan", "backend"),
    [
        ("dp_shard2.zero3 2mb", "shm"),
        ("dp_shard2.zero2 ep2 2mb", "gloo"),
        pytest.param("dp_replicate2 dp_shard2.zero1 2mb", "gloo", marks=pytest.mark.slow),
        pytest.param("dp2.zero1 tp2+sp ep2 etp2 2mb", "shm", marks=pytest.mark.slow),
        pytest.param("pp2:dualpipev/4mb dp_shard2.zero3 ep2", "gloo", marks=pytest.mark.slow),
    ],
)
def test_cut_states_and_experts_equal_one_device_on_processes(plan, backend, tmp_path):
    """ZeRO's flat shards and the exact all-to-alls of experts, whose sizes are data."""
    experts = {**verify_jobs.EXPERTS, "layers": 5} if "ep2" in plan else {}
    found = verify(verify_jobs.job(tmp_path, f"{plan} fp64", **experts), backend=backend)
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "backend"),
    [
        ("tp4+sp", "shm"),
        ("dp2 tp2", "gloo"),
        ("pp4:1f1b/2mb recompute:full", "gloo"),
        ("dp2 tp2+sp pp2:1f1b/4mb", "shm"),
    ],
)
def test_gpt2_equals_one_device_on_processes(plan, backend, tmp_path):
    found = verify(verify_jobs.job(tmp_path, f"{plan} fp64", "gpt2"), backend=backend)
    assert found.equal, str(found)


@pytest.mark.parametrize(
    ("plan", "backend"),
    [
        ("dp2 pp2:zb_h1/4mb", "shm"),
        ("pp2:zb_v/4mb", "gloo"),
        *(
            pytest.param(plan, backend, marks=pytest.mark.slow)
            for plan, backend in (
                ("tp2+sp pp2:interleaved_1f1bx2/4mb", "shm"), ("pp2:dualpipe/4mb", "gloo"),
                ("pp2:v_half/4mb recompute:full", "shm"), ("tp2+sp pp2:zb_h2/4mb", "gloo"),
            )
        ),
    ],
)  # fmt: skip
def test_a_schedule_equals_one_device_on_processes(plan, backend, tmp_path):
    found = verify(verify_jobs.job(tmp_path, f"{plan} fp64", tied=True), backend=backend)
    assert found.equal, str(found)


@pytest.mark.parametrize(
    "backend", [pytest.param("shm"), pytest.param("gloo", marks=pytest.mark.slow)]
)
def test_rows_of_pairs_and_chunks_travel_between_processes(backend, tmp_path):
    """Several exchanges of a group under way at once, waited for in the order of their pieces."""
    plan = "dp_shard2.zero1 ep2 pp2:dualpipev/4mb expert.chunks=2 fp64"
    experts = verify_jobs.EXPERTS | {"layers": 5}
    found = verify(verify_jobs.job(tmp_path, plan, batch=16, **experts), backend=backend)
    assert found.equal, str(found)


@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_context_parallelism_equals_one_device_on_processes(backend, tmp_path):
    """Exchanges inside a ring, documents packed."""
    job = verify_jobs.job(tmp_path, "cp4:hybrid2x2 2mb fp64", layers=2, packed=True)
    found = verify(job, backend=backend)
    assert found.equal, str(found)


def of_two_hosts(rank, writer, job, data, _, path) -> None:
    """A rank of verify: shared memory within a host of two ranks, gloo between the hosts."""
    world = worlds.join(rank, "hierarchy", job.plan.world_size, Path(path), 30)
    _tell(writer, run_rank(world, job, data))
    world.close()


@pytest.mark.parametrize(
    "plan", ["dp_shard4.zero3 2mb", pytest.param("dp_replicate4 2mb", marks=pytest.mark.slow)]
)
def test_groups_that_span_hosts_move_what_is_declared(plan, tmp_path, monkeypatch):
    """Reductions started under backward, whose parts a thread takes in turn, gathers, norms."""
    monkeypatch.setattr(
        "partita.verify.processes.start_ranks",
        lambda size, _, args: start_ranks(size, of_two_hosts, args),
    )
    found = verify(verify_jobs.job(tmp_path, f"{plan} fp64"), backend="gloo")
    assert found.equal and found.traffic_equal, str(found)

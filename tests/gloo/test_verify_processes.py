import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "local"))
import verify_jobs

from partita.verify.parity import verify


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("plan", ["tp2+sp", "dp2", "pp2:1f1b/4mb", "tp2+sp pp2/2mb recompute:full"])
def test_a_plan_equals_one_device_on_processes(plan, backend, tmp_path):
    found = verify(verify_jobs.job(tmp_path, f"{plan} fp64"), backend=backend)
    assert found.equal, str(found)


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
            for backend in ("shm", "gloo")
            for plan in (
                "tp2+sp pp2:interleaved_1f1bx2/4mb", "pp2:dualpipe/4mb", "pp2:v_half/4mb recompute:full",
                "tp2+sp pp2:zb_h2/4mb",
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

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "local"))
import covering
import covering_jobs
import verify_jobs
import worlds

from partita.comm.processes import start_ranks
from partita.verify.parity import verify
from partita.verify.processes import _tell
from partita.verify.runs import run_rank

CHOSEN = covering.on_processes(covering_jobs.ROWS)


def pytest_generate_tests(metafunc):
    """Every third plan, beginning with another for each commit: all of them with --every."""
    if "row" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every")
        rows = CHOSEN if every else covering.third(CHOSEN, 0)
        marks = [() if i % 3 == 0 else pytest.mark.slow for i in range(len(rows))]
        names = [f"{backend}, {covering.name(row)}" for row, backend in rows]
        each = [
            pytest.param(*of, marks=m, id=n) for of, m, n in zip(rows, marks, names, strict=True)
        ]
        metafunc.parametrize(("row", "backend"), each)


@pytest.mark.turns(2)
@pytest.mark.timeout(120)
def test_a_third_of_the_plans_of_many_features_equals_one_device_on_processes(
    row, backend, tmp_path
):
    found = verify(covering_jobs.job(tmp_path, row), backend=backend, brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_every_feature_runs_on_processes():
    """Half of the third on shared memory, half on gloo, in turn."""
    every = {(f, v) for f, values in covering.FEATURES.items() for v in values if v}
    assert every <= {x for row, _ in CHOSEN for x in row.items()}
    backends = [backend for _, backend in CHOSEN]
    assert len(CHOSEN) == len(covering_jobs.ROWS) // 3
    assert backends.count("shm") - backends.count("gloo") == len(CHOSEN) % 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "backend"), [("tp4+sp", "shm"), ("pp4:1f1b/2mb recompute:full", "gloo")]
)
def test_four_ranks_of_an_axis_equal_one_device_on_processes(plan, backend, tmp_path):
    """Kv heads that pairs of tp share; stages with neighbours on both sides."""
    found = verify(verify_jobs.job(tmp_path, f"{plan} fp64"), backend=backend)
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


def test_what_a_ring_sends_has_gone_out_before_its_memory_is_freed(tmp_path):
    """gloo reads a tensor when its peer is ready; keys that are kept and moved away are freed at once."""
    plan = "cp2:ring 4mb offload:cpu offload.targets=activations fp64"
    found = verify(verify_jobs.job(tmp_path, plan), backend="gloo", brief=True)
    assert found.equal and found.traffic_equal, str(found)

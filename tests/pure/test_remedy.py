"""What would fit, fits: each remedy that a plan too big is told, applied and simulated again."""

import re
from dataclasses import replace

import pytest

from partita.base.units import format_seconds
from partita.planner.answers.judge import fit_error
from partita.planner.answers.remedy import changes, remedies
from partita.simulate.predict import simulate
from partita.spec.cluster import Cluster
from partita.spec.job import Job


def job_of(line: str, share: float, batch: int = 16) -> Job:
    """A plan that needs 1 / share of what a device has."""
    job = Job.of("llama3.2-1b", "8xh100", line, global_batch_size=batch, seq_len=2048)
    peak = max(x.peak_bytes for x in simulate(job).ledgers)
    cluster = replace(job.cluster, memory_bytes=int(peak * share), memory_limit_fraction=1.0)
    return replace(job, cluster=cluster)


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("dp_replicate8 bf16", 0.9),
        ("dp_replicate8 bf16", 0.3),
        ("dp_replicate4", 0.5),
        ("pp4:gpipe/4mb dp_replicate2 bf16", 0.7),
        ("tp4 dp_shard2.zero1 bf16", 0.4),
        ("cp2:ring tp2+sp dp_replicate2 1mb bf16", 0.25),
    ],
)
def test_each_remedy_fits_at_the_time_it_said(line, share):
    job = job_of(line, share)
    found = remedies(job)
    assert found and not simulate(job).fits
    times = [r.prediction.step_time_s or 0.0 for r in found]
    assert times == sorted(times), "the cheapest comes first"
    text = str(fit_error(job, simulate(job)))
    told = re.findall(r'plan="([^"]+)" needs [^,]+, (.+?) a step', text)
    assert [plan for plan, _ in told] == [r.prediction.plan for r in found]
    for remedy, (plan, seconds) in zip(found, told, strict=True):
        applied = simulate(job.with_plan(plan))
        assert applied.fits and format_seconds(applied.step_time_s or 0.0) == seconds
        assert applied.step_time_s == remedy.prediction.step_time_s
        assert max(x.peak_bytes for x in applied.ledgers) == remedy.peak_bytes


def test_changes_are_of_one_kind_each():
    job = job_of("pp2:1f1b/4mb dp_replicate4", 1.0)
    found = changes(job, job.plan)
    assert {"recompute:full", "bf16", "v_half", "twice the tp", "dp_shard.zero3"} <= found.keys()
    assert found["twice the tp"].world_size <= Cluster.load("8xh100").devices


def test_nothing_close_by_is_said():
    job = job_of("tp4 dp_shard2.zero3 recompute:full bf16", 0.001)
    assert remedies(job) == []
    assert "nothing close by" in str(fit_error(job, simulate(job)))


def test_changes_of_a_plan_made_for_its_costs_can_be():
    line = "pp4:auto/8mb dp_replicate2 bf16 pipeline.costs=78_92_70x8,1 pipeline.limit=9"
    job = job_of(line, 1.0)
    found = changes(job, job.plan)
    for name in ("1f1b", "twice the pp"):
        assert not found[name].pipeline.costs and not found[name].pipeline.limit
    assert not [p for p in simulate(job.with_plan(found["1f1b"])).problems if p.severity == "error"]

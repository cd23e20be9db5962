"""Failures, checkpoints, jitter and stragglers: draws beside closed forms."""

import random
from dataclasses import replace
from math import exp, expm1, inf
from statistics import NormalDist

import numpy as np
import pytest

import partita as pt
from partita.base.errors import UsageError
from partita.schedule.clock import Costs, StageCosts, clock, makespan
from partita.schedule.make import schedule
from partita.schedule.order import turns
from partita.simulate import goodput as g
from partita.simulate.jitter import Crowd, crowd, drawn_steps, played
from partita.spec.cluster import Cluster
from partita.spec.reliability import Jitter, Reliability

FAULTS = g.Faults(mtbf_s=10_000.0, checkpoint_s=60.0, restart_s=300.0)
BEHIND = g.Faults(mtbf_s=10_000.0, checkpoint_s=5.0, restart_s=300.0, behind_s=55.0)
CLUSTER = {
    "device": "h100",
    "devices": 64,
    "reliability": {"device_mtbf_s": 1e8, "restart_s": 600, "checkpoint_bytes_per_s": 1e9},
    "jitter": {"compute": 0.02, "rank": 0.01, "slow_fraction": 0.01, "slow_factor": 1.2},
}


def job(plan="pp2:1f1b/8mb dp_replicate4 tp8+sp bf16", **train):
    batch = {"global_batch_size": 32, "seq_len": 4096, "steps": 100_000, **train}
    return pt.Job.of("llama3-8b", CLUSTER, plan, **batch)


@pytest.mark.parametrize("interval", [200.0, 1000.0, 5000.0])
@pytest.mark.parametrize("faults", [FAULTS, BEHIND])
def test_drawn_failures_give_the_closed_form(faults, interval):
    drawn = g.played(faults, interval, failures=40_000)
    assert drawn == pytest.approx(g.goodput(faults, interval), rel=0.015)


def test_what_is_written_behind_costs_less():
    """The same bytes: a run that stands still for the copy alone does more work, though a failure takes
    what was not yet safe."""
    for interval in (200.0, 1000.0):
        assert g.goodput(BEHIND, interval) > g.goodput(FAULTS, interval)
    assert BEHIND.safe(1000.0, 300.0) == 900.0  # 945 s of up to 305 each
    assert BEHIND.safe(969.0, 300.0) == 600.0  # the third is not yet safe


def test_runs_of_a_job_take_the_closed_forms_time():
    draw = random.Random(1)
    work = 100 * 1000.0
    walls = [g.wall_seconds(FAULTS, 1000.0, work, draw) for _ in range(3000)]
    assert sum(walls) / len(walls) == pytest.approx(work / g.goodput(FAULTS, 1000.0), rel=0.01)


def test_dalys_interval_is_the_best():
    best = g.daly(FAULTS)
    assert g.young(FAULTS) == pytest.approx((2 * 60 * 10_000) ** 0.5)
    here = g.goodput(FAULTS, best)
    around = [g.goodput(FAULTS, best * f) for f in (0.5, 0.9, 1.1, 2.0)]
    assert here >= max(around)
    tight = [g.goodput(FAULTS, best * f) for f in np.linspace(0.8, 1.2, 41)]
    assert here >= max(tight) * (1 - 1e-5)


def test_a_job_that_cannot_get_through_says_so():
    hopeless = g.Faults(mtbf_s=1.0, checkpoint_s=10.0, restart_s=5000.0)
    assert g.goodput(hopeless, 1000.0) == 0.0
    with pytest.raises(UsageError, match="not above 0"):
        Reliability(device_mtbf_s=0)
    never = replace(job().cluster, reliability=Reliability(device_mtbf_s=1e4, restart_s=1e6))
    found = g.outlook(never, 16, 10**10, 1.0, (100, 0))
    assert found["goodput"] == found["simulated"]["goodput"] == 0.0
    assert found["simulated"]["run_s"]["mean"] == inf
    alone = g.outlook(never, 1, 10**6, 1.0, (10, 10**9))["simulated"]["run_s"]
    assert alone["p50"] == pytest.approx(10.0, rel=0.01), "a run that ends before it is ever saved"


def test_restarts_that_fail_hundreds_of_times_take_the_closed_forms_time():
    faults = g.Faults(mtbf_s=100.0, checkpoint_s=1.0, restart_s=650.0)
    assert faults.restart_s > g.OFTEN * faults.mtbf_s
    drawn = g.played(faults, 20.0, failures=40_000)
    assert drawn == pytest.approx(g.goodput(faults, 20.0), rel=0.03)
    draw, work = random.Random(1), 50_000.0
    lives = work / (20 / expm1(0.21))  # what each leaves of work: 20 s, on average 4.3 times
    assert g.failures_of(faults, 20.0, work) == pytest.approx(lives)
    walls = [g.wall_seconds(faults, 20.0, work, draw) for _ in range(40)]
    assert sum(walls) / 40 == pytest.approx(work / g.goodput(faults, 20.0), rel=0.03)


SCHEDULES = (("1f1b", 4, 1), ("zb_h1", 4, 1), ("interleaved_1f1b", 2, 2), ("dualpipev", 2, 2))


@pytest.mark.parametrize(("name", "p", "v"), SCHEDULES)
def test_turns_end_when_the_clock_says(name, p, v):
    s = schedule(name, num_ranks=p, num_microbatches=8, virtual_stages=v)
    costs = Costs(
        tuple(StageCosts(1 + 0.1 * i, 1.2, 0.9) for i in range(p * v)), send=0.05, wire=0.04
    )
    order = turns(s)
    each = [costs.stages[t.action.stage].of(t.action.kind) for t in order]
    assert played(order, each, costs) == pytest.approx(makespan(clock(s, costs)), rel=1e-12)
    still = drawn_steps(s, costs, Jitter(), Crowd(8, 2))
    assert still == pytest.approx(makespan(clock(s, costs)), rel=1e-12)


@pytest.mark.parametrize(("beside", "replicas"), [(1, 1), (8, 1), (1, 16), (8, 16)])
def test_the_slowest_of_many_is_the_closed_forms(beside, replicas):
    """One action: the q-quantile of the largest of n draws is exp(sigma Phi^-1(q^(1/n))), however the n
    ranks meet."""
    s = schedule("1f1b", num_ranks=1, num_microbatches=1)
    costs = Costs((StageCosts(1.0, 0.0, 0.0),))
    n, sigma = beside * replicas, 0.1
    found = drawn_steps(s, costs, Jitter(rank=sigma), Crowd(beside, replicas))
    for q in (0.25, 0.5, 0.75):
        assert np.quantile(found, q) == pytest.approx(
            exp(sigma * NormalDist().inv_cdf(q ** (1 / n))), rel=0.015
        )


def test_one_slow_rank_holds_all():
    s = schedule("1f1b", num_ranks=2, num_microbatches=4)
    costs = Costs((StageCosts(),) * 2)
    found = drawn_steps(s, costs, Jitter(slow_fraction=0.01, slow_factor=1.5), Crowd(4, 8))
    alike = makespan(clock(s, costs))
    assert found.max() <= 1.5 * alike * (1 + 1e-12)
    share = np.mean(found > alike * (1 + 1e-12))
    assert share == pytest.approx(1 - 0.99**64, abs=0.08)


def test_who_waits_for_whom_is_read_off_the_plan():
    def of(plan):
        p = pt.simulate(job(plan))
        return crowd(p.laid, p.timed.works)

    assert of("pp2:1f1b/8mb dp_replicate4 tp8+sp bf16") == Crowd(8, 4)
    assert of("dp_shard8.zero3 tp8+sp bf16") == Crowd(64, 1)
    assert of("dp_shard8.zero1 tp8+sp bf16") == Crowd(8, 8)


def test_simulate_answers_with_the_outlook():
    p = pt.simulate(job())
    found = p.to_json()
    slow, fail = found["jitter"], found["goodput"]
    assert slow["step_time_s"]["mean"] > p.step_time_s
    assert slow["step_time_s"]["p50"] <= slow["step_time_s"]["p90"] <= slow["step_time_s"]["p99"]
    assert slow["slowdown"] == pytest.approx(slow["step_time_s"]["mean"] / p.step_time_s)
    assert fail["mtbf_s"] == 1e8 / 64
    assert fail["interval_s"] == max(fail["daly_interval_s"], fail["behind_s"])
    assert fail["goodput"] == fail["best_goodput"]
    assert fail["simulated"]["goodput"] == pytest.approx(fail["goodput"], rel=0.02)
    assert found == pt.simulate(job()).to_json()  # seeded
    stated = pt.simulate(job(checkpoint_every=50)).to_json()["goodput"]
    assert stated["interval_s"] == pytest.approx(50 * slow["step_time_s"]["mean"])
    even = replace(job(), cluster=replace(job().cluster, jitter=None, reliability=None))
    assert pt.simulate(even).to_json()["jitter"] is None


def test_the_tables_of_a_cluster_file_round_trip():
    cluster = Cluster.load(CLUSTER)
    assert cluster.jitter == Jitter(0.02, 0.01, 0.01, 1.2)
    assert Cluster.load(cluster.to_toml()) == cluster
    with pytest.raises(UsageError, match="slow_factor"):
        Cluster.load({**CLUSTER, "jitter": {"slow_factor": 0.5}})

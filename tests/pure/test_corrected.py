"""Plans that were run make the next prediction nearer, and no choice another."""

import pytest

from partita.planner.search.search import searcher
from partita.simulate.predict import simulate
from partita.spec.calibrated import calibrated
from partita.spec.cluster import Cluster
from partita.spec.corrected import PlanRun, learn, read_runs, runs_path, slower_of
from partita.spec.job import Job

LAPTOP = {"preset": "laptop", "devices": 2, "memory_bytes": 10**9}
SIZES = {"global_batch_size": 8, "seq_len": 64}


def took(plan: str, predicted: float, measured: float) -> PlanRun:
    return PlanRun("tiny", plan, 64, 8, predicted, measured)


def test_every_step_is_longer_by_what_plans_took():
    for line in ("tp2+sp 2mb", "pp2:1f1b/4mb bf16", "dp_shard2.zero3 4mb offload:cpu"):
        one = Job.of("tiny", LAPTOP, line, **SIZES)
        other = Job.of("tiny", {**LAPTOP, "slower": 1.5}, line, **SIZES)
        first, second = simulate(one), simulate(other)
        assert second.step_time_s == pytest.approx(1.5 * first.step_time_s, rel=1e-9), line
        assert second.ledgers == first.ledgers
    jobs = [Job.of("tiny", {**LAPTOP, "slower": by}, "", **SIZES) for by in (1.0, 1.5)]
    best = [searcher(j, ("2mb", "fp32"), ("cp", "v_half")).best().plans[0].plan for j in jobs]
    assert best[0] == best[1]


def test_runs_are_kept_beside_the_rates_they_were_of(tmp_path):
    cluster = Cluster.load(LAPTOP)
    assert calibrated(cluster, tmp_path) == cluster
    path, slower = learn(cluster, [took("tp2", 1.0, 1.2), took("pp2", 1.0, 1.3)], tmp_path)
    assert path == runs_path(cluster, tmp_path) and slower == calibrated(cluster, tmp_path).slower
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # beside, no calibration's file
    _, slower = learn(cluster, [took("tp2", 1.0, 2.0), took("pp2", 1.0, 2.0)], tmp_path)
    assert slower == 2.0 and len(read_runs(path)) == 2  # the last run of a plan counts
    more = Cluster.load({**LAPTOP, "devices": 4})
    assert calibrated(more, tmp_path).slower == 2.0  # the same machine
    other = Cluster.load({**LAPTOP, "memory_bytes_per_s": 1e9})
    assert calibrated(other, tmp_path) == other  # other rates: nothing was run at them
    path.write_text("{")
    assert calibrated(cluster, tmp_path) == cluster


def test_no_factor_is_nearer_to_the_runs():
    runs = [took(str(i), 1.0, s) for i, s in enumerate((0.7, 0.9, 1.0, 1.4, 2.2))]

    def error(by: float) -> float:
        return sum(abs(by * r.predicted_s / r.measured_s - 1) for r in runs)

    best = slower_of(runs)
    assert all(error(best) <= error(by / 100) for by in range(50, 300))
    assert slower_of([]) == 1.0

"""What was measured of pieces wins over the model; no size does better than the best one measured."""

from dataclasses import replace

import pytest

from partita.base.errors import UsageError
from partita.cost.kernels import Kernel, kernel_seconds
from partita.cost.machine import machine_of
from partita.cost.pieces import CROWDED, curve, on_curve
from partita.simulate.predict import simulate
from partita.simulate.step import update_seconds
from partita.spec.cluster import Cluster
from partita.spec.job import Job

LAPTOP = Cluster.load("laptop")
NORM = {"100": 1e-5, "1000": 2e-5, "10000": 8e-5}


def measured(**pieces):
    return replace(LAPTOP, piece_seconds={"fp32": pieces})


def test_seconds_lie_on_lines_and_no_size_beats_the_best_rate():
    made = curve(NORM)
    assert on_curve(0, made) == 0
    assert on_curve(5, made) == on_curve(100, made) == 1e-5
    assert on_curve(5500, made) == pytest.approx(5e-5)
    assert on_curve(30_000, made) == pytest.approx(8e-5 + 20_000 * 8e-9)
    rates = [on_curve(n, made) / n for n in (50, 100, 700, 1000, 4000, 10_000, 10**6)]
    assert min(rates) >= 8e-9 * (1 - 1e-9)
    slow = curve({"100": 3e-5, "1000": 2e-5, "10000": 8e-5})  # disturbed at the smallest
    assert on_curve(100, slow) == 2e-5


def test_a_kernel_is_its_pieces_where_all_of_them_were_measured():
    kernel = Kernel("memory", 4e5, dtype="fp32", pieces=(("norm", 1000.0), ("add", 1000.0)))
    roofline = kernel_seconds(kernel, machine_of(LAPTOP))
    assert kernel_seconds(kernel, machine_of(measured(norm=NORM))) == roofline
    both = measured(norm=NORM, add={"1000": 1e-6})
    assert kernel_seconds(kernel, machine_of(both)) == pytest.approx(2.1e-5)
    assert kernel_seconds(replace(kernel, count=3), machine_of(both)) == pytest.approx(6.3e-5)


def test_attention_takes_the_curve_of_its_keys():
    made = machine_of(measured(**{"attention 16": {"10": 1.0}, "attention 512": {"10": 9.0}}))
    kernel = Kernel("attention", k=100, dtype="fp32", pieces=(("attention", 10.0),))
    assert kernel_seconds(replace(kernel, k=600), made) == 9.0
    assert kernel_seconds(replace(kernel, k=512), made) == 9.0
    assert (
        kernel_seconds(replace(kernel, k=8), made)
        == kernel_seconds(replace(kernel, k=16), made)
        == 1.0
    )
    middle = kernel_seconds(replace(kernel, k=31), made)
    assert middle == pytest.approx(5.0, rel=0.01)  # 2 / 31 lies between 1 / 16 and 1 / 512


def test_updates_and_collectives_are_measured_too():
    made = machine_of(measured(update={"1000": 1.0}))
    assert update_seconds(10, made) == 1.0
    table = {"all_reduce": {"2": {"8": 1.0}, "4": {"8": 3.0}}}
    clock = machine_of(replace(LAPTOP, collective_seconds=table))
    found = clock.collective("all_reduce", 2)
    assert found is not None
    assert on_curve(8, found) == 1.0


def test_ranks_that_take_turns_pay_what_collectives_and_messages_take_of_a_core():
    def seconds(plan: str, **more: float) -> float:
        calls = {"all_reduce": 1e-4} | more
        job = Job.load(
            {
                "name": "turns", "plan": plan, "model": {"preset": "quickstart"},
                "train": {"global_batch_size": 4, "seq_len": 64}, "cluster": {"preset": "laptop"},
            }
        )  # fmt: skip
        table = {
            name.replace("_CROWDED", CROWDED): {"2": {"1": s, "9999999": s}}
            for name, s in calls.items()
        }
        two = replace(LAPTOP, cores_shared=2, collective_seconds=table)
        return simulate(replace(job, cluster=two)).step_time_s or 0.0

    assert seconds("tp2 1mb", all_reduce_CROWDED=1.0) == seconds("tp2 1mb")  # a core each
    both = "dp2 tp2 1mb"
    assert seconds(both, all_reduce_CROWDED=1e-3) > seconds(both) + 20 * 9e-4
    # a stage copies its messages: in each F and B, whether or not the other waits for it
    pipe = "pp2:gpipe/4mb"
    assert seconds(pipe, send=0.02) - seconds(pipe, send=0.01) == pytest.approx(10 * 0.01, rel=1e-6)


def test_a_step_is_longer_where_pieces_take_longer():
    def seconds(slow):
        job = Job.load(
            {
                "name": "curves", "plan": "2mb", "model": {"preset": "quickstart"},
                "train": {"global_batch_size": 2, "seq_len": 64}, "cluster": {"preset": "laptop"},
            }
        )  # fmt: skip
        cluster = measured(norm={"1": slow}, **{"norm.back": {"1": slow}}, action={"1": slow})
        return simulate(replace(job, cluster=cluster)).step_time_s or 0.0

    assert seconds(1e-3) < seconds(2e-3)


def test_a_file_keeps_them_and_a_wrong_size_is_told():
    made = measured(norm=NORM)
    assert Cluster.from_toml(made.to_toml()) == made
    with pytest.raises(UsageError, match="no size"):
        measured(norm={"1x2": 1.0})

"""A measured machine: products of every size take what was measured of theirs."""

from dataclasses import replace

import pytest

from partita.base.errors import UsageError
from partita.cost.kernels import Kernel, kernel_seconds
from partita.cost.machine import machine_of
from partita.spec.cluster import Cluster

LAPTOP = Cluster.load("laptop")
RATES = {"fp32": {"10x10x10": 1e9, "100x100x100": 4e9, "1000x1000x1000": 8e9}}


def seconds(side, cluster, count=1):
    return kernel_seconds(
        Kernel("matmul", m=side, n=side, k=side, count=count, dtype="fp32"), machine_of(cluster)
    )


def test_between_measured_sizes_seconds_lie_on_a_line_and_beyond_them_the_rate_stays():
    made = replace(LAPTOP, matmul_flops_per_s=RATES)
    assert seconds(10, made) == pytest.approx(2e3 / 1e9)
    assert seconds(5, made) == pytest.approx(250 / 1e9)
    assert seconds(100, made) == pytest.approx(2e6 / 4e9)
    assert seconds(100, made, count=3) == pytest.approx(6e6 / 4e9)
    assert seconds(2000, made) == pytest.approx(16e9 / 8e9)
    half = (2e3 + 2e6) / 2
    want = (2e3 / 1e9 + 2e6 / 4e9) / 2
    assert seconds((half / 2) ** (1 / 3), made) == pytest.approx(want)
    sides = [2 ** (i / 4) for i in range(4, 48)]
    times = [seconds(s, made) for s in sides]
    assert times == sorted(times)


def test_without_them_the_peak_is_reached():
    assert seconds(10, LAPTOP) == pytest.approx(2e3 / LAPTOP.peak("fp32"))


def test_a_file_keeps_them_and_a_wrong_size_is_told():
    made = replace(LAPTOP, matmul_flops_per_s=RATES)
    assert Cluster.from_toml(made.to_toml()) == made
    with pytest.raises(UsageError, match="rows x inner x columns"):
        replace(LAPTOP, matmul_flops_per_s={"fp32": {"10x10": 1e9}})

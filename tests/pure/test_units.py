import math

import pytest

from partita.base.text import did_you_mean, nearest_name, table
from partita.base.units import (
    bytes_apart,
    format_bytes,
    format_count,
    format_rate,
    format_seconds,
    seconds_apart,
    times,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.9, "1.00 kB"),
        (1_000, "1 kB"),
        (999_950, "1.00 MB"),
        (1_500, "1.50 kB"),
        (31_500_000, "31.5 MB"),
        (80e9, "80 GB"),
        (1.12e12, "1.12 TB"),
        (2.5e21, "2500 EB"),
        (-2e6, "-2 MB"),
        (math.inf, "inf"),
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert format_bytes(value) == text


def test_rates_and_counts() -> None:
    assert format_rate(450e9) == "450 GB/s"
    assert format_rate(989e12, "FLOP") == "989 TFLOP/s"
    assert format_count(8_030_261_248) == "8.03G"
    assert format_count(0.25) == "0.25"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (3.2e-10, "0.32 ns"),
        (1.5e-5, "15.0 us"),
        (0.0123, "12.3 ms"),
        (4.25, "4.25 s"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (90_000, "1 d 1 h"),
        (-2, "-2 s"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_table_aligns_numbers_right() -> None:
    assert table([["tp", 12], ["dp_shard", 3]], header=["axis", "calls"]).splitlines() == [
        "axis      calls",
        "tp           12",
        "dp_shard      3",
    ]
    assert table([["8mb bf16", "1.5 s"], ["4mb", "12 s"]]) == "8mb bf16  1.5 s\n4mb        12 s"
    assert table([]) == ""
    assert table([["a"], ["b", None, "c"]]) == "a\nb    c"


def test_the_nearest_name() -> None:
    assert nearest_name("layer", ["hidden", "layers"]) == "layers"
    assert did_you_mean("Layrs", ["hidden", "layers"]) == "; did you mean 'layers'?"
    assert did_you_mean("zzz", ["hidden", "layers"]) == "; known: hidden, layers"


def test_durations_beside_each_other_are_told_apart() -> None:
    assert seconds_apart(5.1041, 5.0996) == ("5.104 s", "5.100 s")
    assert seconds_apart(0.00335191, 0.00335223) == ("3.3519 ms", "3.3522 ms")
    assert seconds_apart(5.0, 6.0) == ("5 s", "6 s")
    assert seconds_apart(2.0, 2.0) == ("2 s", "2 s")
    assert seconds_apart(7201.0, 7202.0) == ("2 h", "2 h")


def test_what_is_just_beyond_a_limit_is_seen_to_be() -> None:
    assert bytes_apart(22.603e9, 22.6e9) == ("22.603 GB", "22.600 GB")
    assert bytes_apart(80e9, 40e9) == ("80 GB", "40 GB")
    assert bytes_apart(5, 5) == ("5 B", "5 B")
    assert (times(22.603e9, 22.6e9), times(3, 2)) == ("1.0001 times", "1.50 times")

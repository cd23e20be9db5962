"""The acceptance table: flush time, span and peak of every schedule, in closed form (docs in schedule/make).

F=I=W=1, of a rank's whole share, and no time for messages unless a test says so; equal to 1e-9.
"""

import pytest

from partita.schedule.check import check
from partita.schedule.clock import Costs, clock, makespan, peak_activations, span
from partita.schedule.ir import Schedule
from partita.schedule.make import schedule

RANKS = (2, 4, 8)
SPLIT_COSTS = [(1.0, 1.1, 0.9), (1.0, 1.0, 1.0), (2.0, 1.0, 0.5), (1.0, 3.0, 1.0)]  # W <= F


def make(name: str, p: int, m: int, v: int = 1) -> Schedule:
    return schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=v)


def hold(s: Schedule, flush: float, spans: float, peak: float, pair: str = "sequence") -> None:
    """Runs, and takes exactly this long; holds at most `peak` chunks."""
    times = clock(s, pair=pair)
    assert check(s) == []
    assert makespan(times) == pytest.approx(flush, abs=1e-9)
    assert span(times) == pytest.approx(spans, abs=1e-9)
    assert max(peak_activations(s)) <= peak


def hold_all(p: int, m: int, virtual: tuple[int, ...]) -> None:
    """Every row of the table at one (p, m)."""
    for v in virtual:
        if m % p == 0:
            t, peak = 3 * (m + (p - 1) / v), 2 * (p - 1) + (v - 1) * p + 1
            hold(make("interleaved_1f1b", p, m, v), t, t, peak)
        if m >= p:
            t = 3 * (m + (p - 1) / v)
            hold(make("looped_bfs", p, m, v), t, t, m * v)
    hold(make("gpipe", p, m), 3 * (m + p - 1), 3 * (m + p - 1), m)
    hold(make("1f1b", p, m), 3 * (m + p - 1), 3 * (m + p - 1), min(m, p))
    if m >= p:
        hold(make("zb_h1", p, m), 3 * m + p - 1, 3 * m + p - 1, p)
    if m >= 2 * p - 1:
        hold(make("zb_h2", p, m), 3 * m + p - 1, 3 * m, 2 * p - 1)
        hold(make("zb_v", p, m), 3 * m + (p - 1) / 2, 3 * m, 2 * p)
    if m >= 2 * p:
        t, block = 3 * m + (p - 1) / 2, 3 * m + p - 1
        hold(make("dualpipev", p, m), t, t, 2 * p + 1)
        hold(make("dualpipev", p, m), block, block, 2 * p + 1, "block")
    if m >= 2 * p and p % 2 == m % 2 == 0:
        t, block = 3 * m + p / 2 - 1, 3 * m + p - 2
        hold(make("dualpipe", p, m), t, t, p + 1)
        hold(make("dualpipe", p, m), block, block, p + 1, "block")


@pytest.mark.parametrize("p", RANKS)
def test_the_table(p):
    for m in {p, 2 * p, 2 * p + 1, 32 if p < 8 else 24}:
        hold_all(p, m, (1, 2))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("p", range(1, 17))
def test_the_table_everywhere(p):
    for m in sorted({*range(1, 65, 1 if p <= 4 else 5), p, 2 * p - 1, 2 * p, 64}):
        hold_all(p, m, (1, 2, 3, 4) if m <= 32 else (4,))


@pytest.mark.parametrize("f, i, w", SPLIT_COSTS)
def test_zero_bubble_lines_at_unequal_costs(f, i, w):
    t = f + i + w
    for p in RANKS:
        for m in (2 * p - 1, 2 * p, 24):
            s = make("zb_h1", p, m)
            times = clock(s, Costs.equal(s, f, i, w))
            assert span(times) == pytest.approx(m * t + (p - 1) * (f + i - w), abs=1e-9)
            flush = m * t + (p - 1) * max(f, f + i - w)
            assert makespan(times) == pytest.approx(flush, abs=1e-9)
            s = make("zb_h2", p, m)
            times = clock(s, Costs.equal(s, f, i, w))
            spans = m * t + (p - 1) * max(0, f + i - 2 * w)
            assert span(times) == pytest.approx(spans, abs=1e-9)
            assert makespan(times) >= m * t + (p - 1) * f - 1e-9


def test_zero_bubble_lines_are_never_below_their_bounds():
    for f, i, w in [(1.0, 0.5, 2.0), (0.3, 1.7, 0.9), (1.0, 2.0, 3.0)]:
        t = f + i + w
        for p in RANKS:
            s = make("zb_h1", p, 2 * p)
            times = clock(s, Costs.equal(s, f, i, w))
            assert span(times) >= 2 * p * t + (p - 1) * (f + i - w) - 1e-9
            assert makespan(times) >= 2 * p * t + (p - 1) * max(f, f + i - w) - 1e-9


def test_what_zb_v_and_the_overlapped_pairs_take_at_unequal_costs():
    for p in RANKS:
        s = make("zb_v", p, 4 * p)
        times = clock(s, Costs.equal(s, 1.0, 1.1, 0.9))
        assert span(times) - 12 * p == pytest.approx(0.2 * (p - 1), abs=1e-9)
    for p in (2, 4, 8):
        s = make("dualpipe", p, 2 * p)
        times = clock(s, Costs.equal(s, 1.0, 1.1, 0.9))
        assert makespan(times) - 6 * p == pytest.approx((p / 2 - 1) * 1.2, abs=1e-9)
        s = make("dualpipev", p, 2 * p)
        times = clock(s, Costs.equal(s, 1.0, 1.1, 0.9))
        assert makespan(times) - 6 * p == pytest.approx((p - 1) / 2 * 1.2, abs=1e-9)


def test_the_worked_example():
    """p = 4, m = 8: the first rank of each, lower case for chunk 1 or direction 1."""
    lists = {
        "zb_h1": "F0 F1 F2 F3 I0 W0 F4 I1 W1 F5 I2 W2 F6 I3 W3 F7 I4 W4 I5 W5 I6 W6 I7 W7",
        "zb_h2": "F0 F1 F2 F3 F4 F5 F6 I0 W0 F7 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5 I6 W6 I7 W7",
        "zb_v": "F0 F1 F2 F3 F4 F5 F6 f0 i0 w0 f1 i1 w1 f2 i2 w2 f3 i3 w3 F7 I0 W0 f4 i4 w4 I1 W1 f5 i5 w5 "
        "I2 W2 f6 i6 w6 I3 W3 f7 i7 w7 I4 W4 I5 W5 I6 W6 I7 W7",
        "dualpipe": "F0 F1 F2 f4 i4 w4 f5 F3 b5 f6 B0 b6 f7 B1 b7 I2 W2 I3 W3",
    }
    for name, words in lists.items():
        s = make(name, 4, 8)
        second = s.direction or (0,) * 8
        cells = [
            (k.lower() if stage >= 4 or second[mb] else k) + str(mb) for stage, k, mb in s.ranks[0]
        ]
        assert " ".join(cells) == words

"""The acceptance table: flush time, span and peak of every schedule, in closed form (docs in schedule/make).

F=I=W=1, of a rank's whole share, and no time for messages unless a test says so; equal to 1e-9.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_docs import PAGE, page

from partita.base.errors import ScheduleError
from partita.schedule.check import check
from partita.schedule.clock import Costs, clock, makespan, peak_activations, peak_share, span
from partita.schedule.ir import Schedule
from partita.schedule.make import schedule
from partita.schedule.steps import repeat
from partita.schedule.versions import staleness, versions_held, versions_used

RANKS = (2, 4, 8)
SPLIT_COSTS = [(1.0, 1.1, 0.9), (1.0, 1.0, 1.0), (2.0, 1.0, 0.5), (1.0, 3.0, 1.0)]  # W <= F


def make(name: str, p: int, m: int, v: int = 1) -> Schedule:
    return schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=v)


def hold(s: Schedule, flush: float, spans: float, peak: float, pair: str = "sequence") -> None:
    """Runs, and takes exactly this long; holds at most `peak` chunks. Of one that is clocked both ways, what
    no way of clocking changes is looked at once."""
    times = clock(s, pair=pair)
    assert pair == "block" or check(s) == []
    assert makespan(times) == pytest.approx(flush, abs=1e-9)
    assert span(times) == pytest.approx(spans, abs=1e-9)
    assert max(peak_activations(s)) <= peak


BUBBLES = {"v_half": {2: 0.5, 4: 2.5, 8: 8.5}, "v_min": {2: 1.5, 4: 5.5, 8: 13.5}}


def hold_v(name: str, p: int, m: int) -> None:
    """Its stated memory, and the flush time that schedules.md says was reached."""
    s = make(name, p, m)
    shares = (p + 2) // 2 if name == "v_half" else (p + 4) // 3
    assert check(s) == [] and max(peak_share(s)) <= shares
    if p in BUBBLES[name]:
        assert makespan(clock(s)) <= 3 * m + BUBBLES[name][p] + 1e-9


@pytest.mark.parametrize("p", [2, 3, 4])
def test_a_steady_state_lasts_as_long_as_there_are_microbatches(p):
    for name in ("v_half", "v_min", "v_2_3"):
        short, longer = make(name, p, 8 * p), make(name, p, 8 * p + 5)
        assert check(longer) == [] and peak_share(longer) == peak_share(short)
        assert makespan(clock(longer)) == makespan(clock(short)) + 15


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
        s = make("dualpipev", p, m)
        hold(s, t, t, 2 * p + 1)
        hold(s, block, block, 2 * p + 1, "block")
        for name in ("v_half", "v_min"):
            hold_v(name, p, m)
    if m % p == p % 2 == 0:
        t = 3 * m + (m // p + 1) * (p - 2)
        hold(make("chimera", p, m), t, t, p)
    for v in virtual if m % max(1, m // p) == 0 else ():
        rounds = max(1, m // p)
        most = min(m * v, (v - 1) * (m // rounds) + p)
        assert max(peak_activations(make("interleaved_zb", p, m, v))) == most
    if m % p == 0 and m >= 2 * p:
        hold(make("interleaved_zb", p, m, 2), 3 * m + (p - 1) / 2, 3 * m + (p - 1) / 2, 2 * p)
    if m >= 2 * p and p % 2 == m % 2 == 0:
        t, block = 3 * m + p / 2 - 1, 3 * m + p - 2
        s = make("dualpipe", p, m)
        hold(s, t, t, p + 1)
        hold(s, block, block, p + 1, "block")


@pytest.mark.parametrize("p", RANKS)
def test_the_table(p):
    for m in {p, 2 * p, 2 * p + 1, 32 if p < 8 else 24}:
        hold_all(p, m, (1, 2))


@settings(max_examples=12, deadline=None)
@given(p=st.integers(1, 7), m=st.integers(1, 28), v=st.integers(1, 4))
def test_the_table_anywhere(p, m, v):
    hold_all(p, m, (v,))


@pytest.mark.slow
@pytest.mark.turns(2)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("p", range(1, 17))
def test_the_table_everywhere(p):
    for m in sorted({1, 3, p, 2 * p - 1, 2 * p, 3 * p, 64}):
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


@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_a_stated_memory_is_kept_and_never_worse_than_its_named_neighbours(p):
    m = 2 * p
    flush = {}
    for num, den in [(1, 3), (1, 2), (2, 3), (3, 4), (1, 1)]:
        s = make(f"v_{num}_{den}", p, m)
        assert check(s) == []
        assert max(peak_share(s)) <= -(-p * num // den) + 1
        flush[num, den] = makespan(clock(s))
    assert list(flush.values()) == sorted(flush.values(), reverse=True)
    assert flush[1, 3] <= makespan(clock(make("v_min", p, m)))
    assert flush[1, 2] <= makespan(clock(make("v_half", p, m)))
    assert flush[1, 1] <= makespan(clock(make("zb_v", p, m)))
    with pytest.raises(ScheduleError, match=r"1/3 <= num/den <= 1"):
        make("v_1_4", p, m)


@pytest.mark.parametrize("c", [0.0, 0.25])
@pytest.mark.parametrize("p", RANKS)
def test_the_period_of_asynchronous_schedules(p, c):
    for name in ("pipedream", "pipedream_2bw"):
        s = make(name, p, 2 * p)
        times = [
            makespan(clock(many, Costs.equal(many, send=c)))
            for many in (repeat(s, 4), repeat(s, 8))
        ]
        assert (times[1] - times[0]) / (8 * p) == pytest.approx(3 + 2 * c * (p - 1) / p, abs=1e-9)


@pytest.mark.parametrize("p", RANKS)
def test_versions_and_staleness(p):
    s = make("pipedream", p, 4 * p)
    assert versions_held(s) == [p - stage for stage in range(p)]
    assert staleness(s) == [p - 1 - stage for stage in range(p)]
    used = versions_used(s)
    assert all(used[p - 1, k] == k for k in range(4 * p))  # the last stage is never stale
    vertical = schedule("pipedream", num_ranks=p, num_microbatches=4 * p, vertical_sync=True)
    used = versions_used(vertical)
    assert all(used[stage, k] == max(0, k - p + 1) for stage, k in used)
    assert staleness(vertical) == [p - 1] * p
    for d in (p, p + 1, 2 * p):
        s = repeat(make("pipedream_2bw", p, d), 5)
        assert s == schedule("pipedream_2bw", num_ranks=p, num_microbatches=d, updates=5)
        assert staleness(s) == [1] * p and versions_held(s) == [2] * p
        assert all(v == max(0, k // d - 1) for (_, k), v in versions_used(s).items())
    with pytest.raises(ScheduleError, match=f"m >= p = {p}"):
        make("pipedream_2bw", p, p - 1)
    assert staleness(make("1f1b", p, p)) == [0] * p
    assert versions_held(make("1f1b", p, p)) == [1] * p


def test_a_version_that_is_used_exists_by_then():
    for p in (2, 3, 4):
        for d in (p, p + 1, 3 * p):
            s = repeat(make("pipedream_2bw", p, d), 4)
            used = versions_used(s)
            for actions in s.ranks:
                made = 0
                for stage, kind, k in actions:
                    made += kind == "U"
                    assert kind != "F" or used[stage, k] <= made


def test_the_docs_table_is_what_the_generators_give():
    assert PAGE.read_text() == page(), "python tests/pure/schedule_docs.py writes it"

"""Schedules against their closed forms (docs in schedule/make), over a grid of p and m."""

import doctest
from dataclasses import replace
from importlib import import_module

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from took import least_seconds

import partita
from partita.base.errors import ScheduleError, UsageError
from partita.schedule.check import check
from partita.schedule.clock import (
    Costs,
    StageCosts,
    bubble_overhead,
    clock,
    makespan,
    peak_activations,
    peaks_with_gradients,
    span,
    steady_bubble_overhead,
)
from partita.schedule.ir import Action, Schedule
from partita.schedule.make import GENERATORS, schedule
from partita.schedule.passes import with_communication
from partita.schedule.steps import repeat
from partita.schedule.text import parse_action, parse_schedule, print_ranks

MODULES = (
    "auto", "chimera", "dualpipe", "forward", "gpipe", "interleaved", "interleaved_zb", "looped_bfs",
    "one_f_one_b", "pipedream", "v_memory", "zb_v", "zero_bubble",
)  # fmt: skip
NAMED = [name for name in GENERATORS if name != "auto"]
GRID = [(p, m) for p in range(1, 9) for m in range(1, 17)]
SAMPLE = [(1, 2), (2, 4), (3, 6), (3, 7), (4, 4), (4, 16), (5, 3), (8, 16)]
COSTS = [(1.0, 1.0, 1.0), (1.0, 1.1, 0.9), (0.3, 0.7, 0.2)]


def make(name: str, p: int, m: int, v: int = 1) -> Schedule:
    return schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=v)


def exists(name: str, p: int, m: int) -> bool:
    """The floors of schedules.md."""
    floors = {
        "interleaved_1f1b": m % p == 0,
        "zb_h2": m >= 2 * p - 1,
        "dualpipev": m >= 2 * p,
        "dualpipe": m >= 2 * p and p % 2 == m % 2 == 0,
        "interleaved_zb": m % max(1, m // p) == 0,
        "chimera": p % 2 == 0 and m % p == 0,
        "pipedream_2bw": m >= p,
    }
    return floors.get(name, True)


@pytest.mark.parametrize("name", NAMED)
def test_every_schedule_can_run_and_round_trips_or_names_its_floor(name):
    for p, m in SAMPLE:
        for v in (1, 2, 3) if GENERATORS[name].virtual else (1,):
            if not exists(name, p, m):
                with pytest.raises(ScheduleError, match=rf"{name} .* p={p}, m={m}.* needs "):
                    make(name, p, m, v)
                continue
            s = make(name, p, m, v)
            assert check(s) == []
            if not s.is_asynchronous:
                assert replace(parse_schedule(str(s)), name=name) == s
            assert all(
                s.rank_of(a.stage, a.microbatch) == r for r, own in enumerate(s.ranks) for a in own
            )


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from([*NAMED, "v_1_3", "v_2_5", "v_1_1"]),
    p=st.integers(1, 16),
    m=st.integers(1, 64),
    v=st.integers(1, 4),
)
def test_any_numbers_make_a_list_that_can_run_or_are_refused(name, p, m, v):
    v = v if name in GENERATORS and GENERATORS[name].virtual else 1
    if not exists(name, p, m):
        with pytest.raises(ScheduleError, match=" needs "):
            make(name, p, m, v)
        return
    s = make(name, p, m, v)
    assert check(s) == [] and parse_schedule(str(s)).ranks == s.ranks


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("f, i, w", COSTS)
def test_flush_time_and_span_are_the_closed_form(name, f, i, w):
    for p, m in GRID:
        s = make(name, p, m)
        spans = clock(s, Costs.equal(s, f, i, w))
        assert makespan(spans) == pytest.approx((m + p - 1) * (f + i + w), abs=1e-9)
        assert span(spans) == pytest.approx(makespan(spans), abs=1e-9)
        assert bubble_overhead(spans) == pytest.approx((p - 1) / m, abs=1e-9)


@pytest.mark.parametrize("v", [1, 2, 3])
def test_forward_only(v):
    for p, m in GRID:
        s = make("forward", p, m, v)
        if m >= p:
            assert makespan(clock(s)) == pytest.approx(m + (p - 1) / v, abs=1e-9)
        assert peak_activations(s) == [0] * p
        assert s.num_stages == p * v


def test_peaks():
    for p, m in GRID:
        assert peak_activations(make("gpipe", p, m)) == [m] * p
        assert peak_activations(make("1f1b", p, m)) == [min(m, p - r) for r in range(p)]
    s = make("1f1b", 2, 4)
    assert peaks_with_gradients(s, [10.0, 7.0], [0.0, 0.0]) == [(20.0, 0.0), (7.0, 0.0)]


def test_the_clock_is_monotone_in_the_number_of_microbatches():
    for name in NAMED:
        for p in (1, 3, 4):
            times = [makespan(clock(make(name, p, m))) for m in range(1, 17) if exists(name, p, m)]
            assert times == sorted(times)


def test_latency_is_paid_by_1f1b():
    p, c = 4, 0.25
    times = [
        makespan(clock(s, Costs.equal(s, send=c))) for m in (32, 64) for s in [make("1f1b", p, m)]
    ]
    assert (times[1] - times[0]) / 32 == pytest.approx(3 + 2 * c * (p - 1) / p, abs=1e-9)


def test_uneven_stages_are_bound_by_the_slowest():
    s = make("1f1b", 2, 8)
    spans = clock(s, Costs((StageCosts(1, 1, 1), StageCosts(2, 2, 2))))
    assert makespan(spans) == 1 + 8 * 6 + 2  # first F of stage 0, the slow stage, last B of stage 0


def test_sends_and_receives():
    for name in ("gpipe", "1f1b", "forward"):
        for p, m in [(1, 3), (2, 1), (4, 8), (8, 3)]:
            s = make(name, p, m)
            ranks = with_communication(s)
            sent = {a.key: (a.stage, a.peer_stage) for own in ranks for a in own if a.is_send}
            posted = {a.key: (a.peer_stage, a.stage) for own in ranks for a in own if a.is_receive}
            assert sent == posted
            assert len(sent) == (p - 1) * m * (1 if name == "forward" else 2)
            for own, program in zip(s.ranks, ranks, strict=True):
                assert tuple(a for a in program if not (a.is_send or a.is_receive)) == own
                for i, action in enumerate(program):
                    before = program[:i]
                    if action.kind == "F" and action.stage > 0:
                        assert action._replace(kind="RECV_F") in before
                    if action.is_send:
                        assert (
                            program[i - 1] == action._replace(kind=action.what)
                            or before[-1].is_send
                        )


def test_communication_prints_and_is_dropped_when_read():
    s = make("1f1b", 3, 4)
    assert replace(parse_schedule(print_ranks(with_communication(s))), name="1f1b") == s


def rows(*lines: str) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(parse_action(c) for c in line.split(",")) for line in lines)


def bad(*ranks: str, stages: int = 2, microbatches: int = 1) -> Schedule:
    return Schedule("bad", len(ranks), stages, microbatches, tuple(range(stages)), rows(*ranks))


def test_a_deadlock_says_who_waits_for_whom():
    s = bad("0F0,0B0,0F1,0B1", "1F1,1F0,1B0,1B1", microbatches=2)
    message = "bad: deadlock\n  rank 0: 0B0 waits for 1B0\n  rank 1: 1F1 waits for 0F1"
    with pytest.raises(ScheduleError) as error:
        clock(s)
    assert str(error.value) == message
    assert [p.rule for p in check(s)] == ["alive"]


@pytest.mark.parametrize(
    "ranks, rule, words",
    [
        (("0F0,0B0", "1F0"), "complete", "1B0"),
        (("0F0,0F0,0B0", "1F0,1B0"), "duplicate_free", "0F0"),
        (("0F0,0B0,0I0", "1F0,1B0"), "duplicate_free", "0B0"),
        (("0F0,0B0,1F0", "1B0"), "placed", "rank 0 runs 1F0"),
        (("0B0,0F0", "1F0,1B0"), "ordered", "rank 0 runs 0B0"),
        (("0F0,0I0", "1F0,1B0"), "complete", "0W0"),
        (("0F0,0B0,0F1", "1F0,1B0"), "in_range", "0F1"),
    ],
)
def test_what_is_wrong_is_named(ranks, rule, words):
    s = bad(*ranks)
    found = {p.rule: p.message for p in check(s)}
    assert words in found[rule]


def test_halves_may_stand_for_a_backward():
    s = bad("0F0,0I0,0W0", "1F0,1B0")
    assert check(s) == []
    assert peak_activations(s) == [1, 1]
    assert makespan(clock(s)) == 6


def test_a_bidirectional_schedule_and_an_overlapped_pair():
    """Microbatch 0 goes down, 1 goes up; each rank holds both stages."""
    ranks = rows("0F0,1F1,1B1,0B0", "0F1,1F0,1B0,0B1")
    s = Schedule("both", 2, 2, 2, ((0, 1), (1, 0)), ranks, direction=(0, 1))
    assert check(s) == []
    paired = replace(s, paired=frozenset({Action(1, "F", 1)}))
    assert "(1F1;1B1)OVERLAP_F_B" in str(paired)
    assert makespan(clock(paired)) == makespan(clock(paired, pair="block")) == 6
    with pytest.raises(
        ScheduleError, match="deadlock"
    ):  # as one block it waits for itself, upstream
        clock(replace(s, paired=frozenset({Action(0, "F", 0), Action(0, "F", 1)})), pair="block")


def test_torchs_overlap_is_read_and_written():
    text = "0F0,(0F1;0B0)OVERLAP_F_B,0B1"
    s = parse_schedule(text.replace("_B,", "_B,,"))
    assert str(s) == text and parse_schedule("0F0,0F1+0B0,0B1") == s


def test_steps_follow_without_a_barrier():
    s = make("1f1b", 4, 8)
    three = repeat(s, 3)
    assert check(three) == [] and three.num_microbatches == 24
    assert 3 * 24 < makespan(clock(three)) <= 3 * makespan(clock(s))
    assert steady_bubble_overhead(clock(three)) <= steady_bubble_overhead(clock(s))


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(UsageError, match=r"did you mean gpipe.*gpipe, 1f1b, .*forward"):
        make("gpip", 2, 2)
    with pytest.raises(UsageError, match="num_ranks is 0"):
        make("1f1b", 0, 2)
    with pytest.raises(ScheduleError, match="one stage a rank"):
        make("1f1b", 2, 2, 2)
    with pytest.raises(UsageError, match="takes no option wings"):
        schedule("1f1b", num_ranks=2, num_microbatches=2, wings=3)


def test_a_schedule_from_a_file(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text(str(make("1f1b", 3, 4)))
    for quote in ("", '"'):
        s = make(f"{quote}file:{path}{quote}", 3, 4)
        assert s.ranks == make("1f1b", 3, 4).ranks
    with pytest.raises(ScheduleError, match="3 ranks and 4 microbatches"):
        make(f"file:{path}", 4, 4)
    path.write_text("0F0,zero\n")
    with pytest.raises(UsageError, match="line 1: 'zero' is not an action"):
        make(f"file:{path}", 1, 1)
    with pytest.raises(UsageError, match="no such file"):
        make(f"file:{tmp_path}/none.csv", 1, 1)


@pytest.mark.parametrize(("name", "bubble"), [("zb_h1", 15), ("v_half", 20.5)])
def test_a_large_schedule_is_made_and_timed_at_once(name, bubble):
    """Some 0.3 s each on a machine that does nothing else: the least of three, which others may disturb."""

    def made_and_timed() -> None:
        assert makespan(clock(GENERATORS[name].make(16, 512))) == 3 * 512 + bubble

    assert least_seconds(made_and_timed, 1.0, tries=3) < 3.0


def test_the_package_answers_calls():
    assert partita.schedule("1f1b", num_ranks=2, num_microbatches=2) == make("1f1b", 2, 2)


@pytest.mark.parametrize(
    "module", ["make", *(f"make.{name}" for name in MODULES), "passes", "residence", "text"]
)
def test_the_pictures_in_the_docstrings(module):
    result = doctest.testmod(import_module(f"partita.schedule.{module}"))
    assert result.attempted > 0 and result.failed == 0

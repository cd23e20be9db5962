"""auto: within its limit, never worse than a named schedule, bounded below, and sometimes proven."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from turns import turn

from benchmarks.schedules import best_named, point, tasks
from partita.base.errors import ScheduleError
from partita.schedule.check import check, over_limit
from partita.schedule.clock import Costs, StageCosts, clock, makespan, span
from partita.schedule.make import schedule
from partita.schedule.make.families import loop_placement
from partita.schedule.synth.bounds import lower_bound
from partita.schedule.synth.exact import optimum, unit_of
from partita.schedule.synth.flow import Flow, fits, flow_like, orders_of, schedule_of, starts_of
from partita.schedule.synth.seeds import one_at_a_time
from partita.schedule.synth.synthesis import Synthesis, Task, synthesise

EVEN = Costs((StageCosts(),))
seconds = st.sampled_from([0.5, 0.8, 1.0, 1.1, 1.5, 2.0])


def hold(task: Task) -> Synthesis:
    """The schedule runs, fits, takes the time stated, and is between its bound and the named ones."""
    found = synthesise(task)
    s = found.schedule
    assert check(s) == []
    stages = s.num_stages // s.num_ranks
    assert over_limit(s, task.limit, task.weights_of(stages, found.costs)) == []
    assert makespan(clock(s, found.costs)) == pytest.approx(found.makespan, abs=1e-9)
    assert found.lower_bound <= found.makespan <= best_named(task) * (1 + 1e-9)
    return found


@settings(max_examples=12, deadline=None)
@given(
    p=st.integers(1, 4),
    more=st.integers(0, 4),
    limit=st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0, 8.0, math.inf]),
    stage=st.lists(st.tuples(seconds, seconds, seconds), min_size=8, max_size=8),
    send=st.sampled_from([(0.0, 0.0), (0.1, 0.0), (0.9, 0.8), (2.5, 2.5)]),
    how=st.sampled_from(["share", "line", "vee"]),
)
def test_never_worse_than_a_named_schedule(p, more, limit, stage, send, how):
    """Nor where messages share the link out of a rank."""
    count = {"share": 1, "line": p, "vee": 2 * p}[how]
    costs = Costs(tuple(StageCosts(*c) for c in stage[:count]), *send)
    hold(Task(p, p + more, costs, limit, effort=3_000, proof=0.0))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_never_worse_over_a_grid_and_often_better():
    """A fifth of the grid of `python -m benchmarks.schedules`, at most four stages a rank; more often with
    the usual effort. Of the fifth one quarter with each commit: of all 30 points 25 are better."""
    part = list(tasks([2, 4, 8], stages=4, effort=15_000))[5 * turn(4) :: 20]
    points = [point(name, task, hold(task)) for name, task in part]
    fit = [x for x in points if x.counts and x.fits]
    assert sum(x.is_better for x in fit) >= len(fit) / 3


@pytest.mark.parametrize("limit, over", [(2, 5.5), (3, 2.5), (4, 1.5), (9, 1.5)])
def test_the_optimum_of_a_vee_at_equal_costs_is_reached(limit, over):
    """p = 4, m = 8, proven for these caps: 5.5, 2.5, 1.5 over the ideal 24."""
    found = hold(Task(4, 8, limit=limit, copies=1, effort=20_000, proof=0.0))
    assert found.makespan == pytest.approx(24 + over)


def test_a_line_with_room_cannot_beat_its_first_forwards():
    for p, m in [(2, 4), (4, 8), (8, 16)]:
        s = schedule("zb_h1", num_ranks=p, num_microbatches=m)
        flow = flow_like(s, Costs.equal(s), [float(p)] * p)
        assert lower_bound(flow) == pytest.approx(3 * m + p - 1)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["1f1b", "zb_h1", "zb_v", "v_min", "dualpipe", "interleaved_zb", "gpipe"]),
    stage=st.lists(st.tuples(seconds, seconds, seconds), min_size=8, max_size=8),
    send=st.sampled_from([(0.0, 0.0), (0.3, 0.0), (1.2, 1.1), (3.0, 2.0)]),
)
def test_nothing_that_fits_undercuts_the_bound(name, stage, send):
    s = schedule(name, num_ranks=4, num_microbatches=8)
    costs = Costs(tuple(StageCosts(*c) for c in stage[: s.num_stages]), *send)
    flow = flow_like(s, costs, [8.0] * 4)
    assert fits(flow, orders_of(flow, s))
    tight = flow_like(s, costs, [max(1.0, 8.0 - 1.0)] * 4)
    assert lower_bound(flow) <= makespan(clock(s, costs)) + 1e-9
    assert lower_bound(flow) <= lower_bound(tight) + 1e-9


@pytest.mark.parametrize("limit", [1.0, 1.5, 2.0])
def test_small_instances_are_proven_and_the_search_is_near(limit):
    costs = Costs((StageCosts(1.0, 1.2, 0.8),), 0.1)
    search = synthesise(Task(2, 3, costs, limit, copies=1, effort=20_000, proof=0.0))
    proof = hold(Task(2, 3, costs, limit, copies=1, effort=0, proof=9.0))
    assert proof.proven and proof.gap == 0.0
    assert proof.makespan <= search.makespan <= 1.02 * proof.makespan


def test_constraint_programming_alone_finds_the_optimum():
    """From the slowest order: the span and flush optimum of a line of 2 is mt + (p-1)F."""
    s = one_at_a_time(2, 3, (loop_placement(2, 1),))
    flow = flow_like(s, Costs.equal(s), [2.0, 2.0])
    proof = optimum(flow, orders_of(flow, s), lower_bound(flow), 5.0)
    assert proof is not None and proof.proven and proof.makespan == 10.0
    assert check(schedule_of(flow, proof.orders, "proven")) == []
    large = schedule("zb_v", num_ranks=8, num_microbatches=32)
    flow = flow_like(large, Costs.equal(large), [16.0] * 8)
    assert optimum(flow, orders_of(flow, large), 0.0, 1.0) is None


def orders(flow: Flow, rank: int) -> list[list[int]]:
    """Every order of a rank's items in which a microbatch's F, I and W follow each other on their stage."""
    streams = sorted(flow.streams_of(rank), key=lambda x: ("FIW".index(flow.names[x][2]), x))
    found: list[list[int]] = [[]]
    for _ in range(sum(flow.count[x] for x in streams)):
        found = [
            [*done, x]
            for done in found
            for x in streams
            if done.count(x) < flow.count[x]
            and all(done.count(y) > done.count(x) for y, _ in flow.needs[x] if flow.rank[y] == rank)
        ]
    return [each for each in found if peak(flow, each) <= flow.limits[rank]]


def peak(flow: Flow, order: list[int]) -> float:
    """The most that a rank holds."""
    return max(accumulate(flow.held[x] for x in order))


@pytest.mark.parametrize("send, wire", [(0.5, 0.5), (1.5, 1.5), (3.0, 2.5)])
@pytest.mark.parametrize("limit", [1.0, 2.0, 9.0])
def test_the_proven_optimum_of_shared_links_is_that_of_all_orders(limit, send, wire):
    s = one_at_a_time(2, 3, (loop_placement(2, 1),))
    costs = Costs((StageCosts(1.0, 1.5, 0.5), StageCosts(0.5, 1.0, 1.0)), send, wire)
    flow = flow_like(s, costs, [limit] * 2)
    times = [starts_of(flow, list(both)) for both in product(orders(flow, 0), orders(flow, 1))]
    best = min(found[0] for found in times if found is not None)
    proof = optimum(flow, orders_of(flow, s), lower_bound(flow), 5.0)
    assert proof is not None and proof.proven and proof.makespan == best
    assert lower_bound(flow) <= best
    made = schedule_of(flow, proof.orders, "proven")
    assert makespan(clock(made, costs)) == best


def test_a_link_that_kept_no_order_would_be_faster_than_any():
    """Messages that overtook each other would end the step at 238; in the order made, 239 is proven."""
    rows = (1, 2, 2), (3, 2, 9), (1, 2, 1), (1, 2, 2), (2, 2, 3), (2, 1, 0), (3, 6, 2), (12, 16, 12)
    costs = Costs(tuple(StageCosts(*map(float, row)) for row in rows), 7.0, 7.0)
    task = Task(4, 3, costs, 2.0, copies=1, exchanged=False, effort=5_000, proof=1.0)
    found = hold(task)
    assert found.proven and found.makespan == 239.0


def test_slow_links_are_what_a_step_is_made_for():
    """Eight messages of ten take eighty, while gradients come back; what no order undercuts knows it."""
    costs = Costs((StageCosts(1.0, 1.0, 1.0),) * 2, 10.0, 10.0)
    task = Task(2, 8, costs, 8.0, stages=1, copies=1, effort=3_000, proof=0.0)
    found = hold(task)
    assert found.makespan == found.lower_bound == 1 + 8 * 10 + 2 + 10 + 2
    tight = hold(replace(task, limit=2.0))
    assert found.makespan < tight.lower_bound <= tight.makespan


def test_units():
    assert unit_of([1.0, 1.5, 0.25, 0.0]) == Fraction(1, 4)
    assert unit_of([0.1, 1.1]) == Fraction(1, 10)
    assert unit_of([math.pi]) is None and unit_of([1e-9, 1e3]) is None
    assert unit_of([]) == 1


def test_the_same_seed_gives_the_same_schedule():
    task = Task(2, 3, Costs((StageCosts(1.0, 1.3, 0.7),), 0.1), 1.5, effort=4_000, proof=0.2)
    assert synthesise(task).schedule == synthesise(task).schedule


@pytest.mark.parametrize("p, m", [(2, 4), (3, 6), (4, 8)])
def test_the_span_of_a_line_is_its_proven_optimum(p, m):
    """3m + max(0, 2p-1-min(cap, m)) at equal costs, for cap >= p."""
    for cap in (p, p + 1, 2 * p - 1):
        task = Task(p, m, EVEN, cap, stages=1, copies=1, goal="span", effort=30_000, proof=0.0)
        found = synthesise(task)
        assert found.makespan == pytest.approx(3 * m + max(0, 2 * p - 1 - min(cap, m)))
        assert span(clock(found.schedule)) == pytest.approx(found.makespan)
        assert found.lower_bound <= found.makespan


def test_a_weight_half_that_needs_less_leaves_room_for_more():
    costs = Costs((StageCosts(1.0, 1.0, 0.5),))
    times = []
    for kept in (1.0, 0.4):
        task = Task(
            4,
            16,
            costs,
            8,
            until_weights=kept,
            goal="span",
            stages=1,
            copies=1,
            effort=0,
            proof=0.0,
        )
        times.append(synthesise(task))
    assert times[1].makespan < times[0].makespan
    assert times[1].lower_bound <= times[0].lower_bound


@pytest.mark.parametrize("limit", [2.0, math.inf])
def test_one_microbatch_goes_one_way(limit):
    """There is no half of it to go the other, with room to spare or without a limit."""
    found = hold(Task(2, 1, limit=limit))
    assert found.proven and not found.schedule.is_bidirectional


@pytest.mark.parametrize("name, stages", [("dualpipev", 8), ("dualpipe", 4)])
@pytest.mark.parametrize("goal, time", [("flush", makespan), ("span", span)])
def test_pairs_that_hide_something_are_held_against_what_was_found(name, stages, goal, time):
    """A backward that is shorter beside a forward is only so in a schedule with pairs; the bound knows it."""
    costs = Costs((StageCosts(1.0, 1.0, 1.0, hidden=0.6),) * stages)
    pairs = schedule(name, num_ranks=4, num_microbatches=16)
    found = synthesise(Task(4, 16, costs, effort=0, proof=0.0, goal=goal))
    assert found.makespan == pytest.approx(time(clock(found.schedule, costs)))
    assert found.lower_bound <= found.makespan <= time(clock(pairs, costs))
    tight = synthesise(Task(4, 16, costs, 4.0, effort=0, proof=0.0, goal=goal))
    assert over_limit(tight.schedule, 4.0) == [] and not tight.schedule.paired


def test_what_cannot_be_is_refused_with_the_number():
    with pytest.raises(
        ScheduleError, match=r"one microbatch holds 1 activations a rank, the limit is 0\.9"
    ):
        synthesise(Task(2, 4, limit=0.9))
    with pytest.raises(ScheduleError, match="needs costs of 4 or 8 stages; 3 were given"):
        synthesise(Task(4, 8, Costs((StageCosts(),) * 3)))


def test_each_rank_may_have_a_limit_of_its_own():
    """A first rank that holds an embedding has less room: no worse than its limit for all, and no better than
    the roomiest one's."""
    times = []
    for limit in (2.0, (2.0, 3.0, 3.0, 4.0), 4.0):
        found = hold(Task(4, 8, limit=limit, copies=1, effort=5_000, proof=0.0))
        times.append(found.makespan)
    assert times == sorted(times, reverse=True) and times[0] > times[1]
    with pytest.raises(ScheduleError, match=r"2 limits \(2, 3\) for 4 ranks"):
        synthesise(Task(4, 8, limit=(2.0, 3.0)))
    with pytest.raises(
        ScheduleError, match=r"one microbatch holds 1 activations a rank, the limit is 0\.5"
    ):
        synthesise(Task(2, 4, limit=(1.5, 0.5)))


def test_a_limit_in_bytes():
    stages = tuple(StageCosts(activation_bytes=100.0 if s == 0 else 10.0) for s in range(2))
    found = hold(Task(2, 4, Costs(stages), 200.0, limit_in_bytes=True, effort=5_000, proof=0.0))
    assert found.schedule.num_stages == 2
    made = schedule(
        "auto",
        num_ranks=2,
        num_microbatches=4,
        costs=Costs(stages),
        limit=200.0,
        limit_in_bytes=True,
    )
    assert over_limit(made, 200.0, [100.0, 10.0]) == []

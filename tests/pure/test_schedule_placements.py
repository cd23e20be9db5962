"""Placements that no named schedule has: both ways through a wave, and lighter busiest ranks."""

import pytest

from benchmarks.schedules import best_named, profiles
from partita.schedule.check import check
from partita.schedule.clock import Costs, StageCosts, clock, makespan
from partita.schedule.make.families import vee_placement
from partita.schedule.synth.placements import mirrored, more_ways
from partita.schedule.synth.synthesis import Task, synthesise

EVEN = Costs((StageCosts(),) * 8)


def loads(way, costs):
    ranks = [0.0] * 4
    for stage, rank in enumerate(way):
        ranks[rank] += costs.stages[stage].F
    return ranks


def test_both_ways_every_stage_lies_on_two_ranks_and_every_rank_has_as_many():
    ((one, other),) = more_ways(4, 2, 2, EVEN)
    assert one == vee_placement(4) and other == mirrored(one, 4) == (3, 2, 1, 0, 0, 1, 2, 3)
    assert all(a + b == 3 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("p, stages, copies", [(4, 1, 2), (4, 2, 1), (1, 2, 2), (3, 2, 2)])
def test_nothing_more_where_nothing_else_is_better(p, stages, copies):
    """A line both ways is DualPipe's; one copy goes one way; of an odd number a middle rank meets itself."""
    assert more_ways(p, stages, copies, Costs((StageCosts(),) * (p * stages))) == []


def test_the_two_dear_ends_of_a_vee_come_apart():
    costs = Costs(profiles(4)["vee"])
    (lighter,), *both = more_ways(4, 2, 2, costs)
    assert lighter[:4] == (0, 1, 2, 3) and sorted(lighter[4:]) == [0, 1, 2, 3]
    assert max(loads(vee_placement(4), costs)) == pytest.approx(1.35)
    assert max(loads(lighter, costs)) == pytest.approx(1.25)
    for one, other in both:
        assert other == mirrored(one, 4)
    busiest = [max(map(sum, zip(*(loads(w, costs) for w in ways), strict=True))) for ways in both]
    assert busiest == pytest.approx([2.35, 2.25])


@pytest.mark.parametrize(
    "costs, limit, named, best",
    [("even", 4, 25.5, 24.5), ("even", 8, 25.0, 24.5), ("vee", 4, 32.1, 27.6)],
)
def test_two_ways_reach_their_bound(costs, limit, named, best):
    """p = 4, m = 8, at F = I = W: mt + (p/2 - 1)F/2, where ZB-V takes mt + (p - 1)F/2."""
    task = Task(4, 8, Costs(profiles(4)[costs]), limit, effort=20_000, proof=0.0)
    found = synthesise(task)
    assert check(found.schedule) == [] and found.schedule.is_bidirectional
    assert makespan(clock(found.schedule, found.costs)) == pytest.approx(found.makespan)
    assert best_named(task) == pytest.approx(named)
    assert found.makespan == pytest.approx(best) == found.lower_bound


@pytest.mark.parametrize("unit", [1e-10, 1e9])
def test_the_unit_of_the_costs_changes_no_placement(unit):
    one = profiles(4)["vee"]
    other = [StageCosts(s.F * unit, s.I * unit, s.W * unit) for s in one]
    assert more_ways(4, 2, 2, Costs(tuple(other))) == more_ways(4, 2, 2, Costs(one))


def test_one_copy_of_dear_ends_is_faster_apart_than_on_a_vee_or_a_loop():
    task = Task(4, 8, Costs(profiles(4)["vee"]), 4, copies=1, effort=20_000, proof=0.0)
    found = synthesise(task)
    assert not found.schedule.is_bidirectional
    assert found.makespan == pytest.approx(31.1) and best_named(task) == pytest.approx(32.1)

"""Stages and schedule together: never worse than the even cut, all layers kept."""

import pytest

from partita.base.errors import ScheduleError
from partita.schedule.check import check, over_limit
from partita.schedule.clock import Costs, StageCosts, clock, makespan
from partita.schedule.synth.partition import partitioned
from partita.schedule.synth.synthesis import Task, synthesise


def layers(n: int, first: float, last: float) -> list[StageCosts]:
    """n alike, the first and the last with an embedding and a head."""
    middle = [StageCosts(1.0, 1.0, 1.0, activation_bytes=1.0)] * (n - 2)
    return [
        StageCosts(first, first, first, activation_bytes=1.0),
        *middle,
        StageCosts(last, last, last),
    ]


def joined(parts: list[StageCosts], size: int) -> tuple[StageCosts, ...]:
    """The even cut into `size` stages."""
    each = len(parts) // size
    rows = [parts[i * each : (i + 1) * each] for i in range(size)]
    return tuple(StageCosts(*(sum(getattr(x, k) for x in row) for k in "FIW")) for row in rows)


@pytest.mark.parametrize("p, limit", [(2, 4.0), (4, 4.0), (4, 2.0)])
def test_a_heavy_head_gets_fewer_layers(p, limit):
    parts = layers(4 * p, 1.3, 2.6)
    task = Task(p, 2 * p, Costs((StageCosts(),), 0.1), limit, copies=1, effort=2_000, proof=0.0)
    found = partitioned(task, parts)
    s, split = found.synthesis.schedule, found.split
    assert sum(split) == 4 * p and min(split) >= 1 and len(split) == s.num_stages
    assert check(s) == [] and over_limit(s, limit) == []
    times = clock(s, found.synthesis.costs)
    assert makespan(times) == pytest.approx(found.synthesis.makespan)
    evens = []
    for stages in (1, 2):
        even = Task(
            p, 2 * p, Costs(joined(parts, stages * p), 0.1), limit, stages=stages, copies=1, effort=2_000,
            proof=0.0,
        )  # fmt: skip
        evens.append(synthesise(even).makespan)
    assert found.synthesis.makespan < min(evens) * (1 - 1e-9)


def test_alike_layers_are_cut_evenly():
    task = Task(2, 4, limit=4.0, copies=1, stages=1, effort=0, proof=0.0)
    assert partitioned(task, layers(8, 1.0, 1.0)).split == (4, 4)


def test_a_limit_in_bytes_binds_the_cut():
    task = Task(2, 4, limit=12.0, limit_in_bytes=True, copies=1, stages=1, effort=0, proof=0.0)
    found = partitioned(task, layers(8, 1.0, 1.0))
    sizes = [stage.activation_bytes for stage in found.synthesis.costs.stages]
    assert over_limit(found.synthesis.schedule, 12.0, sizes) == []
    with pytest.raises(ScheduleError, match="no order holds less"):
        partitioned(
            Task(2, 4, limit=1.0, limit_in_bytes=True, copies=1, stages=1), layers(8, 1.0, 1.0)
        )


def test_too_few_layers():
    with pytest.raises(ScheduleError, match="3 layers cannot fill 4 stages"):
        partitioned(Task(4, 8), layers(3, 1.0, 1.0))


def made_of(*rows: tuple[float, ...]) -> list[StageCosts]:
    """Layers of F, I, W and bytes."""
    return [StageCosts(*row[:3], activation_bytes=row[3] if len(row) > 3 else 1.0) for row in rows]


def test_few_cuts_are_all_tried_and_a_proof_is_of_all_of_them():
    """The best of these lies on a loop, whose cut no balance of a vee finds: 201 was called proven."""
    parts = made_of((9, 5, 8), (2, 6, 5), (1, 7, 2), (4, 6, 9), (18, 9, 18))
    found = partitioned(Task(2, 3, Costs((StageCosts(),), 2.0), 3.0, copies=1), parts)
    assert (found.synthesis.makespan, found.split) == (186.0, (2, 1, 1, 1))
    assert found.synthesis.proven and found.cut_proven


def test_what_is_proven_of_one_cut_is_not_of_all():
    """Of more cuts than are tried; the bound holds for the best known of another placement's balance too."""
    parts = layers(40, 1.3, 2.6)
    task = Task(2, 6, Costs((StageCosts(),), 0.1), 6.0, copies=1, effort=500, proof=0.0)
    found = partitioned(task, parts)
    work = 6 * sum(each.F + each.I + each.W for each in parts)
    assert work / 2 < found.synthesis.lower_bound < found.synthesis.makespan
    assert not found.synthesis.proven


def test_the_cut_is_balanced_under_a_cap_of_bytes():
    """The dearest rank is cheapest at 2,1, which holds 15 bytes of 12."""
    parts = made_of((1, 1, 1, 10), (1, 1, 1, 5), (4, 4, 4, 1))
    found = partitioned(Task(2, 4, limit=12.0, limit_in_bytes=True, copies=1), parts)
    assert (found.split, found.synthesis.makespan) == ((1, 2), 61.0)
    many = [*made_of(*[(1, 1, 1, 3)] * 20), *made_of(*[(1, 1, 1, 1)] * 20)]
    capped = Task(2, 6, limit=41.0, limit_in_bytes=True, copies=1, stages=1, effort=0, proof=0.0)
    assert partitioned(capped, many).split[0] <= 13

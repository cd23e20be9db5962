"""A long step repeats itself: what is extrapolated equals what is played."""

import random

import pytest

from partita.schedule.clock import Costs, StageCosts, clock, makespan, span
from partita.schedule.make import GENERATORS, schedule
from partita.schedule.replay import Replay
from partita.schedule.text import print_schedule
from partita.simulate import pipeline
from partita.simulate.pipeline import Rehearsal, play

CASES = (
    ("1f1b", 4, 1, 61), ("1f1b", 8, 1, 96), ("interleaved_1f1b", 4, 2, 96), ("zb_h1", 4, 1, 50),
    ("gpipe", 4, 1, 40), ("zb_h2", 4, 1, 53), ("1f1b", 1, 1, 40),
)  # fmt: skip


@pytest.mark.parametrize(("name", "p", "v", "m"), CASES)
@pytest.mark.parametrize("uneven", [False, True])
def test_an_extrapolated_step_is_the_played_one(name, p, v, m, uneven, monkeypatch):
    def make(count):
        return schedule(name, num_ranks=p, num_microbatches=count, virtual_stages=v)

    more = 0.1 if uneven else 0.0
    stages = [
        StageCosts(1.0 + more * (i % 3), 1.1, 0.9 + 2 * more * (i == 0)) for i in range(p * v)
    ]
    costs = Costs(tuple(stages), send=0.05)
    whole = clock(make(m), costs)
    monkeypatch.setattr(pipeline, "FULL", 0)
    played = play(make, p, m, costs)
    assert not played.whole
    assert played.seconds == pytest.approx(makespan(whole), rel=5e-3 if uneven else 1e-9)
    work = [sum(s.duration_s for s in whole if s.rank == r) for r in range(p)]
    assert list(played.busy) == pytest.approx(work, rel=1e-9)


@pytest.mark.parametrize(
    ("p", "m"), [(6, 35), (9, 80)]
)  # shorter ones: illegal, and of other rounds
def test_rounds_that_are_longer_where_ranks_do_not_divide_are_played_whole(p, m, monkeypatch):
    def make(count):
        return schedule("interleaved_zb", num_ranks=p, num_microbatches=count, virtual_stages=2)

    monkeypatch.setattr(pipeline, "FULL", 0)
    costs = Costs((StageCosts(1.0, 1.1, 0.9),) * (2 * p), send=0.05)
    played = play(make, p, m, costs)
    assert played.whole and played.seconds == pytest.approx(makespan(clock(make(m), costs)))


def test_a_file_is_of_one_length(tmp_path, monkeypatch):
    made = schedule("1f1b", num_ranks=2, num_microbatches=20)
    path = tmp_path / "mine.csv"
    path.write_text(print_schedule(made))

    def make(count):
        return schedule(f"file:{path}", num_ranks=2, num_microbatches=count)

    monkeypatch.setattr(pipeline, "FULL", 0)
    costs = Costs((StageCosts(),) * 2)
    assert play(make, 2, 20, costs).seconds == makespan(clock(made, costs))


def test_a_short_step_is_played_whole():
    costs = Costs((StageCosts(),) * 2)
    played = play(lambda m: schedule("1f1b", num_ranks=2, num_microbatches=m), 2, 4, costs)
    assert played.whole
    assert played.seconds == 15.0  # (m + p - 1) (F + B)


@pytest.mark.parametrize("name", [n for n in GENERATORS if n not in ("auto", "forward")])
def test_a_replay_has_the_times_of_the_clock(name):
    v = 2 if GENERATORS[name].virtual else 1
    made = schedule(name, num_ranks=4, num_microbatches=8, virtual_stages=v)
    stages = tuple(
        StageCosts(1 + i % 3 / 10, 1.1 - i / 100, 0.7, 0.2) for i in range(made.num_stages)
    )
    costs = Costs(stages, send=0.05)
    times, spans = Replay(made)(costs), clock(made, costs)
    assert times.makespan == pytest.approx(makespan(spans)) and times.own == pytest.approx(
        span(spans)
    )
    work = [sum(s.duration_s for s in spans if s.rank == r) for r in range(4)]
    assert list(times.busy) == pytest.approx(work)


@pytest.mark.parametrize(("name", "p", "v", "m"), CASES)
def test_cheaper_stages_bound_the_step_from_below(name, p, v, m, monkeypatch):
    def make(count):
        return schedule(name, num_ranks=p, num_microbatches=count, virtual_stages=v)

    monkeypatch.setattr(pipeline, "FULL", 0)
    step, rng = Rehearsal(make, p, m, p * v), random.Random(3)
    for _ in range(20):
        rows = [[rng.random() for _ in range(3)] for _ in range(p * v)]
        less = [[x * rng.choice((1.0, 0.9, 0.3)) for x in row] for row in rows]
        costs, fewer = (Costs(tuple(StageCosts(*r) for r in table), 0.1) for table in (rows, less))
        assert step.least(fewer) <= step(costs).makespan * (1 + 1e-12)
        assert step.least(costs) <= step(costs).makespan * (1 + 1e-12)

"""A long step repeats itself: what is extrapolated equals what is played."""

import pytest

from partita.schedule.clock import Costs, StageCosts, clock, makespan
from partita.schedule.make import schedule
from partita.simulate import pipeline
from partita.simulate.pipeline import play

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


def test_a_short_step_is_played_whole():
    costs = Costs((StageCosts(),) * 2)
    played = play(lambda m: schedule("1f1b", num_ranks=2, num_microbatches=m), 2, 4, costs)
    assert played.whole
    assert played.seconds == 15.0  # (m + p - 1) (F + B)

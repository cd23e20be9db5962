"""Idle time by cause: nothing of a rank's time is left unexplained."""

import pytest

from partita.schedule.clock import Costs, clock, makespan
from partita.schedule.idle import idle
from partita.schedule.make import schedule

NAMES = ["gpipe", "1f1b", "zb_h1", "zb_v", "dualpipe", "chimera", "looped_bfs"]


@pytest.mark.parametrize("pair", ["sequence", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_work_and_the_four_causes_add_up(name, pair):
    s = schedule(name, num_ranks=4, num_microbatches=8)
    spans = clock(s, Costs.equal(s, 1.0, 1.2, 0.8, 0.3), pair)
    rows = idle(s, spans, pair)
    for row in rows:
        assert row.work + row.total == pytest.approx(makespan(spans))
        assert min(row.warm_up, row.drain, row.communication, *row.waiting.values(), 0.0) >= 0.0
        assert row.rank not in row.waiting


def test_the_causes_of_1f1b():
    """p = 2, m = 2, c = 0.5: rank 1 starts 1.5 late; rank 0 waits for rank 1's backwards."""
    s = schedule("1f1b", num_ranks=2, num_microbatches=2)
    first, last = idle(s, clock(s, Costs.equal(s, send=0.5)))
    assert (last.warm_up, last.drain, last.waiting) == (1.5, 2.5, {})
    assert first.warm_up == first.drain == 0.0
    # 0F1 ends at 2, 1B0 at 4.5, 0B0 runs 5 to 7; 1B1 ends at 7.5, 0B1 runs 8 to 10
    assert first.waiting == {1: 2.5 + 0.5} and first.communication == 0.5 + 0.5
    assert last.communication == 0.0


def test_messages_alone_are_exposed():
    s = schedule("forward", num_ranks=2, num_microbatches=3)
    _, last = idle(s, clock(s, Costs.equal(s, send=0.25)))
    assert last.warm_up == 1.25 and last.total == 1.25
    assert idle(s, []) == []

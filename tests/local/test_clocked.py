"""The executor's real time under stated compute is the clock's, but for waking ranks; order identical."""

import sys
import time
from types import SimpleNamespace

import pytest
from clocked_stages import clocked_run

from partita.comm.local import local
from partita.schedule.clock import Costs, clock, makespan
from partita.schedule.make import schedule

pytestmark = pytest.mark.timed
SLOT_S = 0.02
# 1.05 was held on a Zen 5. On an idle virtual machine of a Zen 4 every schedule took 1.04 to 1.07, it seems
# by what waking a rank for its message takes there (docs/benchmarks.md).
MOST = 1.1
EVERY = (
    ("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("looped_bfs", 2), ("zb_h1", 1), ("zb_h2", 1),
    ("zb_v", 2), ("v_half", 2), ("v_min", 2), ("interleaved_zb", 2), ("dualpipe", 1), ("dualpipev", 2),
    ("chimera", 1), ("v_2_3", 2), ("pipedream", 1), ("pipedream_2bw", 1), ("forward", 1),
)  # fmt: skip


def measured(name, v, p):
    """(predicted makespan, measured, predicted order by rank, measured order by rank)."""
    made = schedule(name, num_ranks=p, num_microbatches=2 * p, virtual_stages=v)
    share = SLOT_S * made.virtual_stages  # every action is a slot
    costs = Costs.equal(made, share, share, share)
    predicted = clock(made, costs)
    with local(p, 50) as ranks:
        found = ranks.run(clocked_run, made, SimpleNamespace(F=SLOT_S, I=SLOT_S, W=SLOT_S))
    spans = [s for rank in found for s in rank]
    names = [[s.name for s in rank] for rank in found]
    return makespan(predicted), makespan(spans), [list(map(str, r)) for r in made.ranks], names


def best(name, v, p, tries=1):
    """The least measured / predicted: what is measured is this process, on a machine that others use; once
    it was slow it is left some time to be so no more."""
    ratio = float("inf")
    for at in range(tries):
        time.sleep(min(at, 3))
        want, got, order, done = measured(name, v, p)
        assert done == order
        assert got >= 0.99 * want
        ratio = min(ratio, got / want)
        if ratio <= MOST:
            break
    return ratio


@pytest.mark.parametrize(("name", "v"), [("zb_v", 2), ("1f1b", 1)])
def test_clocked_stages_keep_the_order_and_are_never_faster_than_the_clock(name, v):
    assert best(name, v, 2) >= 0.99


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize(("name", "v"), EVERY)
def test_clocked_stages(name, v, p):
    ratio = best(name, v, p, tries=4)
    sys.stdout.write(f"{name} p{p}: measured / predicted {ratio:.3f}\n")
    assert ratio <= MOST

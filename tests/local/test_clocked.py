"""The executor's real time under stated compute is the clock's, at what one rank takes here for an action of
that compute and two for a message; order identical."""

import statistics
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from clocked_stages import clocked_run

from partita.comm.threads.local import local
from partita.record.span import Span
from partita.schedule.clock import Costs, clock, makespan
from partita.schedule.ir import Schedule
from partita.schedule.make import schedule

pytestmark = pytest.mark.timed
SLOT_S = 0.02
MOST = 0.05
EVERY = (
    ("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("looped_bfs", 2), ("zb_h1", 1), ("zb_h2", 1),
    ("zb_v", 2), ("v_half", 2), ("v_min", 2), ("interleaved_zb", 2), ("dualpipe", 1), ("dualpipev", 2),
    ("chimera", 1), ("v_2_3", 2), ("pipedream", 1), ("pipedream_2bw", 1), ("forward", 1),
    ("auto", 2),
)  # fmt: skip


def ran(made: Schedule) -> list[list[Span]]:
    """What each rank did when; every F, I and W sleeps a slot."""
    with local(len(made.ranks), 50) as ranks:
        return ranks.run(clocked_run, made, SimpleNamespace(F=SLOT_S, I=SLOT_S, W=SLOT_S))


def every(ranks: list[list[Span]]) -> list[Span]:
    """All ranks' in one list."""
    return [span for rank in ranks for span in rank]


@pytest.fixture(scope="module")
def taken() -> SimpleNamespace:
    """Seconds of an F, an I and a W where one rank has all, and of a message from one to the next: a slot is
    some 20.1 ms of sleep, and what comes before and behind it finds caches that are cold."""
    (alone,) = ran(schedule("zb_h1", num_ranks=1, num_microbatches=8))
    lasted: dict[str, list[float]] = {"F": [], "I": [], "W": []}
    for span, following in pairwise(alone):
        lasted[span.kind].append(following.start_s - span.start_s)
    found = {kind: statistics.median(seconds) for kind, seconds in lasted.items()}
    ways = schedule("forward", num_ranks=4, num_microbatches=4)
    late = [makespan(every(ran(ways))) - 7 * found["F"] for _ in range(3)]
    return SimpleNamespace(**found, send=max(min(late), 0) / 3)


def measured(name, v, p, taken):
    """(makespan at the stated costs, at what was taken, measured, by rank what was to be done, what was)."""
    made = schedule(name, num_ranks=p, num_microbatches=2 * p, virtual_stages=v)
    v = made.virtual_stages  # every action is a slot
    stated = clock(made, Costs.equal(made, SLOT_S * v, SLOT_S * v, SLOT_S * v))
    costs = Costs.equal(made, taken.F * v, taken.I * v, taken.W * v, taken.send)
    found = ran(made)
    names = [[s.name for s in rank] for rank in found]
    ends = makespan(stated), makespan(clock(made, costs)), makespan(every(found))
    return *ends, [list(map(str, r)) for r in made.ranks], names


def best(name, v, p, taken, tries=1):
    """(measured / predicted nearest to 1, measured / stated then): what is measured is this process, on a
    machine that others use; once it was slow it is left some time to be so no more."""
    found = []
    for at in range(tries):
        time.sleep(min(at, 3))
        stated, want, got, order, done = measured(name, v, p, taken)
        assert done == order
        found.append((got / want, got / stated))
        if abs(got / want - 1) <= MOST:
            break
    return min(found, key=lambda ratios: abs(ratios[0] - 1))


def test_an_action_takes_little_more_than_its_slot(taken):
    assert min(taken.F, taken.I, taken.W) >= SLOT_S
    assert max(taken.F, taken.I, taken.W) <= 1.1 * SLOT_S


@pytest.mark.parametrize(("name", "v"), [("zb_v", 2), ("1f1b", 1)])
def test_clocked_stages_keep_the_order_and_are_never_faster_than_the_clock(name, v, taken):
    assert best(name, v, 2, taken)[1] >= 0.99


@pytest.mark.slow
@pytest.mark.turns(3)
@pytest.mark.timeout(240)
@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize(("name", "v"), EVERY)
def test_clocked_stages(name, v, p, taken):
    ratio, stated = best(name, v, p, taken, tries=4)
    sys.stdout.write(f"{name} p{p}: measured / predicted {ratio:.3f}, / stated {stated:.3f}\n")
    assert abs(ratio - 1) <= MOST
    assert stated >= 0.99

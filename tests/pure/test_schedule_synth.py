"""Streams, list scheduling and justification: nothing that ran or fitted stops doing so."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.schedule.check import check
from partita.schedule.clock import Costs, StageCosts, clock, makespan, peak_activations
from partita.schedule.make import schedule
from partita.schedule.passes import halved
from partita.schedule.synth.flow import (
    fits,
    flow_like,
    orders_of,
    peaks_of,
    schedule_of,
    starts_of,
)
from partita.schedule.synth.lists import (
    AS_BEFORE,
    LAST,
    WEIGHTS_LAST,
    Rule,
    justified,
    listed,
)

NAMES = ["gpipe", "1f1b", "looped_bfs", "zb_h1", "zb_v", "dualpipe", "chimera", "interleaved_zb"]
seconds = st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0])


def make(name: str, p: int = 4, m: int = 8):
    v = 2 if name in ("looped_bfs", "interleaved_zb") else 1
    return schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=v)


@pytest.mark.parametrize("wire", [0.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_streams_take_the_time_and_memory_of_the_schedule(name, wire):
    s = make(name)
    costs = replace(Costs.equal(s, 1.0, 1.5, 0.5, send=0.25), wire=wire)
    flow = flow_like(s, costs, [100.0] * 4)
    orders = orders_of(flow, s)
    found = starts_of(flow, orders)
    assert found is not None and found[0] == pytest.approx(makespan(clock(halved(s), costs)))
    assert peaks_of(flow, orders) == peak_activations(s)
    back = schedule_of(flow, orders, s.name)
    assert check(back) == [] and makespan(clock(back, costs)) == pytest.approx(found[0])
    if name != "looped_bfs":  # which goes backward from the last microbatch: renamed
        assert back.ranks == halved(s).ranks
    reverse = flow.reversed()
    turned = [order[::-1] for order in orders]
    there = starts_of(reverse, turned)
    assert there is not None and (wire or there[0] == pytest.approx(found[0]))
    assert peaks_of(reverse, turned) == peaks_of(flow, orders)


@pytest.mark.parametrize(
    "rule",
    [AS_BEFORE, WEIGHTS_LAST, Rule(F=LAST / 2, W=LAST), Rule(F=LAST), Rule(patience=0.5)],
)
@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    stage=st.lists(st.tuples(seconds, seconds, seconds), min_size=8, max_size=8),
    send=st.sampled_from([(0.0, 0.0), (0.2, 0.0), (1.0, 0.75)]),
)
def test_new_orders_run_and_fit(rule, name, stage, send):
    s = make(name)
    costs = Costs(tuple(StageCosts(*c) for c in stage[: s.num_stages]), *send)
    limits = peak_activations(s)
    flow = flow_like(s, costs, limits)
    orders = orders_of(flow, s)
    new = listed(flow, orders, rule)
    assert fits(flow, new)
    assert [sorted(o) for o in new] == [sorted(o) for o in orders]
    assert check(schedule_of(flow, new, "new")) == []
    before = starts_of(flow, orders)
    assert before is not None
    best, found = justified(flow, orders, (rule,))
    assert best <= before[0] + 1e-9 and fits(flow, found)
    again = starts_of(flow, found)
    assert again is not None and again[0] == best


def test_a_deadlock_has_no_times():
    s = make("1f1b", 2, 2)
    flow = flow_like(s, Costs.equal(s), [9.0] * 2)
    orders = orders_of(flow, s)
    orders[0] = [x for x in orders[0] if flow.names[x][2] != "F"] + [0, 0]
    assert starts_of(flow, orders) is None

"""Offload among the choices: bounds hold, brute force finds no better, and it is left where it is no help."""

from dataclasses import replace

import pytest
from drawn_plans import wide
from test_planner import hold_many, leaves, small

from partita.planner.elsewhere import NO_BETTER, TARGETS, widened
from partita.planner.explain import binds, why
from partita.planner.search import ANY, Search, measures, searcher
from partita.planner.space import Space, Words
from partita.spec.plan import OffloadPlan

FORBID = (
    "cp",
    "recompute",
    "v_half",
    "v_min",
    "gpipe",
    "zb_h1",
    "zb_h2",
    "zb_v",
    "dualpipe",
    "dualpipev",
)
EVERY = [OffloadPlan(to, targets) for to in ("cpu", "nvme") for targets in TARGETS]


@pytest.mark.parametrize("offload", EVERY, ids=lambda x: f"{x.to}-{len(x.targets)}")
@pytest.mark.parametrize("question", [("tiny-moe", "16xh100", 16), ("tiny", "laptop", 8)], ids=str)
def test_no_bound_is_above_what_simulate_says(question, offload):
    base = wide(*question, layers=4)
    space = Space(base.job, Words(), base.space.dtype, offload)
    hold_many(Search(space), 3, 4)


@pytest.mark.parametrize(
    ("memory", "host", "helps"),
    [
        pytest.param(1.5e6, None, True, marks=pytest.mark.slow),
        (2.3e6, 8e6, True),
        pytest.param(1e9, None, False, marks=pytest.mark.slow),
    ],
)
def test_the_best_is_that_of_brute_force_wherever_states_lie(memory, host, helps):
    search = small(4, memory, fix=("2mb", "fp32"), forbid=FORBID)
    job = replace(
        search.job, cluster=replace(search.job.cluster, host_memory_bytes=host and int(host))
    )
    search = searcher(job, ("2mb", "fp32"), FORBID)
    alone = search.best(ANY)
    found = widened(search, ANY, 1, search.best(ANY), 60.0)
    fit = [p for p in map(search.predict, map(search.plan, leaves(search))) if p.fits]
    assert bool(fit) == bool(alone.plans)
    for offload in EVERY:
        other = Search(Space(job, search.space.words, search.space.dtype, offload))
        fit += [p for p in map(other.predict, map(other.plan, leaves(other))) if p.fits]
    assert found.complete and ("offload" in found.plans[0].plan) == helps
    assert ANY.key(*measures(found.plans[0])) == min(ANY.key(*measures(p)) for p in fit)
    assert found.bounded + found.simulated + found.rejected.total() == found.considered
    assert (found.rejected[NO_BETTER] > 0) == (host is None)


def test_more_devices_search_it_where_nothing_else_fits_or_it_is_asked_for():
    job = small(32, 1e9, fix=("1mb",)).job
    words = ("1mb", "fp32", "tp2+sp", "pp2:1f1b")
    for memory, extra, to in ((1e9, (), ""), (1e9, ("offload:nvme",), "nvme"), (7e5, (), "cpu")):
        one = replace(job, cluster=replace(job.cluster, memory_bytes=int(memory)))
        search = searcher(one, (*words, *extra), ("cp", "recompute"))
        found = widened(search, ANY, 1, search.best(ANY), 30.0)
        assert found.complete and found.plans
        best = found.plans[0]
        assert f"offload:{to}" in best.plan if to else "offload" not in best.plan
        reasons = {r.choice for r in why(one, best)}
        assert (f"offload:{to}" in reasons) == bool(to) and "the its" not in binds(one, best)
    forbidden = searcher(one, words, ("cp", "recompute", "offload"))
    assert not widened(forbidden, ANY, 1, forbidden.best(ANY), 30.0).plans

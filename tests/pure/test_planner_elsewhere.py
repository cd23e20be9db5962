"""Offload among the choices: bounds hold, brute force finds no better, and it is left where it is no help."""

from dataclasses import replace

import pytest
from drawn_plans import wide
from test_planner import bounds_hold, hold_many, leaves, small
from turns import in_turn

from partita.planner.answers.answer import counts
from partita.planner.answers.explain import binds, why
from partita.planner.search.elsewhere import NO_BETTER, TARGETS, offloads, widened
from partita.planner.search.nodes import Found
from partita.planner.search.search import ANY, Goal, Node, Search, measures, searcher
from partita.planner.space import Leaf, MeshChoice, Shape, Space, Tokens, Words
from partita.simulate.moves import STATE_PASSES, host_memory_rate
from partita.simulate.predict import simulate
from partita.spec.job import Job
from partita.spec.plan import OffloadPlan

LATER = (pytest.mark.slow, pytest.mark.turns(2))
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


@pytest.mark.parametrize("offload", in_turn(EVERY), ids=lambda x: f"{x.to}-{len(x.targets)}")
@pytest.mark.parametrize("question", [("tiny-moe", "16xh100", 16), ("tiny", "laptop", 8)], ids=str)
def test_no_bound_is_above_what_simulate_says(question, offload):
    base = wide(*question, layers=4)
    space = Space(base.job, Words(), base.space.dtype, offload)
    hold_many(Search(space), 5, 4)


@pytest.mark.parametrize(
    ("memory", "host", "helps"),
    [
        pytest.param(1.5e6, None, True, marks=LATER),
        (2.3e6, 8e6, True),
        pytest.param(1e9, None, False, marks=LATER),
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
    least = Goal("memory")
    found = widened(search, least, 1, search.best(least), 60.0)
    assert found.complete
    assert least.key(*measures(found.plans[0])) == min(least.key(*measures(p)) for p in fit)


def test_parameters_elsewhere_leave_out_no_way_to_cut_states_that_could_be():
    job, count = small(4, 1e9).job, 0
    plain, away = (Space(job, Words(), "bf16", offload) for offload in (EVERY[0], EVERY[2]))
    for mesh in plain.meshes():
        mine, tokens = away.states(mesh, Shape()), Tokens(micro=away.micros(mesh)[0])
        for shard, zero, order in plain.states(mesh, Shape()):
            leaf = Leaf(*away.schedules(mesh)[0], shard, zero, order)
            plan = replace(away.plan(mesh, Shape(), tokens, leaf), offload=away.offload)
            rules = {p.rule for p in simulate(job.with_plan(plan)).problems if p.room == "offload"}
            assert (rules == {"shards"}) == ((shard, zero, order) not in mine), plan
            count += rules == {"shards"}
    assert count


def test_an_update_elsewhere_takes_its_time_where_one_microbatch_moves_nothing_once_a_step():
    job = small(4, 1e9).job
    search = Search(Space(job, Words(), "bf16", EVERY[2]))
    mesh, b = MeshChoice(1, 4, 1, 1, False), search.bounds
    tokens, leaf = Tokens("full", 1, 2), Leaf("1f1b", 1, 4, 3)
    node = Node(4, 0.0, 0.0, 1, mesh, Shape(), tokens, leaf)
    assert bounds_hold(search, node)
    told = search.predict(search.plan(node))
    shards = b.shards(mesh, Shape(), 4)
    row = b.stages(b.table(mesh, Shape(), tokens), 1)
    passed = STATE_PASSES * shards.away(row, 3).max() / host_memory_rate(search.machine)
    assert told.time["optimizer_s"] >= passed > 0 and "1mb" in told.plan


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


def test_ranks_of_a_cpu_have_no_other_memory_to_offload_to():
    plans = Found(plans=small(4, 1e9, fix=("1mb",)).best(ANY).plans)
    job = Job.of("tiny", "laptop", "", global_batch_size=8, seq_len=64)
    host = replace(job, cluster=replace(job.cluster, host_memory_bytes=10**9))
    asked = searcher(job), searcher(host), searcher(job, ("offload:cpu",))
    assert [bool(list(offloads(search, plans))) for search in asked] == [False, True, True]
    assert list(offloads(asked[0], Found()))  # where nothing fits without


def test_offload_that_no_time_is_left_for_is_said():
    search = small(4, 2e6, fix=("2mb",), forbid=("v_half", "v_min"))
    found = widened(search, ANY, 1, search.best(ANY), 0.0)
    assert found.proven and not found.complete and found.unproven == ("offload",)
    assert "not proven over offload, proven over all else" in counts(found)

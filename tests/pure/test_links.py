"""Links: who shares them, what that costs, and that one rank stands for all."""

from collections import defaultdict
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import partita as pt
from partita.cost.comm import AlphaBeta, Group, group_seconds
from partita.cost.machine import machine_of
from partita.parallel.laid import lay
from partita.schedule.order import turns
from partita.simulate import predict, stage
from partita.simulate.groups import group_of
from partita.simulate.jitter import crowd
from partita.simulate.links import SLOW, Lane, seen_seconds
from partita.simulate.predict import request_of, timed
from partita.simulate.stage import works_of
from validation.collectives import errors


def lane(room, **links):
    one = Lane(room)
    for link, seconds in links.items():
        one.add("axis", link, seconds)
    return one


def test_what_is_waited_for_is_seen_and_what_is_hidden_is_not():
    own = {"tp": lane(0.0, nvlink=0.2), "dp": lane(1.0, network=0.5)}
    assert seen_seconds(own, 1.0) == pytest.approx({"tp": 0.2, "dp": SLOW * 0.5})


def test_lanes_that_compute_waits_for_do_not_meet():
    own = {"tp": lane(0.0, nvlink=0.2), "ep": lane(0.0, nvlink=0.5)}
    assert seen_seconds(own, 1.0) == pytest.approx({"tp": 0.2, "ep": 0.5})


def test_a_shared_link_is_halved_while_both_are_there():
    """compute 0.8 and tp 0.2 make a block of 1 s; dp is there half of the time, so half of tp meets it."""
    own = {"tp": lane(0.0, nvlink=0.2), "dp": lane(0.8, nvlink=0.5)}
    assert seen_seconds(own, 0.8) == pytest.approx({"tp": 0.3, "dp": SLOW * 0.5})


def test_a_full_link_carries_one_after_the_other():
    """tp's 0.2 and dp's 50 on one link take 50.2 together; tp waits no longer than for itself once more."""
    own = {"tp": lane(0.0, nvlink=0.2), "dp": lane(0.1, nvlink=50.0)}
    found = seen_seconds(own, 0.1)
    assert found["tp"] == pytest.approx(0.4)
    assert 0.1 + sum(found.values()) == pytest.approx(50.2)


def test_of_lanes_side_by_side_the_longest_is_seen():
    """dp's 2.0 s bound the block; cp's 0.8 with the 0.5 of compute that is not attention lie within."""
    own = {"tp": lane(0.0, a=0.1), "dp": lane(0.8, b=2.0), "cp": lane(0.3, c=0.8)}
    assert 0.8 + sum(seen_seconds(own, 0.8).values()) == pytest.approx(2.0)
    short = {**own, "dp": lane(0.8, b=0.1)}
    assert 0.8 + sum(seen_seconds(short, 0.8).values()) == pytest.approx(1.3)


@given(st.lists(st.tuples(*[st.floats(0, 2)] * 2, st.integers(0, 1)), min_size=1, max_size=4),
       st.floats(0.1, 2), st.floats(0.1, 1))  # fmt: skip
def test_faster_is_never_slower(drawn, attention, rest):
    """Whatever the lanes: less compute, or a faster link, and the block is no longer."""

    def block(compute, attends, speed):
        rooms = (0.0, attends, compute, compute)
        lanes = {
            f"lane {i}": lane(rooms[i], **{f"link {k}": s / speed, "other": t / speed})
            for i, (s, t, k) in enumerate(drawn)
        }
        return compute + sum(seen_seconds(lanes, compute).values())

    slow = block(attention + rest, attention, 1.0) * (1 + 1e-9)
    assert block(attention + rest, attention, 2.0) <= slow
    assert block(attention + rest / 2, attention, 1.0) <= slow
    assert block((attention + rest) / 2, attention / 2, 1.0) <= slow


def test_rows_that_go_once_to_a_node_or_a_rank_are_fewer():
    inner, outer = AlphaBeta(0.0, 400e9), AlphaBeta(0.0, 50e9)
    group = Group(8, 4, inner, outer)
    one, once = (group_seconds("all_to_all", group, 1e9, k) for k in (1, 8))
    assert once / one == pytest.approx(4 * (1 - 0.75**8) / 8)
    alone = Group(8, 1, inner, inner)
    one, once = (group_seconds("all_to_all", alone, 1e9, k) for k in (1, 8))
    assert once / one == pytest.approx(8 * (1 - (7 / 8) ** 8) / 8)


def test_switches_that_add_halve_what_an_all_reduce_sends():
    size = 8e9
    plain, adds = (AlphaBeta(0.0, 400e9, reduces) for reduces in (False, True))
    node = [group_seconds("all_reduce", Group(8, 1, x, x), size) for x in (plain, adds)]
    assert node[1] / node[0] == pytest.approx((1 + 1 / 8) / (2 * 7 / 8))
    outer = [AlphaBeta(0.0, 10e9, reduces) for reduces in (False, True)]
    nodes = [group_seconds("all_reduce", Group(8, 16, adds, x), size) for x in outer]
    assert nodes[0] == pytest.approx(2 * 127 / 128 * size / 80e9)
    assert nodes[1] == pytest.approx(size / 8 / 10e9)
    # as many hops for any number of nodes; other collectives and small groups are as they were
    late = AlphaBeta(1e-5, 10e9, True)
    few, many = (group_seconds("all_reduce", Group(1, n, adds, late), 1.0) for n in (4, 4096))
    assert few == pytest.approx(many)
    for collective in ("all_gather", "reduce_scatter", "all_to_all"):
        ways = {group_seconds(collective, Group(8, 4, x, x), size) for x in (plain, adds)}
        assert len(ways) == 1
    two = {group_seconds("all_reduce", Group(2, 1, x, x), size) for x in (plain, adds)}
    assert len(two) == 1, "a ring of two sends less"


def test_a_plan_on_switches_that_add_takes_less():
    def step(reduces):
        made = job("dp_replicate2 tp4 pp2:1f1b/4mb bf16", reduces)
        return pt.simulate(made).step_time_s

    assert step(True) < step(False)


def test_all_reduces_are_those_of_nccl_tests():
    found = errors(Path(__file__).parents[2] / "validation" / "collectives.csv")
    for device, bound in (("A100-80GB", 0.11), ("V100", 0.2)):  # a switch; a cube mesh
        own = [abs(e) for (name, _), es in found.items() if name == device for _, e in es]
        assert len(own) == 77
        assert sum(own) / len(own) < bound


def test_traffic_names_its_link():
    lines = pt.simulate(job("pp2:1f1b/4mb dp_replicate2 tp4+sp bf16")).to_json()["traffic"]
    found = {(x["axis"], x["link"]) for x in lines}
    assert ("tp", "nvlink") in found
    assert ("dp_replicate", "rail") in found
    assert ("pp", "spine") in found


PLANS = (
    "pp2:1f1b/4mb dp_replicate2 tp4+sp bf16", "dp_shard4.zero3 tp4+sp bf16 2mb",
    "dp_shard2.zero1 cp4:hybrid2x2 tp2+sp bf16", "pp4:interleaved_1f1bx2/8mb tp2 dp_replicate2 bf16",
    "dp_shard8.zero1 ep4 etp2 tp2+sp bf16", "pp2:zb_h1/4mb dp_shard2.zero2 cp2:ring tp2+sp bf16",
)  # fmt: skip


def job(plan, reduces=False):
    model = "mixtral-8x7b" if " ep" in plan else "llama3-8b"
    links = [
        {
            "name": "nvlink",
            "devices": 4,
            "bytes_per_s": 450e9,
            "latency_s": 3e-6,
            "reduces": reduces,
        },
        {"name": "rail", "devices": 8, "bytes_per_s": 50e9, "latency_s": 1e-5},
        {"name": "spine", "devices": 16, "bytes_per_s": 25e9, "latency_s": 2e-5},
    ]
    cluster = {"device": "h100", "devices": 16, "devices_per_node": 4, "links": links}
    return pt.Job.of(model, cluster, plan, global_batch_size=16, seq_len=4096)


@pytest.mark.parametrize("plan", PLANS)
def test_the_first_rank_stands_for_all(plan, monkeypatch):
    """The simulation without symmetry: every rank priced by its own groups, found rank by rank in the mesh;
    all ranks of the world played at once, those of a stage in step with whom they meet in blocks. Its step
    is that of the simulation of one pipeline, to the last bit."""
    one = job(plan)
    laid, machine = lay(request_of(one)), machine_of(one.cluster)
    works, mesh = works_of(laid), laid.mesh
    whole = timed(laid, machine, one.plan.num_microbatches, works)
    costs = []
    own_group = cache(partial(_own, laid, one.cluster))
    for rank in range(mesh.world_size):
        monkeypatch.setattr(stage, "group_of", lambda _, axes, __, rank=rank: own_group(rank, axes))
        own = [stage.stage_time(w, laid, machine) for w in works.stages]
        costs.append([predict.stage_costs(s, whole.busy, whole.waits_s) for s in own])
    assert _played(laid, works, costs, whole.costs.send) == whole.played.seconds


@pytest.mark.parametrize(
    "plan", ["dp_replicate5 tp3 bf16", "pp5:1f1b/8mb dp_shard2.zero1 tp6 bf16"]
)
def test_where_groups_do_not_tile_the_nodes_the_one_on_most_stands_for_all(plan):
    """Every group of an axis, found rank by rank: none lies on more nodes than the one that is priced."""
    cluster = {"preset": "64xh100"}
    one = pt.Job.of("llama3-8b", cluster, plan, global_batch_size=80, seq_len=4096)
    model = replace(one.model, heads=48, kv_heads=12, ffn_hidden=14400, vocab=128256)
    laid = lay(request_of(replace(one, model=model)))
    node = one.cluster.node_of
    crossed = False
    for axis in ("tp", "dp_replicate", "dp_shard", "pp"):
        if laid.sizes[axis] == 1:
            continue
        groups = laid.mesh.groups(axis)
        most = max(len({node(r) for r in g}) for g in groups)
        chosen = group_of(laid, (axis,), one.cluster)
        assert chosen in groups
        assert len({node(r) for r in chosen}) == most
        crossed |= most > len({node(r) for r in groups[0]})
    assert crossed


def _own(laid, cluster, rank, axes):
    """The rank's own group; heads that ranks share are neighbours on tp."""
    if axes == ("tp/share",):
        return group_of(laid, axes, cluster)
    return tuple(sorted(laid.mesh.group(rank, *axes)))


def _played(laid, works, costs, send):
    """The last end over all ranks of the world; an action of a stage begins when all that meet in its blocks
    can begin, and ends when the last of them does."""
    mesh = laid.mesh
    meet = crowd(laid, works).beside
    ranks = defaultdict(list)
    for rank in range(mesh.world_size):
        ranks[mesh.coords(rank)["pp"]].append(rank)
    free = dict.fromkeys(range(mesh.world_size), 0.0)
    ends = []
    for turn in turns(laid.schedule):
        stage_costs = [costs[r][turn.action.stage].of(turn.action.kind) for r in ranks[turn.rank]]
        ready = [max([free[r], *(ends[f][i] + send for f in turn.far)])
                 for i, r in enumerate(ranks[turn.rank])]  # fmt: skip
        if meet > 1:
            ready = [max(ready)] * len(ready)
        done = [a + b for a, b in zip(ready, stage_costs, strict=True)]
        ends.append(done)
        free.update(zip(ranks[turn.rank], done, strict=True))
    return max(free.values())

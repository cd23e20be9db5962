"""Links: who shares them, what that costs, and that one rank stands for all."""

from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import pytest

import partita as pt
from partita.cost.comm import AlphaBeta, Group, group_seconds
from partita.cost.machine import machine_of
from partita.parallel.laid import lay
from partita.schedule.order import turns
from partita.simulate import stage
from partita.simulate.groups import group_of
from partita.simulate.jitter import crowd
from partita.simulate.links import Lane, lengthened
from partita.simulate.predict import _costs, request_of, timed
from partita.simulate.stage import works_of
from validation.collectives import errors


def lane(room, **links):
    one = Lane(room)
    for link, seconds in links.items():
        one.add("axis", link, seconds)
    return one


def test_lanes_on_other_links_do_not_meet():
    own = {"tp": lane(0.0, nvlink=0.2), "dp": lane(1.0, network=0.5)}
    assert lengthened(own, 1.0) == {"tp": 1.0, "dp": 1.0}


def test_lanes_that_compute_waits_for_do_not_meet():
    own = {"tp": lane(0.0, nvlink=0.2), "ep": lane(0.0, nvlink=0.5)}
    assert lengthened(own, 1.0) == {"tp": 1.0, "ep": 1.0}


def test_a_shared_link_is_halved_while_both_are_there():
    """compute 0.8 and tp 0.2 make a block of 1 s; dp is there half of the time, so half of tp meets it."""
    own = {"tp": lane(0.0, nvlink=0.2), "dp": lane(0.8, nvlink=0.5)}
    found = lengthened(own, 0.8)
    assert found["tp"] == pytest.approx(1.5)
    assert found["dp"] == pytest.approx(1 + 0.1 / 0.5)


def test_nobody_waits_longer_than_for_all_of_the_other():
    own = {"tp": lane(0.0, nvlink=0.2), "dp": lane(0.1, nvlink=50.0)}
    found = lengthened(own, 0.1)
    assert found["tp"] == pytest.approx(2.0)
    assert found["dp"] == pytest.approx(1 + 0.2 / 50)


def test_rows_that_go_once_to_a_node_are_fewer():
    inner, outer = AlphaBeta(0.0, 400e9), AlphaBeta(0.0, 50e9)
    group = Group(8, 4, inner, outer)
    one, once = (group_seconds("all_to_all", group, 1e9, k) for k in (1, 8))
    assert once / one == pytest.approx(4 * (1 - 0.75**8) / 8)
    alone = Group(8, 1, inner, inner)
    assert group_seconds("all_to_all", alone, 1e9, 8) == group_seconds("all_to_all", alone, 1e9)


def test_all_reduces_are_those_of_nccl_tests():
    found = errors(Path(__file__).parents[2] / "validation" / "collectives.csv")
    own = [abs(e) for (device, _), es in found.items() if device == "A100-80GB" for e in es]
    assert len(own) == 77
    assert sum(own) / len(own) < 0.09


PLANS = (
    "pp2:1f1b/4mb dp_replicate2 tp4+sp bf16", "dp_shard4.zero3 tp4+sp bf16 2mb",
    "dp_shard2.zero1 cp4:hybrid2x2 tp2+sp bf16", "pp4:interleaved_1f1bx2/8mb tp2 dp_replicate2 bf16",
    "dp_shard8.zero1 ep4 etp2 tp2+sp bf16", "pp2:zb_h1/4mb dp_shard2.zero2 cp2:ring tp2+sp bf16",
)  # fmt: skip


def job(plan):
    model = "mixtral-8x7b" if " ep" in plan else "llama3-8b"
    links = [
        {"name": "nvlink", "devices": 4, "bytes_per_s": 450e9, "latency_s": 3e-6},
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
    own_group = cache(partial(_own, laid))
    for rank in range(mesh.world_size):
        monkeypatch.setattr(stage, "group_of", lambda _, axes, rank=rank: own_group(rank, axes))
        own = [stage.stage_time(w, laid, machine) for w in works.stages]
        costs.append([_costs(s, whole.busy, whole.waits_s) for s in own])
    assert _played(laid, works, costs, whole.costs.send) == whole.played.seconds


def _own(laid, rank, axes):
    """The rank's own group; heads that ranks share are neighbours on tp."""
    if axes == ("tp/share",):
        return group_of(laid, axes)
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

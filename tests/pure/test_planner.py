"""The search: bounds never above what `simulate` says, and the best plan equal to brute force over it."""

import random
from dataclasses import replace

import numpy as np
import pytest

from partita.base.errors import Problem, UsageError
from partita.planner.bound import ENDLESS
from partita.planner.exact import laid_bound
from partita.planner.search import ANY, Goal, Node, Search, measures, searcher
from partita.planner.space import VIRTUAL, Leaf, MeshChoice, Shape, Tokens, Words
from partita.planner.table import Rough, Table, probe_of
from partita.schedule.make import schedule
from partita.simulate.predict import request_of, simulate
from partita.spec.cluster import Cluster
from partita.spec.job import Job

H100 = {"global_batch_size": 16, "seq_len": 2048}


def leaves(search: Search) -> list[Node]:
    """Every plan of the space."""
    s = search.space
    return [
        Node(4, 0.0, 0.0, 1, mesh, shape, tokens, Leaf(*schedule, *states))
        for mesh in s.meshes()
        for shape in s.shapes(mesh)
        for tokens in s.tokens(mesh)
        for schedule in s.schedules(mesh)
        for states in s.states(mesh, shape)
    ]


def small(devices: int, memory: float, layers: int = 4, **words: tuple[str, ...]) -> Search:
    model = {"preset": "tiny", "layers": layers}
    cluster = replace(Cluster.load(f"{devices}xh100"), memory_bytes=int(memory))
    job = Job.of("tiny", f"{devices}xh100", "", global_batch_size=8, seq_len=64)
    from partita.spec.model import ModelSpec

    return searcher(replace(job, model=ModelSpec.load(model), cluster=cluster), **words)


@pytest.mark.parametrize(
    ("model", "cluster", "batch", "count"),
    [
        ("llama3-8b", "32xh100", 64, 70),
        ("mixtral-8x7b", "16xh100", 32, 50),
        ("tiny", "laptop", 8, 120),
    ],
)
def test_no_bound_is_above_what_simulate_says(model, cluster, batch, count):
    seq_len = 64 if model == "tiny" else 2048
    job = Job.of(model, cluster, "", global_batch_size=batch, seq_len=seq_len)
    search = searcher(replace(job, model=replace(job.model, layers=min(job.model.layers, 8))))
    b, rng, seen = search.bounds, random.Random(7), 0
    meshes = list(search.space.meshes())
    while seen < count:
        mesh = rng.choice(meshes)
        shape, tokens = rng.choice(search.space.shapes(mesh)), rng.choice(search.space.tokens(mesh))
        states, schedules = search.space.states(mesh, shape), search.space.schedules(mesh)
        if not states:
            continue
        name, virtual = rng.choice(schedules)
        leaf = Leaf(name, virtual, *rng.choice(states))
        node = Node(4, 0.0, 0.0, 1, mesh, shape, tokens, leaf)
        job = search.job.with_plan(search.plan(node))
        prediction = simulate(job)
        if not prediction.fits or job.plan.num_microbatches > 32:
            continue
        seen += 1
        seconds, num_bytes, _ = measures(prediction)
        m, cut = job.plan.num_microbatches, leaf.zero if leaf.dp_shard > 1 else 0
        table, probe = b.table(mesh, shape, tokens), b.probe(mesh, name, virtual, m)
        assert not isinstance(table, Problem) and not isinstance(probe, Problem)
        count_, named = probe.chunks.shape[1], (name, virtual)
        stages = b.stages(table, count_)
        shards = b.shards(mesh, shape, leaf.dp_shard)
        endless = b.endless(mesh, shape, (tokens.mode, tokens.every))
        assert not isinstance(endless, Problem)
        micros = search.space.micros(mesh)
        at = micros.index(tokens.micro)
        least = search.floors(mesh, shape, endless)
        fold = Shape(ep=shape.ep, etp=shape.etp)
        whole = b.endless(replace(mesh, cp=1), fold, (tokens.mode, tokens.every))
        assert isinstance(whole, Table)
        step = b.step(mesh, named, m, count_)
        laid_s, laid_bytes = laid_bound(request_of(job), search.machine, probe, step)
        at_once = b.meetings(mesh, shape, leaf.dp_shard, cut)
        slower = b.sharded(stages, at_once, cut)
        once = b.update(stages, probe, cut, shards)
        once += b.reduced(stages, probe, at_once, cut)
        for low in (
            b.coarse(mesh),
            b.coarse(mesh, shape),
            search.floors(mesh, fold, whole, mesh.cp).seconds[at],
            b.rough(mesh, endless, named, np.array(micros))[at] + least.once[at],
            least.seconds[at],
            b.pipeline(slower, mesh, named, m) + once,
            b.played(slower, mesh, named, m) + once,
            laid_s,
        ):
            assert not isinstance(low, Problem) and low <= seconds * (1 + 1e-9), job.plan
        if not search.machine.cluster.cores_shared:
            assert laid_s == pytest.approx(seconds, rel=5e-3), job.plan
        scaled = b.stages(endless, count_)
        way = (cut, shards)
        for low in (
            b.memory(scaled, probe, *way, scale=tokens.micro / ENDLESS)
            + b.beside(endless, *way, tokens.micro / ENDLESS),
            b.memory(stages, probe, *way) + b.beside(table, *way),
            laid_bytes,
        ):
            assert low <= num_bytes * (1 + 1e-9), job.plan


def test_a_table_of_every_third_block_is_what_is_laid():
    search = small(4, 1e9, layers=7)
    mesh, b = MeshChoice(1, 2, 1, 2, True), search.bounds
    for every in (2, 3):
        tokens = Tokens("full", every, 2)
        mixed, laid = b.table(mesh, Shape(), tokens), b.laid_table(mesh, Shape(), tokens)
        assert isinstance(mixed, Table) and isinstance(laid, Table)
        assert mixed.flops == laid.flops
        for ours, theirs in zip(mixed.blocks, laid.blocks, strict=True):
            assert (ours.seconds, ours.kept) == pytest.approx((theirs.seconds, theirs.kept))
            assert ours.row == pytest.approx(theirs.row)


def test_where_stages_lie_is_what_the_schedules_say():
    for name, virtual in (
        *((n, 1) for n in ("1f1b", "gpipe", "zb_h1", "zb_h2", "dualpipe")),
        *((n, 2) for n in ("zb_v", "v_half", "v_min", "dualpipev")),
        *((n, v) for n in VIRTUAL for v in (2, 3)),
    ):
        made = schedule(name, num_ranks=4, num_microbatches=16, virtual_stages=virtual)
        rough, probe = Rough(name, 4, virtual), probe_of(made)
        assert rough.split == probe.split and rough.num_stages == probe.chunks.shape[1], name
        assert rough.held.tolist() == probe.held.tolist(), name
        assert all(rough.share == share for share in probe.share), name


BRUTE = small(
    4, 2e6, fix=("2mb",), forbid=("v_half", "v_min", "dp_replicate", "zero1", "gpipe", "looped_bfs")
)


@pytest.mark.parametrize("name", ["time", "memory", "devices", "cost"])
def test_the_best_of_a_small_cluster_is_that_of_brute_force(name):
    search, goal = BRUTE, Goal(name, price=2e-4)
    every = leaves(search)
    found = search.best(goal, top=3)
    keys = []
    for node in every:
        p = search.predict(search.plan(node))
        if p.fits:
            keys.append(goal.key(*measures(p)))
    assert found.complete and found.considered == len(every)
    best = [goal.key(*measures(p)) for p in found.plans[:3]]
    if name != "time":
        best, keys = best[:1], sorted(keys)
    assert best[0] == min(keys)
    assert found.bounded + found.simulated + found.rejected.total() == len(every)
    assert 0 < len(keys) < len(every), "the limit of memory must bind for some"


def test_words_restrict_the_space():
    fixed = small(8, 1e9, fix=("tp2+sp", "pp2:1f1b", "recompute:full"), forbid=("cp", "zero3"))
    for node in leaves(fixed):
        plan = fixed.plan(node)
        assert (plan.mesh.tp, plan.mesh.sp, plan.mesh.pp, plan.mesh.cp) == (2, True, 2, 1)
        assert plan.pipeline.schedule == "1f1b" and plan.recompute.mode == "full"
        assert plan.mesh.dp_shard == 1 or plan.data.zero_stage != 3
    assert leaves(fixed)
    for wrong in ({"fix": ("tp",)}, {"forbid": ("tp2+sp",)}, {"fix": ("tensor8",)}):
        with pytest.raises(UsageError):
            Words.of(**wrong)


def test_a_budget_of_nothing_is_said():
    found = small(8, 1e9).best(ANY, budget_s=0.0)
    assert not found.complete and found.plans == []


def test_nothing_fits_where_memory_holds_no_layer():
    found = small(2, 1e5).best()
    assert found.complete and not found.plans and found.rejected["memory"]

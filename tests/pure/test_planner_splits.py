"""Layer splits beside every other choice: bounds never above `simulate`, and equal to brute force."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
from drawn_plans import random_leaf, wide
from test_planner import leaves, small
from test_planner_beyond import nodes_of
from turns import in_turn

from partita.base.errors import Problem
from partita.base.units import format_seconds
from partita.planner.answers.answer import counts
from partita.planner.answers.ask import Question, ask
from partita.planner.bounds.rough import PAIRED
from partita.planner.bounds.table import Table
from partita.planner.search.gap import least_seconds
from partita.planner.search.nodes import Node, Queue
from partita.planner.search.search import ANY, Goal, Search, measures, searcher
from partita.planner.search.splits import finished, not_searched
from partita.planner.search.uneven import (
    ALL,
    Uneven,
    UnevenSpace,
    count_splits,
    every_split,
    least_bytes,
    moved,
    other_splits,
    stages_of,
)
from partita.planner.space import Shape
from partita.simulate.predict import simulate
from partita.spec.job import Job
from partita.spec.plan import Plan


def uneven(search: Search, turned: bool = False) -> Search:
    return Search(UnevenSpace(search.space, turned), Uneven)


def test_every_split_is_counted_and_only_an_end_may_have_no_layer():
    for layers, stages in ((5, 2), (5, 3), (6, 4), (4, 6), (7, 7)):
        cuts = product(range(layers + 1), repeat=stages - 1)
        splits = [tuple(b - a for a, b in pairwise((0, *c, layers))) for c in cuts]
        wanted = {s for s in splits if min(s) >= 0 and all(s[1:-1])}
        assert set(every_split(layers, stages)) == wanted
        assert count_splits(layers, stages) == len(wanted)
    assert other_splits((2, 2, 2)) == tuple(s for s in every_split(6, 3) if s != (2, 2, 2))
    far = (4,) * 8
    assert count_splits(32, 8) > ALL and other_splits(far) == tuple(moved(far))
    assert len(other_splits(far)) == 8 * 7


def test_a_plan_that_two_searches_come_to_is_kept_once():
    job, queue = (
        Job.of("tiny", "4xh100", "", global_batch_size=8, seq_len=64),
        Queue(ANY, Counter(), 2),
    )
    for line in ("1mb bf16", "1mb bf16", "2mb bf16"):
        told = simulate(job.with_plan(line))
        queue.keep(told, measures(told))
    assert [p.plan for _, p in queue.best] == ["1mb bf16", "2mb bf16"]


def splits_hold(search: Search, node: Node, rng: random.Random) -> bool:
    """Holds each bound of a plan with a random split against `simulate`; False where it does not fit."""
    levels, b, mesh, tokens = search.levels, search.bounds, node.mesh, node.tokens
    assert isinstance(levels, Uneven)
    named, m = (
        (node.leaf.schedule, node.leaf.virtual),
        search.space.batch // mesh.dp // tokens.micro,
    )
    table, probe = b.table(mesh, node.shape, tokens), b.probe(mesh, *named, m)
    if not isinstance(table, Table) or isinstance(probe, Problem):
        return False
    splits = levels._splits(node, table)
    if not splits:
        return False
    i = rng.randrange(len(splits))
    node = node._replace(leaf=node.leaf._replace(split=splits[i]))
    prediction = search.predict(search.plan(node))
    if not prediction.fits:
        return False
    seconds, num_bytes, _ = measures(prediction)
    leaf, mode, paired = node.leaf, (tokens.mode, tokens.every), node.leaf.schedule in PAIRED
    cut, shards = leaf.zero if leaf.dp_shard > 1 else 0, b.shards(mesh, node.shape, leaf.dp_shard)
    at = b.links.meetings(mesh, node.shape, leaf.dp_shard, cut)
    fold = Shape(ep=node.shape.ep, etp=node.shape.etp)
    endless, whole = b.endless(mesh, node.shape, mode), b.endless(mesh._replace(cp=1), fold, mode)
    assert isinstance(endless, Table) and isinstance(whole, Table)
    least = search.floors(mesh, node.shape, endless, paired=paired)
    size = search.space.micros(mesh).index(tokens.micro)
    once = float(least.once[size])
    every = levels._seconds(node, table, splits, 0, None)
    own = levels._seconds(node, table, splits, cut, at)
    told = (
        search.floors(mesh, fold, whole, mesh.cp, paired).seconds[size],
        search.floors.least(mesh, fold, whole, mesh.cp, paired, seconds),
        least.seconds[size],
        every.min() + once,
        own[i] + once,
        next(levels.played(node._replace(once=once))).seconds,
        next(levels.laid(node._replace(once=once))).seconds,
    )
    for low in told:
        assert low <= seconds * (1 + 1e-9), (prediction.plan, told, seconds)
    stages = stages_of(table, splits)
    for low in (
        least.num_bytes[size],
        least_bytes(probe, stages, shards.states(stages, cut), cut)[i],
    ):
        assert low <= num_bytes * (1 + 1e-9), prediction.plan
    return True


@pytest.mark.parametrize(
    ("model", "cluster", "batch", "count"),
    [
        *in_turn(
            [
                ("llama3-8b", "16xh100", 32, 25),
                ("tiny-moe", "16xh100", 16, 40),
                ("tiny", "laptop", 8, 40),
            ]
        ),
        *in_turn(
            [
                pytest.param("llama3-8b", "32xh100", 64, 60, marks=pytest.mark.slow),
                pytest.param("tiny-moe", "16xh100", 16, 60, marks=pytest.mark.slow),
            ]
        ),
    ],
)
def test_no_bound_of_a_split_is_above_what_simulate_says(model, cluster, batch, count):
    search = uneven(wide(model, cluster, batch))
    rng, meshes, seen = random.Random(3), list(search.space.meshes()), 0
    meshes = [m for m in meshes if m.pp > 1]
    for _ in range(100 * count):
        node = random_leaf(search, rng, meshes)
        seen += node is not None and splits_hold(search, node, rng)
        if seen == count:
            return
    raise AssertionError(f"{seen} of {count} plans fit")


def tight(job: Job, fix: tuple[str, ...], room: float) -> Job:
    """With so many times the memory that the balanced plan of least memory needs."""
    least = measures(searcher(job, fix, FORBID).best(Goal("memory")).plans[0])[1]
    cluster = replace(job.cluster, memory_bytes=int(room * least), memory_limit_fraction=1.0)
    return replace(job, cluster=cluster)


def equals_brute_force(search: Search, goal: Goal, turned: bool = False) -> None:
    """The best of all plans in all splits but the balanced one, and the account of them."""
    other = uneven(search, turned)
    found = other.best(goal, top=3)
    layers, every = search.job.model.layers, 0
    keys = []
    for node in leaves(other):
        made = other.bounds.lies(node.mesh, (node.leaf.schedule, node.leaf.virtual))
        plain = other.predict(other.plan(node)).laid
        at = (
            ()
            if plain is None
            else tuple(sum(n.startswith("blocks.") for n in s.names) for s in plain.stages)
        )
        for split in every_split(layers, made.num_stages):
            if split == at:
                continue
            every += 1
            p = other.predict(other.plan(node._replace(leaf=node.leaf._replace(split=split))))
            keys += [goal.key(*measures(p))] if p.fits else []
    assert found.complete and found.bounded >= 0 and 0 < len(keys) < every
    assert goal.key(*measures(found.plans[0])) == min(keys)
    assert found.bounded + found.simulated + found.rejected.total() == found.considered


LATER = (pytest.mark.slow, pytest.mark.turns(3))
FORBID = ("recompute", "cp", "v_half", "v_min", "zb_h2", "gpipe", "dualpipe", "looped_bfs", "sp")


@pytest.mark.parametrize(
    ("devices", "room", "layers", "fix", "goal"),
    [
        (4, 1.5, 4, ("4mb", "fp32", "pp2"), "time"),
        (4, 1.5, 4, ("2mb", "fp32", "pp2"), "memory"),
        (4, 1.5, 2, ("2mb", "fp32"), "time"),  # pp4, and two stages a rank, of two layers
        pytest.param(4, 2.0, 5, ("4mb", "fp32"), "time", marks=LATER),
        pytest.param(8, 2.0, 5, ("2mb", "fp32"), "time", marks=LATER),
        pytest.param(16, 2.0, 5, ("2mb", "fp32", "zero3"), "time", marks=LATER),
    ],
)
def test_the_best_of_all_splits_is_that_of_brute_force(devices, room, layers, fix, goal):
    job = small(devices, 1e9, layers=layers).job
    equals_brute_force(searcher(tight(job, fix, room), fix, FORBID), Goal(goal))


@pytest.mark.slow
def test_the_best_of_all_splits_and_orders_is_that_of_brute_force():
    job, fix = nodes_of(small(4, 1e9, layers=5).job, 2), ("4mb", "fp32")
    equals_brute_force(searcher(tight(job, fix, 2.0), fix, FORBID), ANY, turned=True)


def test_ends_without_layers_are_stages_of_their_own():
    """Llama 3's layout (Llama Team 2024), of two layers: the fastest of four ranks, which no plan without a
    stated split has."""
    fix, forbid = ("2mb", "bf16"), ("cp", "recompute", "auto", "offload")
    job = small(4, 1e9, layers=2).job
    told = ask(job, Question(fix=fix, forbid=forbid))
    assert told.found.complete and "pp4:" in told.plans[0].plan
    assert told.found.not_searched == () and "not searched" not in counts(told.found)
    assert "pipeline.split=0,1,1,0" in told.plans[0].plan
    plain = ask(job, Question(fix=fix, forbid=(*forbid, "split")))
    assert measures(plain.plans[0])[0] > measures(told.plans[0])[0]
    (tiny,) = ask(job, Question(top=1, fix=("pp4", *fix), forbid=forbid)).plans
    assert tiny.fits
    full = replace(job, cluster=replace(job.cluster, memory_bytes=10**5))
    said = ask(full, Question(fix=("pp4", *fix), forbid=forbid)).texts
    assert "the least memory found is pp4:" in said[0]


def test_a_split_makes_fit_what_else_does_not():
    job, fix = small(4, 1e9).job, ("2mb", "fp32", "pp2:zb_v")
    search = searcher(job, fix, FORBID)
    limit = measures(search.best(Goal("memory")).plans[0])[1]
    found = uneven(search).best(Goal("memory"))
    assert measures(found.plans[0])[1] < limit
    search = searcher(tight(job, fix, 1 - 1 / limit), fix, FORBID)
    assert not search.best(ANY).plans and uneven(search).best(ANY).plans


@pytest.mark.parametrize("slow", [1, 2])
def test_a_split_that_needs_no_host_beats_what_fits_only_with_it(slow):
    nodes = [
        {"count": 1, "device": "a100", "devices": 1},
        {"count": slow, "device": "h100", "devices": 1},
    ]
    link = {"name": "ib", "devices": 1 + slow, "bytes_per_s": 2e9, "latency_s": 5e-6}
    cluster = {"name": "two", "memory_bytes": 125_227_633, "nodes": nodes, "links": [link]}
    sizes = {"heads": 2, "kv_heads": 2, "hidden": 256, "ffn_hidden": 96, "vocab": 16384}
    model = {"preset": "tiny", "layers": 5, **sizes}
    job = Job.of(model, cluster, "", global_batch_size=4, seq_len=96)
    forbid = ("recompute", "auto", *FORBID[1:])
    told = ask(job, Question(top=3, fix=("pp2:1f1b", "bf16", "1mb"), forbid=forbid))
    lines = [f"pp2:1f1b/1mb bf16 pipeline.split={n},{5 - n}" for n in range(6)]
    keys = [measures(p) for p in map(simulate, map(job.with_plan, lines)) if p.fits]
    assert 0 < len(keys) < 6 and measures(told.plans[0])[:2] <= min(keys)[:2]
    assert len({p.plan for p in told.plans}) == len(told.plans) and told.found.by_rates


def test_what_was_not_looked_at_for_want_of_time_is_not_proven():
    job, fix = small(4, 1e9).job, ("2mb", "fp32", "pp2")
    search = searcher(job, fix, FORBID)
    told = finished(search, ANY, 1, search.best(ANY), 0.0, every=True)
    assert told.unproven == ("other splits of layers", "schedules made for a plan")
    assert not told.complete and not told.split
    text = (
        "not proven over other splits of layers and schedules made for a plan, proven over all else"
    )
    assert text in counts(told)
    search = searcher(job, fix, (*FORBID, "split"))
    told = finished(search, ANY, 1, search.best(ANY), 0.0, every=True)
    assert told.unproven == ("schedules made for a plan",)
    search = searcher(job, fix, (*FORBID, "split", "auto"))
    assert finished(search, ANY, 1, search.best(ANY), 0.0, every=True).complete
    few = searcher(nodes_of(job, 2), fix, (*FORBID, "split", "auto"))
    told = finished(few, ANY, 1, few.best(ANY), 0.0, every=True)
    assert told.unproven == ("other orders of axes",)
    search = searcher(job, fix, FORBID)
    assert finished(search, ANY, 1, search.best(ANY), 60.0, every=True).complete


def test_no_split_on_many_devices_undercuts_what_is_said():
    job = Job.of("llama3-8b", "32xh100", "", global_batch_size=64, seq_len=2048)
    search = searcher(job, fix=("pp4", "tp2+sp"))
    found = search.best(ANY)
    found.least_s = least_seconds(search, found, 60.0)
    best = found.plans[0].step_time_s
    assert best is not None and 0 < found.least_s < best
    plan = Plan.parse(found.plans[0].plan)
    stages = 4 * plan.pipeline.virtual_stages
    even = tuple(32 // stages for _ in range(stages))
    tried = [search.predict(plan.with_("pipeline", split=split)) for split in [*moved(even)][:12]]
    fit = [measures(p)[0] for p in tried if p.fits]
    assert fit and min(fit) >= found.least_s
    assert f"{format_seconds(found.least_s)} at least" in counts(found)


def test_what_a_proof_is_not_over_is_told():
    few, many = (Job.of("tiny", f"{n}xh100", "", global_batch_size=8, seq_len=64) for n in (4, 64))
    (auto, offload) = not_searched(searcher(few), every=True)
    assert auto == "auto beside another split of layers" and "other splits, auto" in offload
    told, _ = not_searched(searcher(many), every=True)
    assert (
        told == "other orders of axes, splits of layers, made schedules of all but the best plans"
    )
    assert not_searched(searcher(few, forbid=("split", "offload")), every=True) == ()
    assert not_searched(searcher(few, forbid=("pp", "offload")), every=True) == ()
    odd = replace(few, train=replace(few.train, seq_len=66))
    assert not_searched(searcher(odd, forbid=("pp", "offload")), every=True) == (
        "parts of a sequence that do not divide it",
    )
    moe = Job.of("mixtral-8x7b", "16xh100", "", global_batch_size=16, seq_len=64)
    assert "other orders of axes of all" in not_searched(searcher(moe), every=True)[0]
    found = ask(few, Question(top=1, fix=("tp4", "1mb", "bf16"), forbid=("cp", "sp"))).found
    assert found.complete and f"(not searched: {auto}; {offload})" in counts(found)


def test_the_most_that_fits_is_over_splits_too():
    """Of two stages the deepest model has a split of its own; a layer more has no plan at all."""
    model = {
        "preset": "tiny",
        "layers": 3,
        "hidden": 128,
        "heads": 2,
        "kv_heads": 2,
        "vocab": 20000,
    }
    job = Job.of(model, "2xh100", "", global_batch_size=3, seq_len=64)
    job = replace(job, cluster=replace(job.cluster, memory_bytes=10**8))
    words = ("bf16",), ("offload", "recompute", "tp", "cp", "auto")
    told = ask(job, Question(fix=words[0], forbid=words[1], solve="layers")).solved
    assert told is not None and told.value is not None and told.proven, told
    for layers, fits in ((told.value, True), (told.value + 1, False)):
        deeper = replace(job, model=replace(job.model, layers=layers))
        found = ask(deeper, Question("memory", 1, *words)).found
        assert bool(found.plans) == fits and found.complete
    balanced = ask(job, Question(fix=words[0], forbid=(*words[1], "split"), solve="layers")).solved
    assert balanced is not None and balanced.value is not None and balanced.value < told.value


def test_a_front_is_over_splits_too():
    """One of its plans is neither of a balanced split nor a best plan split in another way."""
    job = Job.of("tiny", "3xh100", "", global_batch_size=6, seq_len=64)
    front = ask(
        job,
        Question(
            fix=("1mb", "bf16"), forbid=("offload", "recompute", "cp", "tp"), pareto="time,memory"
        ),
    ).plans
    split = next(p for p in front if p.plan == "pp3:1f1b/1mb bf16 pipeline.split=1,1,0")
    for p in front:
        if p is not split:
            assert any(a < b for a, b in zip(measures(split)[:2], measures(p)[:2], strict=True))

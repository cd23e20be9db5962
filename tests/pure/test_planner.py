"""The search: bounds never above what `simulate` says, and the best plan equal to brute force over it."""

import gc
import random
from collections import Counter
from dataclasses import replace

import pytest
from drawn_plans import random_leaf, wide
from turns import in_turn

from partita.base.errors import Problem, UsageError
from partita.parallel.laid import lay
from partita.parallel.read import flops, kept_bytes, state_bytes, tensor_bytes
from partita.planner.answers.ask import Question
from partita.planner.bounds.bound import ENDLESS
from partita.planner.bounds.exact import laid_memory, laid_seconds
from partita.planner.bounds.reading import cost_of
from partita.planner.bounds.rough import PAIRED, Rough
from partita.planner.bounds.table import Table, probe_of
from partita.planner.search.search import (
    ANY,
    RARELY,
    Goal,
    Node,
    Search,
    measures,
    rarely_collected,
    searcher,
)
from partita.planner.space import VIRTUAL, Leaf, MeshChoice, Shape, Tokens, Words
from partita.schedule.make import schedule
from partita.simulate.inside import transient_bytes
from partita.simulate.memory import read_later_bytes
from partita.simulate.predict import request_of, simulate
from partita.simulate.stage import Work, stage_time, works_of
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.plan import Plan
from partita.spec.program import distinct

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


def told_hold(search: Search, node: Node, seconds: float, num_bytes: float) -> bool:
    """The same of bounds that another way to lay experts tells of a cut sequence, whose own table is not laid
    yet; False where none is told."""
    b, floors, mesh, shape, leaf = search.bounds, search.floors, node.mesh, node.shape, node.leaf
    fold, mode = Shape(ep=shape.ep, etp=shape.etp), (node.tokens.mode, node.tokens.every)
    endless = Tokens(*mode, ENDLESS)
    for other in search.space.shapes(mesh) if mesh.cp > 1 else ():
        if other != shape and other._replace(ep=shape.ep, etp=shape.etp) == shape:
            for tokens in (endless, Tokens(micro=ENDLESS)):
                b.table(mesh, other, tokens)
                b.table(mesh._replace(cp=1), fold, tokens)
            break
    table, parts, paired = b.rings.told(mesh, shape, endless), mesh.cp, leaf.schedule in PAIRED
    if table is None:
        return False
    named, at = (leaf.schedule, leaf.virtual), search.space.micros(mesh).index(node.tokens.micro)
    lies = b.lies(mesh, named)
    least = floors(mesh, shape, table, parts, paired)
    told = floors.kinds(mesh, table, least, floors.schedules(mesh, paired), parts)
    b.probe(mesh, *named, search.space.batch // mesh.dp // node.tokens.micro)
    filled = floors.held(mesh, named, floors.kind(mesh, shape, table, named, parts), least)
    assert filled is not None
    for low in (
        b.evenly(mesh, table, paired, parts),
        floors.fewer_parts(mesh, shape, mode, paired, 1e30),
        floors.fewer_parts(mesh, shape, mode, paired, seconds * (1 + 1e-9)),
        least.seconds[at],
        told.seconds[int(lies.split), told.row[lies.kind]][at],
        told.under(lies, least, filled <= b.limit_bytes)[at],
    ):
        assert low <= seconds * (1 + 1e-9), search.plan(node)
    for low in (least.num_bytes[at], filled.min(0)[at]):
        assert low <= num_bytes * (1 + 1e-9), search.plan(node)
    assert b.rings.told(mesh, shape, endless) is table  # it was not laid for this
    return True


def bounds_hold(search: Search, node: Node) -> Counter[str]:
    """Holds each bound of time and of memory against `simulate`; empty where the plan does not fit, else one
    that fits, and whether any was told."""
    b, mesh, shape, tokens, leaf = search.bounds, node.mesh, node.shape, node.tokens, node.leaf
    job = search.job.with_plan(search.plan(node))
    prediction = simulate(job)
    if not prediction.fits:
        return Counter()
    seconds, num_bytes, _ = measures(prediction)
    seen = Counter(fit=1, told=int(told_hold(search, node, seconds, num_bytes)))
    m, cut = job.plan.num_microbatches, leaf.zero if leaf.dp_shard > 1 else 0
    named, way = (leaf.schedule, leaf.virtual), (cut, b.shards(mesh, shape, leaf.dp_shard))
    table, probe = b.table(mesh, shape, tokens), b.probe(mesh, *named, m)
    fold, mode = Shape(ep=shape.ep, etp=shape.etp), (tokens.mode, tokens.every)
    endless, whole = b.endless(mesh, shape, mode), b.endless(mesh._replace(cp=1), fold, mode)
    assert isinstance(table, Table) and isinstance(endless, Table) and isinstance(whole, Table)
    assert not isinstance(probe, Problem)
    num_stages, micros = probe.chunks.shape[-1], search.space.micros(mesh)
    paired = leaf.schedule in PAIRED
    stages, at = b.stages(table, num_stages), micros.index(tokens.micro)
    least = search.floors(mesh, shape, endless, paired=paired)
    step = b.step(mesh, named, m, num_stages)
    laid = lay(request_of(job))
    laid_s = laid_seconds(laid, search.machine, step, m, b.turns(mesh))
    laid_bytes = laid_memory(laid, probe, search.machine.cluster)
    meetings = b.links.meetings(mesh, shape, leaf.dp_shard, cut)
    schedules = [x for x in search.space.schedules(mesh) if (x[0] in PAIRED) == paired]
    told = search.floors.kinds(mesh, endless, least, schedules)
    kind = search.floors.kind(mesh, shape, endless, named)
    filled = search.floors.held(mesh, named, kind, least)
    assert filled is not None
    fits = filled <= b.limit_bytes
    lies = b.lies(mesh, named)
    slower = b.sharded(table, num_stages, meetings, cut)
    held = probe.held
    turns = b.turns(mesh)
    once = turns.once * b.update(stages, held, *way) + b.reduced(stages, held, meetings, cut)
    for low in (
        b.coarse(mesh),
        b.coarse(mesh, shape, paired),
        search.floors(mesh, fold, whole, mesh.cp, paired).seconds[at],
        search.floors.fewer_parts(mesh, shape, mode, paired, 1e30),
        search.floors.fewer_parts(mesh, shape, mode, paired, seconds * (1 + 1e-9)),
        search.floors.least(mesh, fold, whole, mesh.cp, paired, seconds * (1 + 1e-9)),
        told.seconds[int(lies.split)][told.row[lies.kind], at],
        told.under(lies, least, fits)[at],
        least.seconds[at],
        search.levels.plain(node, endless, num_stages),
        b.quick(table, mesh, named, m)(meetings, cut) + once,
        b.pipeline(slower, mesh, named, m, table.sent) + once,
        b.played(slower, mesh, named, m, table.sent) + once,
        laid_s,
    ):
        assert not isinstance(low, Problem) and low <= seconds * (1 + 1e-9), job.plan
    if not search.machine.cluster.cores_shared:
        assert laid_s == pytest.approx(seconds, rel=5e-3), job.plan
    for low in (
        least.num_bytes[at],
        filled.min(0)[at],
        b.memory(endless, probe, *way, tokens.micro / ENDLESS),
        b.memory(table, probe, *way),
        laid_bytes,
    ):
        assert low <= num_bytes * (1 + 1e-9), job.plan
    return seen


def hold_many(search: Search, seed: int, count: int) -> None:
    """So many random plans that fit, of a hundred times as many tried at most; with experts, of a tenth of
    them more is told before they are laid."""
    rng, meshes, seen = random.Random(seed), list(search.space.meshes()), Counter[str]()
    for _ in range(100 * count):
        if (node := random_leaf(search, rng, meshes)) is not None:
            seen += bounds_hold(search, node)
        if seen["fit"] == count:
            break
    assert seen["fit"] == count
    assert (10 * seen["told"] >= count) == bool(search.space.model.experts)


@pytest.mark.parametrize(
    ("model", "cluster", "batch", "count"),
    in_turn(
        [
            ("llama3-8b", "32xh100", 64, 40),
            ("mixtral-8x7b", "16xh100", 32, 40),
            ("tiny-moe", "16xh100", 16, 60),
            ("tiny", "laptop", 8, 100),
        ]
    ),
)
def test_no_bound_is_above_what_simulate_says(model, cluster, batch, count):
    hold_many(wide(model, cluster, batch), 7, count)


@pytest.mark.parametrize("word", ["pp4:v_2_3", "pp2:chimera"])
def test_schedules_that_are_fixed_alone_have_bounds(word):
    hold_many(searcher(wide("tiny", "8xh100", 16).job, fix=(word,)), 7, 8)


@pytest.mark.slow
@pytest.mark.turns(2)
@pytest.mark.parametrize(("model", "seed"), [("tiny", 1), ("tiny-moe", 2)])
def test_no_bound_of_many_plans_is_above_what_simulate_says(model, seed):
    hold_many(wide(model, "32xh100", 32), seed, 100)


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


def three_heads() -> Search:
    """With meshes whose groups of tp lie on a node, or across two, as replicas go."""
    job = wide("tiny-moe", "24xh100", 24, layers=3).job
    spec = replace(job.model, hidden=96, heads=6, kv_heads=6, head_dim=16)
    return searcher(replace(job, model=spec, train=replace(job.train, seq_len=96)))


@pytest.mark.parametrize("model", ["tiny", "tiny-moe", "bloom-560m", "three heads"])
def test_a_block_laid_once_for_what_it_does_not_depend_on_costs_what_each_plan_does(model):
    rng = random.Random(5)
    search = wide(model, "16xh100", 16, layers=3) if model != "three heads" else three_heads()
    b, meshes, seen = search.bounds, list(search.space.meshes()), set[str]()
    meshes = [m for m in meshes if model != "three heads" or (m.tp == 3 and m.sp)]
    modes = ["none", "selective", "full"]
    for _ in range(12):
        mesh, late = rng.choice(meshes), rng.random() < 0.5
        shape = rng.choice(search.space.shapes(mesh))
        rng.shuffle(modes)
        for mode in modes:
            tokens = Tokens(mode, 1, ENDLESS if late else 2)
            table = b.laid_table(mesh, shape, tokens)
            if isinstance(table, Problem):
                continue
            laid = lay(b.asked(mesh, shape, tokens))
            blocks, sizes, known = laid.stages[0].blocks, laid.sizes, {}
            parts = works_of(laid).stages[0].parts
            for (block, _), part in zip(distinct(blocks), parts, strict=True):
                work = Work((replace(part, times=1),), (), Counter())
                known[id(block)] = cost_of(stage_time(work, laid, b.machine), late)
            for block, cost in zip(blocks, table.blocks, strict=True):
                own = known[id(block)]
                assert (cost.row[:3], cost.travel, cost.rooms) == (
                    own.row[:3],
                    own.travel,
                    own.rooms,
                )
                assert cost.kept == kept_bytes(block, sizes)
                assert cost.read == read_later_bytes(block, sizes)
                assert cost.inside == transient_bytes(block, sizes)
                assert cost.sent == tensor_bytes(block.tensors[block.output], sizes)
            assert table.flops == tuple(sum(flops(x, sizes).values()) for x in blocks)
            assert table.total[5:11].sum() == pytest.approx(
                sum(sum(state_bytes(x, sizes).values()) for x in blocks)
            )
            seen.add(mode)
    assert seen == set(modes)


def test_where_stages_lie_is_what_the_schedules_say():
    for name, virtual in (
        *((n, 1) for n in ("1f1b", "gpipe", "zb_h1", "zb_h2", "dualpipe", "chimera")),
        *((n, 2) for n in ("zb_v", "v_half", "v_min", "v_2_3", "dualpipev")),
        *((n, v) for n in VIRTUAL for v in (2, 3)),
    ):
        made = schedule(name, num_ranks=4, num_microbatches=16, virtual_stages=virtual)
        rough, probe = Rough(name, 4, virtual), probe_of(made)
        assert rough.split == probe.split and rough.num_stages == probe.chunks.shape[-1], name
        assert rough.held.tolist() == probe.held.tolist(), name
        assert all(rough.share == share for share in probe.share), name


def test_the_bounds_of_all_schedules_at_once_are_those_of_each():
    for search, shape in (
        (searcher(Job.of("llama3-8b", "32xh100", "", global_batch_size=64, seq_len=2048)), Shape()),
        (searcher(Job.of("mixtral-8x7b", "16xh100", "", **H100)), Shape(ep=2)),
    ):
        b, mesh = search.bounds, MeshChoice(4, 2, 1, 2, True)
        table = b.endless(mesh, shape, ("none", 1))
        assert isinstance(table, Table)
        sizes, schedules = b.sizes(mesh), search.space.schedules(mesh)
        kinds, send = b.kinds(mesh, table, schedules), 0.01 * sizes
        samples = search.space.batch // mesh.dp
        told = kinds(table, 0.25, sizes, samples, send)
        for leaf in schedules:
            lies = b.lies(mesh, leaf)
            each = lies.bounds(
                b.stages(table, lies.num_stages), 0.25 * sizes, samples / sizes, send
            )
            for mine, alone in zip(told, each, strict=True):
                assert mine[kinds.place[lies.kind]] == pytest.approx(alone, rel=1e-9), leaf


FEWER = ("v_half", "v_min", "dp_replicate", "zero1", "gpipe", "looped_bfs")
BRUTE = small(4, 2e6, fix=("2mb",), forbid=FEWER)


def equals_brute_force(search: Search, goal: Goal) -> None:
    """The search's answer, and its account of the space, beside every plan simulated."""
    every = leaves(search)
    found = search.best(goal, top=3)
    fit = [p for p in (search.predict(search.plan(node)) for node in every) if p.fits]
    assert found.complete and found.considered == len(every)
    assert goal.key(*measures(found.plans[0])) == min(goal.key(*measures(p)) for p in fit)
    assert found.bounded + found.simulated + found.rejected.total() == len(every)
    assert 0 < len(fit) < len(every), "the limit of memory must bind for some"


@pytest.mark.parametrize("name", ["time", "memory", "devices", "cost"])
def test_the_best_of_a_small_cluster_is_that_of_brute_force(name):
    equals_brute_force(BRUTE, Goal(name, price=2e-4))


def test_plans_of_fewer_devices_than_divide_a_cluster_are_among_those_of_brute_force():
    words = {"fix": ("2mb",), "forbid": ("pp", "cp", "dp_replicate")}
    search = small(6, 1.5e6, **words)
    every = [small(n, 1.5e6, **words) for n in range(1, 7)]
    plans = {str(each.plan(node)) for each in every for node in leaves(each)}
    fit = [p for p in (search.predict(Plan.parse(line)) for line in plans) if p.fits]
    found, best = search.best(ANY), min(fit, key=lambda p: ANY.key(*measures(p)))
    assert found.complete and found.considered == len(plans)
    assert ANY.key(*measures(found.plans[0])) == ANY.key(*measures(best))
    assert 0 < len(fit) < len(plans) and measures(best)[2] == 4


def test_seven_devices_are_no_slower_than_six():
    six, seven = (small(n, 2e6, fix=("2mb",), forbid=FEWER).best().plans[0] for n in (6, 7))
    assert seven.step_time_s == six.step_time_s and measures(six)[2] > 1


def sparse(devices: int, memory: float, **words: tuple[str, ...]) -> Search:
    """Of a small model with experts behind a layer without."""
    search = wide("tiny-moe", f"{devices}xh100", 8, layers=4)
    cluster = replace(search.job.cluster, memory_bytes=int(memory))
    return searcher(replace(search.job, cluster=cluster), **words)


@pytest.mark.slow
@pytest.mark.turns(3)
@pytest.mark.parametrize(
    "search",
    [
        small(8, 1.2e6, fix=("2mb",), forbid=("cp", "recompute")),
        small(16, 8e5, fix=("1mb",), forbid=("cp", "recompute", "zero2", "interleaved_zb")),
        sparse(8, 2.8e6, fix=("1mb",), forbid=("cp", "recompute", "zero2", "etp", "looped_bfs")),
    ],
    ids=["8", "16", "8-experts"],
)
def test_the_best_of_more_devices_is_that_of_brute_force(search):
    equals_brute_force(search, ANY)


def test_words_restrict_the_space():
    fixed = small(8, 1e9, fix=("tp2+sp", "pp2:1f1b", "recompute:full"), forbid=("cp", "zero3"))
    for node in leaves(fixed):
        plan = fixed.plan(node)
        assert (plan.mesh.tp, plan.mesh.sp, plan.mesh.pp, plan.mesh.cp) == (2, True, 2, 1)
        assert plan.pipeline.schedule == "1f1b" and plan.recompute.mode == "full"
        assert plan.mesh.dp_shard == 1 or plan.data.zero_stage != 3
    assert leaves(fixed)
    named = small(4, 1e9, fix=("ulysses",))
    cut = [named.plan(n) for n in leaves(named)]
    assert cut and all(p.mesh.cp > 1 and p.context.method == "ulysses" for p in cut)
    for wrong in ({"fix": ("tp",)}, {"forbid": ("tp2+sp",)}, {"fix": ("tensor8",)}):
        with pytest.raises(UsageError):
            Words.of(**wrong)


def test_words_that_contradict_each_other_are_refused():
    job, dtypes = small(4, 1e9).job, ("fp64", "fp32", "bf16", "fp16", "fp8")
    other = "order:pp,tp,cp,dp_shard,dp_replicate"
    for fix, forbid, text in (
        (("bf16", "fp8"), (), "bf16 and fp8 are both asked for: a plan has one precision"),
        (("offload:cpu", "offload:nvme"), (), "a plan has one offload"),
        ((other, "order:tp,pp,cp,dp_shard,dp_replicate"), (), "one order of axes"),
        (("offload:cpu",), ("offload",), "offload cpu is fixed and forbidden"),
        ((), dtypes, "--forbid leaves no precision"),
    ):
        with pytest.raises(UsageError, match=text):
            searcher(job, fix, forbid)
    assert searcher(job, ("bf16", "bf16")).space.dtype == "bf16"
    assert searcher(job, (), ("bf16",)).space.dtype == "fp32"
    for asked in (
        Question(precision=("bf16", "fp8"), forbid=("bf16",)),
        Question(fix=("fp8",), precision=("fp32",)),
    ):
        with pytest.raises(UsageError, match="is not what --fix and --forbid leave"):
            asked.search(job)


def test_a_budget_of_nothing_is_said():
    found = small(8, 1e9).best(ANY, budget_s=0.0)
    assert not found.complete and found.plans == []


def test_a_search_looks_for_cycles_rarely_and_leaves_the_collector_as_it_was():
    before = gc.get_threshold()
    with pytest.raises(KeyError), rarely_collected():
        assert gc.get_threshold()[0] >= RARELY
        raise KeyError
    small(2, 1e5).best()
    assert gc.get_threshold() == before
    gc.set_threshold(0)
    try:
        with rarely_collected():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_nothing_fits_where_memory_holds_no_layer():
    found = small(2, 1e5).best()
    assert found.complete and not found.plans and found.rejected["memory"]

"""Beyond the search: axes in another order on the links, equal to brute force over every order."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise, permutations, product

import pytest
from drawn_plans import wide
from test_planner import bounds_hold, hold_many, leaves, small
from turns import in_turn

from partita.base.errors import UsageError
from partita.planner.answers.ask import Question, ask
from partita.planner.answers.explain import changes, why
from partita.planner.answers.nearby import allowed, nearby
from partita.planner.answers.solve import goal_of, pareto, solve
from partita.planner.orders import other_orders
from partita.planner.search.beyond import faster_dtype, turned
from partita.planner.search.nodes import Found, Node
from partita.planner.search.search import ANY, Search, measures, searcher
from partita.planner.search.splits import splits
from partita.planner.space import Leaf, MeshChoice, Space, Tokens, Words
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.plan import DEFAULT_ORDER, Plan

LATER = (pytest.mark.slow, pytest.mark.turns(2))
FORBID = ("recompute", "v_half", "v_min", "gpipe", "zb_h1", "zb_v", "dualpipe", "dualpipev")
ORDERS = list(permutations(DEFAULT_ORDER))


def nodes_of(job: Job, each: int) -> Job:
    """On nodes of so many devices, joined by a slow network."""
    links = job.cluster.links
    near = replace(links[0], devices=each)
    far = replace(near, name="far", devices=job.cluster.devices, bytes_per_s=2e9, latency_s=5e-6)
    return replace(job, cluster=replace(job.cluster, devices_per_node=each, links=(near, far)))


def others(search: Search) -> Search:
    space = search.space
    return Search(Space(space.job, space.words, space.dtype, turned=True))


@pytest.mark.parametrize(
    "question", in_turn([("tiny-moe", "16xh100", 16), ("tiny", "32xh100", 8)]), ids=str
)
def test_no_bound_is_above_what_simulate_says_in_any_order(question):
    base = wide(*question, layers=4)
    hold_many(others(searcher(nodes_of(base.job, 4))), 5, 12)


@pytest.mark.parametrize(
    ("devices", "each", "fix"),
    [
        (4, 2, ("4mb", "fp32")),
        pytest.param(8, 4, ("1mb", "fp32"), marks=LATER),
        pytest.param(8, 2, ("1mb", "fp32"), marks=LATER),
    ],
)
def test_the_best_of_all_orders_is_that_of_brute_force(devices, each, fix):
    job = nodes_of(small(devices, 3e6).job, each)
    search = searcher(job, fix, (*FORBID, "cp") if devices > 4 else FORBID)
    found = turned(search, ANY, 1, search.best(ANY), 60.0)
    keys = []
    for node in leaves(search):
        plan = search.plan(node)
        named = {tuple(a for a in order if plan.sizes[a] > 1): order for order in ORDERS}
        for order in named.values():
            p = search.predict(plan.with_("mesh", order=order))
            keys += [ANY.key(*measures(p))] if p.fits else []
    assert found.complete and ANY.key(*measures(found.plans[0])) == min(keys)
    assert found.bounded + found.simulated + found.rejected.total() == found.considered
    line = f"{found.plans[0].plan} offload:cpu"  # other orders need none of it
    seen = Found([search.predict(Plan.parse(line).with_("mesh", order=DEFAULT_ORDER))])
    again = turned(search, ANY, 1, seen, 60.0)
    assert "offload" in line and "offload" not in again.plans[0].plan


def test_more_devices_turn_the_best_plans_and_words_say_which_orders():
    job = nodes_of(small(32, 1e9).job, 4)
    words, forbid = ("1mb", "fp32", "tp4+sp", "pp2:1f1b"), ("cp", "recompute")
    search = searcher(job, words, forbid)
    plain = search.best(ANY)
    found = turned(search, ANY, 1, search.best(ANY), 30.0)
    assert found.turned and measures(found.plans[0])[0] <= measures(plain.plans[0])[0]
    assert any(r.choice.startswith("order:") for r in why(job, found.plans[0]))
    front = pareto(search, "time", "memory", 400.0).plans
    assert measures(front[0])[0] <= measures(found.plans[0])[0]
    assert solve(job, "devices", lambda j: searcher(j, words, forbid), 400.0).found.turned
    without = searcher(job, words, (*forbid, "order"))
    assert not turned(without, ANY, 1, without.best(ANY), 30.0).turned
    order = "pp,tp,cp,dp_shard,dp_replicate"
    stated = searcher(job, (*words, f"order:{order}"), forbid)
    told = turned(stated, ANY, 1, stated.best(ANY), 30.0)
    assert told.complete and not told.turned and all(order in p.plan for p in told.plans)
    with pytest.raises(UsageError):
        Words.of(("order:tp,pp",))


def test_axes_that_one_link_joins_may_trade_places():
    links = nodes_of(small(16, 1e9).job, 4).cluster
    assert other_orders((2, 2, 1, 1, 4), Cluster.load("16xh100")) != ()
    inside = other_orders((2, 2, 1, 1, 4), links)
    assert ("cp", "tp", "dp_shard", "dp_replicate", "pp") not in inside and len(inside) == 3
    assert other_orders((2, 2, 1, 1, 2), Cluster.load("8xh100")) == ()


def every_split(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """All splits of layers; an end may have none."""
    for cuts in product(range(layers + 1), repeat=stages - 1):
        split = tuple(b - a for a, b in pairwise((0, *cuts, layers)))
        if min(split) >= 0 and all(split[1:-1]):
            yield split


@pytest.mark.parametrize(
    ("words", "layers", "memory"),
    [
        (("pp2:1f1b", "4mb", "fp32"), 6, 1e9),
        pytest.param(("pp4:zb_h1", "8mb", "fp32"), 7, 1e9, marks=LATER),
        (("pp2:interleaved_1f1bx2", "4mb", "fp32"), 5, 1e9),
        (("pp4:1f1b", "2mb", "fp32"), 5, 1e8),
        pytest.param(("pp4:gpipe", "8mb", "fp32"), 6, 5.4e6, marks=LATER),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else str(x),
)
def test_the_split_of_a_plan_is_that_of_brute_force(words, layers, memory):
    devices = 16 if memory == 1e8 else 4  # of more devices a few splits: here too the best
    search = searcher(small(devices, memory, layers=layers).job, words, ("cp", "recompute", "tp"))
    plain = search.best(ANY)
    base = Plan.parse(plain.plans[0].plan)
    found = splits(search, ANY, 1, search.best(ANY), 60.0)
    stages = base.mesh.pp * base.pipeline.virtual_stages
    every = (base.with_("pipeline", split=s) for s in every_split(layers, stages))
    keys = [ANY.key(*measures(p)) for p in map(search.predict, every) if p.fits]
    assert ANY.key(*measures(found.plans[0])) == min(keys) and found.split


def test_the_best_precision_of_those_named_is_chosen():
    job, words = small(4, 1e9).job, (("2mb", "pp2:1f1b"), ("cp", "recompute"))
    alone = [searcher(job, (*words[0], d), words[1]).best(ANY) for d in ("fp32", "bf16", "fp8")]
    least = min(ANY.key(*measures(f.plans[0])) for f in alone)
    forbid = (*words[1], "order", "split", "offload")
    told = ask(job, Question("time", 1, words[0], forbid, precision=("fp32", "bf16", "fp8")))
    assert ANY.key(*measures(told.plans[0])) == least and told.found.complete
    assert told.found.considered == sum(f.considered for f in alone)
    with pytest.raises(UsageError, match="int3"):
        ask(job, Question(precision=("int3",)))


def test_no_change_keeps_a_stage_of_zero_that_has_nothing_to_cut():
    job = small(4, 1e9).job
    found = [str(p) for _, p in changes(job, Plan.parse("dp_shard4.zero2 2mb fp32"))]
    assert "dp_replicate4 2mb" in found and not any("zero_stage" in line for line in found)


def test_what_is_better_by_one_choice_is_taken_where_nothing_is_proven():
    search = searcher(small(4, 1e9).job, ("fp32",), ("recompute", "pp"))
    before = search.predict(Plan.parse("dp_replicate4 2mb"))
    assert before.fits
    found = nearby(search, ANY, 1, Found([before], complete=False), 60.0)
    best = found.plans[0]
    assert found.near and measures(best)[0] < measures(before)[0]
    near = [plan for _, plan in changes(search.job, Plan.parse(best.plan))]
    fit = [
        p for p in map(search.predict, filter(partial(allowed, search.space.words), near)) if p.fits
    ]
    assert fit and min(ANY.key(*measures(p)) for p in fit) >= ANY.key(*measures(best))
    assert not any(allowed(search.space.words, Plan.parse(x)) for x in ("pp2:1f1b/2mb", "2mb bf16"))
    done = search.best(ANY)
    assert nearby(search, ANY, 1, done, 60.0) is done and not done.near


@pytest.mark.parametrize(
    ("model", "words", "lora"),
    [
        ("llama3-8b", ("blocks.2.*", "blocks.3.*"), {}),
        ("tiny-moe", ("blocks.0.*",), {}),
        ("llama3-8b", (), {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": ("wq", "wv")}),
    ],
)
def test_no_bound_is_above_what_simulate_says_of_weights_partly_frozen(model, words, lora):
    """Patterns name layers by their place, and ZeRO 1 and 2 gather no weight that is frozen."""
    job = wide(model, "16xh100", 16, 4).job
    job = replace(job, model=replace(job.model, **lora), train=replace(job.train, frozen=words))
    hold_many(searcher(job), 7, 8)


def test_zero_gathers_no_frozen_expert_after_an_update():
    """Adapters of attention alone: the largest unit, of experts, never travels under ZeRO 1 and 2."""
    job = wide("mixtral-8x7b", "16xh100", 16, 4).job
    lora = {"lora_rank": 8, "lora_alpha": 16.0, "lora_targets": ("wq", "wv")}
    search = searcher(replace(job, model=replace(job.model, **lora)))
    mesh = MeshChoice(1, 2, 4, 2, True)
    shapes = search.space.shapes(mesh)
    shape = next(s for s in shapes if (s.method, s.ep, s.etp) == ("ulysses", 8, 1))
    for zero in (1, 2):
        leaf = Leaf("1f1b", 1, 2, zero)
        assert bounds_hold(search, Node(4, 0.0, 0.0, 1, mesh, shape, Tokens("none", 1, 1), leaf))


def test_fp32_is_looked_at_where_the_best_plan_is_faster_in_it(monkeypatch):
    search = small(2, 1e9, fix=("1mb",), forbid=("pp", "cp"))
    found, real = search.best(), search.predict
    seconds = measures(found.plans[0])[0]

    def told(share: float, searched: Search = search, goal: str = "time") -> tuple[str, ...]:
        def predict(plan: Plan):
            assert plan.precision.dtype == "fp32"
            return replace(real(plan), step_time_s=share * seconds)

        monkeypatch.setattr(searched, "predict", predict)
        return faster_dtype(searched, goal_of(search.job, goal), found)

    assert told(0.9) == ("fp32",) and told(0.995) == told(0.9, goal="memory") == ()
    assert told(0.9, searcher(search.job, fix=("bf16",))) == ()
    assert told(0.9, searcher(search.job, fix=("fp32",))) == ()


def test_a_better_change_that_words_leave_out_is_told_as_that():
    job = small(2, 1e9).job
    forbid = ("pp", "cp", "tp", "order", "offload", "recompute")
    told = ask(job, Question("time", 1, ("4mb", "fp32"), forbid)).texts
    fewer = next(t for t in told if t.startswith("4mb: ") and "2mb" in t)
    assert "(-" in fewer and fewer.endswith("it was not among the choices")
    slower = [t for t in told if "(+" in t]
    assert slower and not any("not among" in t for t in slower)
    free = ask(job, Question("time", 1, ("fp32",), forbid)).texts
    assert not any("not among" in t for t in free if not t.startswith("fp32"))

"""`auto` among the planner's schedules: what is predicted is what runs, bounds hold, brute force agrees."""

import random
from dataclasses import replace

import pytest
from drawn_plans import random_leaf, wide
from test_planner import leaves, small
from turns import in_turn

import partita as pt
from partita.base.errors import Problem, UsageError
from partita.base.units import format_seconds
from partita.parallel.pp.rules import schedule_of
from partita.planner.answers.anew import anew
from partita.planner.answers.explain import changes, why
from partita.planner.bounds.table import Table
from partita.planner.search.made import LIE, MARGIN, MOST, Made, MadeSpace, made
from partita.planner.search.nodes import Node
from partita.planner.search.search import ANY, Goal, Search, measures, searcher
from partita.planner.search.splits import finished
from partita.planner.space import Leaf, Shape, Tokens
from partita.simulate.predict import simulate
from partita.spec.plan import Plan
from partita.spec.plan_table import from_toml, to_toml
from partita.spec.stage_costs import read_costs, write_costs

LINE = "pp4:auto/8mb pipeline.costs=78_92_70x5,97_115_88x2,90_90_76,1 pipeline.limit=9"


def test_costs_in_a_line_are_read_as_they_are_written():
    stages, send = read_costs(("33_35_32x3", "36_39_36", "2"))
    assert stages == ((33, 35, 32),) * 3 + ((36, 39, 36),) and send == (2, 0)
    assert write_costs(stages, send) == ("33_35_32x3", "36_39_36", "2")
    assert write_costs(stages, (0, 0)) == ("33_35_32x3", "36_39_36")
    assert read_costs(()) == ((), (0, 0))
    assert read_costs(("33_35_32x3", "50_40"))[1] == (50, 40)
    assert write_costs(stages, (50, 40)) == ("33_35_32x3", "36_39_36", "50_40")
    assert write_costs(stages, (50, 30)) == ("33_35_32x3", "36_39_36", "50")  # nobody waits
    with pytest.raises(ValueError, match="taken for 9 of the 8"):
        read_costs(("33_35_32", "8_9"))
    plan = Plan.parse(LINE)
    assert str(plan) == LINE and from_toml(to_toml(plan)) == plan
    for wrong in ("2", "1_2", "2,1_2_3", "0_0_0", "1_2_3x0", "1_2_3,x"):
        with pytest.raises(UsageError):
            Plan.parse(f"pp4:auto/8mb pipeline.costs={wrong}")


def test_a_line_of_stated_costs_is_one_schedule_within_its_limit():
    plan = Plan.parse(LINE)
    found = schedule_of(plan)
    assert found.name == "auto" and found.num_stages == 8 and found == schedule_of(plan)
    for actions in found.ranks:
        now = most = 0
        for _, kind, _ in actions:
            now += (kind == "F") - (kind == "W")
            most = max(most, now)
        assert most <= 9
    loose = schedule_of(plan.with_("pipeline", limit=0))
    assert loose != found
    line = schedule_of(plan.with_("pipeline", costs=("1_1_1x4",), limit=4))
    assert line.num_stages == 4
    job = pt.Job.of("tiny", "4xh100", LINE, global_batch_size=8, seq_len=64)
    told = simulate(replace(job, model=replace(job.model, layers=8)))
    assert told.schedule == found and not told.problems
    other = simulate(job.with_plan("pp4:1f1b/8mb pipeline.limit=4"))
    assert [p.rule for p in other.problems if p.severity == "error"] == ["costs"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ("pipeline.limit=2", "pipeline.limit=2 counts stage-microbatches"),
        ("pipeline.costs=1_1_1x8 pipeline.limit=1", "holds 2 stage-microbatches on a rank"),
        ("pipeline.costs=1_1_1x6", "needs pipeline.costs of 4 or 8 stages; 6 are stated"),
        ("pipeline.costs=1_1_1x9999", "9999 are stated"),
    ],
)
def test_costs_and_limits_of_no_schedule_are_refused_before_one_is_looked_for(
    fields, told, monkeypatch
):
    monkeypatch.setattr("partita.schedule.make.auto.synthesise", None)
    job = pt.Job.of("tiny", "4xh100", f"pp4:auto/8mb {fields}", global_batch_size=8, seq_len=64)
    job = replace(job, model=replace(job.model, layers=8))
    wrong = [p for p in simulate(job).problems if p.severity == "error"]
    assert [p.rule for p in wrong] == ["schedule"] and told in wrong[0].message
    assert not simulate(job.with_plan(str(wrong[0].nearest))).problems
    with pytest.raises(UsageError):
        Plan.parse("pp4:auto/8mb pipeline.costs=1_1_1x999999")


def made_of(search: Search) -> Search:
    space = search.space
    return Search(MadeSpace(space.job, space.words, space.dtype), Made)


def level(search: Search, node: Node) -> float | None:
    """What `simulate` says of a plan made for its stages, each bound of which holds: those of the node of
    the placement that it has. None where none fits."""
    levels, b = search.levels, search.bounds
    if not isinstance(b.table(node.mesh, node.shape, node.tokens), Table):
        return None
    node = node._replace(level=5)
    made_so = list(levels.laid(node))
    if not made_so:
        return None
    prediction = search.predict(search.plan(made_so[0]))
    if not prediction.fits:
        return None
    seconds, num_bytes, _ = measures(prediction)
    others = [node._replace(leaf=node.leaf._replace(schedule=n)) for n in LIE[node.leaf.virtual]]
    for other in others:  # one and the same
        assert search.plan(next(levels.laid(other))) == search.plan(made_so[0])
    assert prediction.schedule is not None
    (same,) = [x for x in others if placed(search, x) == prediction.schedule.placement]
    for low, low_bytes in bounds(search, same):
        assert low <= seconds * (1 + 1e-9) and low_bytes <= num_bytes * (1 + 1e-9), prediction.plan
    return seconds


def placed(search: Search, node: Node) -> tuple[int, ...]:
    """The rank of each stage."""
    held = search.bounds.lies(node.mesh, (node.leaf.schedule, node.leaf.virtual)).held.tolist()
    rank = {s: r for r, mine in enumerate(held) for s in mine}
    return tuple(rank[s] for s in range(len(rank)))


def bounds(search: Search, node: Node) -> list[tuple[float, float]]:
    """Seconds and bytes by every level on the way to a plan."""
    levels, tokens = search.levels, node.tokens
    told = [x for step in (levels.played, levels.laid) for x in step(node)]
    assert len(told) == 2, "it fits"
    start = node._replace(level=2, seconds=0.0, tokens=tokens._replace(micro=1))
    rough = [x for x in levels.rough(start) if x.leaf[:2] == node.leaf[:2]]
    assert rough or tokens.mode != "none"  # recompute that changes nothing is not looked into
    sized = [
        (s, once)
        for x in rough
        for s, once, micro in ((x.seconds, x.once, x.tokens.micro), *x.rest)
        if micro == tokens.micro
    ]
    for _, once in sized:
        told += [
            x
            for x in levels.scheduled(node._replace(level=3, once=once, leaves=1, rest=()))
            if x.level == 4
        ]
    return [(low, 0.0) for low, _ in sized] + [(x.seconds, x.num_bytes) for x in told]


@pytest.mark.parametrize(
    ("model", "cluster", "batch", "count"),
    [
        ("llama3-8b", "16xh100", 32, 8),
        ("tiny-moe", "8xh100", 16, 8),
        pytest.param("llama3-8b", "32xh100", 64, 80, marks=pytest.mark.slow),
    ],
)
def test_no_bound_of_a_made_schedule_is_above_what_simulate_says(model, cluster, batch, count):
    search = made_of(wide(model, cluster, batch))
    rng, seen = random.Random(11), 0
    meshes = [m for m in search.space.meshes() if search.space.schedules(m)]
    for _ in range(100 * count):
        node = random_leaf(search, rng, meshes)
        seen += node is not None and level(search, node) is not None
        if seen == count:
            return
    raise AssertionError(f"{seen} of {count} plans fit")


FORBID = ("cp", "tp", "recompute", "dp_replicate", "zero1", "zero2")


@pytest.mark.parametrize("memory", in_turn([1e9, 6e6]))
def test_the_best_made_schedule_is_that_of_brute_force(memory):
    search = searcher(small(4, memory, layers=8).job, ("fp32",), FORBID)
    found = search.best(ANY)
    other = made_of(search)
    keys = [x for x in (level(other, node) for node in leaves(other)) if x is not None]
    named = measures(found.plans[0])[0]
    told = made(search, ANY, 1, search.best(ANY), 60.0)
    best = measures(told.plans[0])[0]
    assert told.complete and keys
    if min(keys) * (1 + MARGIN) < named:
        assert best == pytest.approx(min(keys)) and ":auto" in told.plans[0].plan
    else:
        assert best == named
    assert told.bounded + told.simulated + told.rejected.total() == told.considered


def eight(**words: tuple[str, ...]) -> Search:
    job = pt.Job.of("llama3-8b", "8xh100", "", global_batch_size=16, seq_len=4096)
    return searcher(job, **words)


def test_a_schedule_is_made_where_it_is_better_and_its_line_says_for_what():
    search = eight(fix=("pp4",), forbid=("cp",))
    plain = search.best(ANY)
    found = made(search, ANY, 1, search.best(ANY), 60.0)
    best = found.plans[0]
    assert ":auto/" in best.plan and "pipeline.costs=" in best.plan
    assert measures(best)[0] * (1 + MARGIN) < measures(plain.plans[0])[0]
    again = simulate(search.job.with_plan(best.plan))
    assert measures(again) == measures(best) and again.schedule == best.schedule
    assert made(eight(fix=("pp4",), forbid=("cp",)), ANY, 1, plain, 60.0).plans[0].plan == best.plan
    reasons = why(search.job, best)
    assert any(r.choice == "auto" for r in reasons)
    changed = {r.choice: r for r in reasons if ":auto/" in r.changed.plan}
    mine = Plan.parse(best.plan)
    for r in changed.values():  # each for its own costs, and told so
        other = Plan.parse(r.changed.plan)
        assert anew(search.job, other, mine) == other and other.pipeline.costs
        told = simulate(search.job.with_plan(other))
        seconds = measures(told)[0]
        assert told.fits and f"{r.changed.plan} takes {format_seconds(seconds)} instead" in r.text
    for choice in ("tp1", "pp4", "recompute:none", f"{mine.num_microbatches}mb"):
        other = Plan.parse(changed[choice].changed.plan)
        assert other.pipeline.costs != mine.pipeline.costs, choice
    without = eight(fix=("pp4",), forbid=("cp", "auto"))
    assert ":auto/" not in finished(without, ANY, 1, without.best(ANY), 1.0).plans[0].plan


def test_auto_is_searched_where_it_is_fixed():
    search = eight(fix=("pp4:auto", "8mb"), forbid=("cp", "tp"))
    found = search.best(ANY)
    assert not found.plans
    told = made(search, ANY, 1, found, 60.0)
    assert told.plans and ":auto/8mb" in told.plans[0].plan


def test_more_devices_have_schedules_made_for_the_best_meshes(monkeypatch):
    job = pt.Job.of("llama3-8b", "32xh100", "", global_batch_size=32, seq_len=4096)
    monkeypatch.setattr("partita.planner.search.made.SHORT_S", 60.0)
    search = searcher(job, ("pp4",), ("cp",))
    found = made(search, ANY, 1, search.best(ANY), 60.0)
    assert found.made and found.complete
    mesh = Plan.parse(found.plans[0].plan).mesh
    assert mesh.pp == 4


def test_dear_ends_are_made_for_where_the_bounds_are():
    """Two ends of a vee would be lighter on two ranks, on a placement whose plans have no bound."""
    job = pt.Job.of("gpt2", "16xh100", "", global_batch_size=16, seq_len=1024)
    fix = ("pp4:auto", "tp4+sp", "recompute:full", "16mb")
    search = searcher(job, fix, ("cp", "dp_shard", "dp_replicate"))
    other = made_of(search)
    keys = [x for x in (level(other, node) for node in leaves(other)) if x is not None]
    found = made(search, ANY, 1, search.best(ANY), 60.0)
    assert found.complete and measures(found.plans[0])[0] == pytest.approx(min(keys))


def test_a_step_too_long_is_left_out():
    job = pt.Job.of("tiny", "4xh100", "", global_batch_size=2 * MOST, seq_len=64)
    search = searcher(job, ("pp2", "dp_replicate2", f"{MOST}mb"), ("cp", "recompute"))
    told = made_of(search).best(Goal("time"), budget_s=60.0)
    assert not told.plans and told.rejected["a step too long for auto"]


def test_a_made_plan_that_cannot_be_is_refused_for_what_is_wrong(monkeypatch):
    search = made_of(eight(fix=("pp4", "8mb"), forbid=("cp", "tp", "recompute")))
    mesh = next(m for m in search.space.meshes() if m.pp == 4)
    node = Node(5, 0.0, 0.0, 1, mesh, Shape(), Tokens(micro=1), Leaf("auto", 1, mesh.dp, 1))
    assert list(search.levels.laid(node)) and not search.levels.refused
    wrong = Problem("dp", "cut", "it cannot be cut so")
    monkeypatch.setattr("partita.planner.search.made.weigh", lambda job: None)
    monkeypatch.setattr("partita.planner.search.made.wrongs", lambda job: [wrong])
    assert not list(search.levels.laid(node)) and search.levels.refused == {"dp cut": 1}


def test_a_changed_plan_that_cannot_be_has_no_schedule_made():
    """Experts on ranks that the change took away: which link their rows would cross is not asked."""
    line = "pp2:auto/4mb dp_shard2.zero3 ep2 pipeline.costs=10_10_10x2"
    job = pt.Job.of("tiny", "4xh100", "", global_batch_size=8, seq_len=64)
    model = replace(job.model, family="llama", experts=4, top_k=2)
    job = replace(job, model=model).with_plan(line)
    best = simulate(job)
    assert best.fits, best.problems
    told = [r.text for r in why(job, best) if "cannot be: " in r.text]
    assert any("ep" in text for text in told), told


def test_only_for_changes_that_are_wanted_is_a_schedule_made(monkeypatch):
    mine, seen = Plan.parse(LINE), []
    monkeypatch.setattr(
        "partita.planner.answers.anew.anew", lambda job, plan, before: seen.append(plan) or plan
    )
    job = pt.Job.of("tiny", "4xh100", LINE, global_batch_size=8, seq_len=64)
    every = [plan for _, plan in changes(job, mine)]
    assert seen == every
    seen.clear()
    found = [x for _, x in changes(job, mine, lambda other: other.precision == mine.precision)]
    assert 0 < len(found) < len(every) and seen == found

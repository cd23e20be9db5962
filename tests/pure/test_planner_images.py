"""Rows, channels and groups of images among the choices: bounds below `simulate`, the best that of brute
force, words."""

import random
from dataclasses import replace

import pytest
from drawn_plans import random_leaf
from test_planner import equals_brute_force, hold_many
from test_planner_splits import splits_hold, uneven
from turns import in_turn

from partita.planner.answers.explain import why
from partita.planner.search.nodes import Goal
from partita.planner.search.search import ANY, Search, searcher
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan

NARROW = [16, 32, 32, 32, 32]


def photos(
    cluster: str, size: int, batch: int, memory: float = 0, **words: tuple[str, ...]
) -> Search:
    """A search for a narrow AlexNet on images of so many pixels, a wide one of large ones."""
    narrow, long = {"channels": NARROW}, {"pools": [1, 2, 3, 4, 5]}
    image = {"size": size, **(narrow if size < 1000 else long)}
    spec = {"preset": "alexnet", "hidden": 64, "vocab": 10, "image": image}
    found = Cluster.load(cluster)
    found = replace(found, memory_bytes=int(memory)) if memory else found
    job = Job.of("alexnet", cluster, "", global_batch_size=batch, seq_len=1)
    return searcher(replace(job, model=ModelSpec.load(spec), cluster=found), **words)


@pytest.mark.parametrize(
    ("cluster", "size", "batch"),
    in_turn([("16xh100", 227, 16), ("32xh100", 131, 64), ("laptop", 67, 8)]),
)
def test_no_bound_of_cut_rows_is_above_what_simulate_says(cluster, size, batch):
    s = photos(cluster, size, batch)
    assert {m.cp for m in s.space.meshes()} >= {1, 2}
    hold_many(photos(cluster, size, batch, fix=("cp2",)), 1, 12)
    hold_many(s, 2, 12)


@pytest.mark.parametrize("fix", in_turn([("tp2", "split2"), ("tp4", "cp2"), ("split2", "pp2")]))
def test_no_bound_of_cut_channels_is_above_what_simulate_says(fix):
    hold_many(photos("16xh100", 131, 16, fix=fix), 3, 12)


@pytest.mark.parametrize("axis", in_turn(["cp", "tp", "split"]))
def test_no_bound_of_uneven_stages_of_cut_images_is_above_what_simulate_says(axis):
    search = uneven(photos("16xh100", 131, 16))
    meshes = [m for m in search.space.meshes() if m.pp > 1 and getattr(m, axis) > 1]
    dice = random.Random(3)
    nodes = (random_leaf(search, dice, meshes) for _ in range(40))
    assert sum(node is not None and splits_hold(search, node, dice) for node in nodes) >= 10


LATER = (pytest.mark.slow, pytest.mark.turns(2))
FEW = ("recompute", "zero1", "zero2", "v_min", "v_half", "interleaved_zb")


@pytest.mark.parametrize(
    ("search", "goal"),
    [
        (photos("4xh100", 67, 8, 1.2e6, fix=("2mb",), forbid=FEW), "time"),
        (photos("4xh100", 67, 8, 1.2e6, fix=("cp2",), forbid=FEW), "memory"),
        (photos("4xh100", 67, 8, 6e5, fix=("split2",), forbid=FEW), "time"),
        (photos("8xh100", 67, 8, 6e5, fix=("tp2", "1mb"), forbid=(*FEW, "cp")), "time"),
        pytest.param(photos("8xh100", 67, 8, 7e5, fix=("1mb",), forbid=FEW), "time", marks=LATER),
        pytest.param(photos("16xh100", 131, 8, 9e5, fix=("1mb",), forbid=FEW), "time", marks=LATER),
    ],
    ids=["4", "cp2-memory", "split2", "tp2", "8", "16"],
)
def test_the_best_of_cut_images_is_that_of_brute_force(search, goal):
    equals_brute_force(search, Goal(goal))


def test_rows_are_cut_where_one_image_is_large_and_words_are_obeyed():
    found = photos("4xh100", 4095, 1).best(ANY, top=3)
    best = Plan.parse(found.plans[0].plan)
    assert found.complete and best.mesh.cp > 1 and best.context.method == "halo", best
    for word in ("cp", "halo"):
        other = photos("4xh100", 4095, 1, forbid=(word,)).best(ANY)
        assert Plan.parse(other.plans[0].plan).mesh.cp == 1
        assert other.plans[0].step_time_s > found.plans[0].step_time_s
    for word in ("cp2", "cp2:halo"):
        fixed = photos("4xh100", 4095, 1, fix=(word,)).best(ANY).plans[0]
        assert "cp2:halo" in fixed.plan
    assert not photos("4xh100", 4095, 1, fix=("cp2:ring",)).best(ANY).plans


def test_why_rows_are_cut_is_told_by_plans_that_can_be():
    search = photos("4xh100", 4095, 4, fix=("cp2", "dp2"))
    best = search.best(ANY).plans[0]
    told = {r.choice: r for r in why(search.job, best)}
    assert told["cp2"].changed.fits and "cp" not in told["cp2"].changed.plan
    assert "halo" not in told and "cannot be" not in told["tp1"].text


def test_no_more_ranks_than_rows_groups_and_channels():
    space = photos("64xh100", 67, 1).space
    every = list(space.meshes())
    assert max(m.cp for m in every) == 14  # of 56 devices, 15 rows behind the first convolution
    assert {m.split for m in every} == {1, 2}
    assert max(m.tp for m in every) == 8  # of 16 channels in two groups
    assert not any(m.sp for m in every)


def test_channels_are_cut_where_memory_asks_and_why_is_told_by_plans_that_can_be():
    """One image in a step, and weights that one device does not hold."""

    def asked(**words: tuple[str, ...]) -> Search:
        return photos("4xh100", 67, 1, 4e5, **words)

    found = asked(forbid=("pp", "cp")).best(ANY)
    best = found.plans[0]
    mesh = Plan.parse(best.plan).mesh
    assert found.complete and mesh.tp * mesh.split > 1 and not mesh.sp, best.plan
    assert not asked(forbid=("pp", "cp", "tp", "split")).best(ANY).plans
    for word, axis in (("split", "split"), ("split2", "split"), ("tp2", "tp")):
        other = asked(forbid=("pp", "cp", word)).best(ANY).plans[0]
        assert getattr(Plan.parse(other.plan).mesh, axis) != 2, (word, other.plan)
    for word in ("tp2", "split2"):
        plans = photos("4xh100", 67, 1, fix=(word,)).best(ANY, top=3).plans
        assert plans and all(word in p.plan for p in plans)
    wide = photos("4xh100", 67, 4, fix=("tp2", "split2")).best(ANY).plans[0]
    told = {r.choice: r for r in why(photos("4xh100", 67, 4).job, wide)}
    assert "+sp" not in told and "no sp" not in told
    assert "split" not in told["split2"].changed.plan and "tp" not in told["tp2"].changed.plan
    assert not any("cannot be" in told[c].text for c in ("tp2", "split2"))

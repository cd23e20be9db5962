"""The steps down from a mesh: at a cut that is a plan's own time and memory none of them loses it."""

import random
from collections import Counter

import pytest
from drawn_plans import random_leaf, wide
from turns import in_turn

from partita.planner.search.levels import Levels
from partita.planner.search.nodes import Node
from partita.planner.search.search import Search, measures, searcher
from partita.planner.space import Leaf, MeshChoice, Shape, Tokens
from partita.simulate.predict import simulate
from partita.spec.job import Job

SLACK = 1 + 1e-9


def leads_to(child: Node, plan: Node) -> bool:
    """Whether a plan lies below a node, by the choices that its level has made."""
    level, leaf, wanted = child.level, child.leaf, plan.leaf
    mode = (child.tokens.mode, child.tokens.every) == (plan.tokens.mode, plan.tokens.every)
    fold = (child.shape.ep, child.shape.etp) == (plan.shape.ep, plan.shape.etp)
    sizes = (child.tokens.micro, *(micro for _, _, micro in child.rest))
    return (
        mode
        and fold
        and (level < 2 or child.shape == plan.shape)
        and (level < 3 or (leaf.schedule, leaf.virtual) == (wanted.schedule, wanted.virtual))
        and (level < 3 or plan.tokens.micro in (sizes if level == 3 else sizes[:1]))
        and (level < 5 or (leaf.dp_shard, leaf.zero) == (wanted.dp_shard, wanted.zero))
    )


def is_found(levels: Levels, plan: Node, seconds: float, num_bytes: float) -> bool:
    """Whether the steps lead to a plan, whose nodes have no bounds above it."""
    levels.cut, levels.cut_bytes = seconds * SLACK, num_bytes * SLACK
    now = [Node(0, 0.0, 0.0, 1, plan.mesh)]
    while now and now[0].level < 7:
        now = [child for node in now for child in levels.expand(node) if leads_to(child, plan)]
        assert all(n.seconds <= levels.cut and n.num_bytes <= levels.cut_bytes for n in now)
    return bool(now)


def lost(search: Search, seed: int, count: int) -> list[str]:
    """Of so many random plans that fit those that the steps do not lead to. What recomputing leaves as it was
    is left out on purpose."""
    rng, meshes, found, tried = random.Random(seed), list(search.space.meshes()), list[str](), 0
    while tried < count:
        node = random_leaf(search, rng, meshes)
        told = simulate(search.job.with_plan(search.plan(node))) if node is not None else None
        if node is None or told is None or not told.fits:
            continue
        tried, search.levels.refused = tried + 1, Counter()
        seconds, num_bytes, _ = measures(told)
        led, refused = is_found(search.levels, node, seconds, num_bytes), search.levels.refused
        if not led and not refused["recompute changes nothing"]:
            found.append(str(search.plan(node)))
    return found


@pytest.mark.parametrize("model", in_turn(["tiny", "tiny-moe"]))
def test_no_step_loses_a_plan_at_its_own_time_and_memory(model):
    assert lost(wide(model, "16xh100", 16, 4), 3, 25) == []


def test_reductions_hide_under_what_the_starts_of_kernels_take():
    """A microbatch of few tokens, whose gradients cp adds up under backwards that are all launches."""
    sizes = {"layers": 7, "hidden": 384, "heads": 6, "kv_heads": 3, "ffn_hidden": 384, "vocab": 256}
    model = {"family": "llama", **sizes, "max_seq_len": 64}
    job = Job.of(model, "2xh100", "", global_batch_size=1, seq_len=64)
    search = searcher(job, ("bf16",))
    mesh, tokens = MeshChoice(1, 1, 2, 1, False), Tokens("full", 1, 1)
    plan = Node(7, 0.0, 0.0, 1, mesh, Shape("ring"), tokens, Leaf())
    seconds, num_bytes, _ = measures(simulate(job.with_plan(search.plan(plan))))
    assert is_found(search.levels, plan, seconds, num_bytes)

"""Rooms: what they refuse and what they propose, how layers are split, and how fast a plan is laid."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from executed import LLAMA, TIED, laid, model, request
from hypothesis import given
from hypothesis import strategies as st
from took import least_seconds

from partita.base.errors import PlanError
from partita.parallel.laid import Request, lay, problems
from partita.parallel.pp.rules import balanced
from partita.spec.model import ModelSpec
from partita.spec.plan_text import parse

LLAMA405 = ModelSpec(
    family="llama", layers=126, hidden=16384, heads=128, kv_heads=8, ffn_hidden=53248,
    vocab=128256, max_seq_len=8192,
)  # fmt: skip


def stage_costs(costs: list[int], split: tuple[int, ...]) -> list[int]:
    ends = [0]
    for n in split:
        ends.append(ends[-1] + n)
    found = [sum(costs[1 + a : 1 + b]) for a, b in pairwise(ends)]
    found[0] += costs[0]
    found[-1] += costs[-1]
    return found


@given(st.lists(st.integers(0, 9), min_size=4, max_size=10), st.integers(1, 4))
def test_balanced_is_the_best_of_all_splits(costs, stages) -> None:
    layers = len(costs) - 2
    stages = min(stages, layers)

    def worth(split):
        found = stage_costs(costs, split)
        return max(found), sum(c * c for c in found)

    cuts = ((0, *c, layers) for c in combinations(range(1, layers), stages - 1))
    every = [tuple(b - a for a, b in pairwise(c)) for c in cuts]
    split = balanced(costs, stages)
    assert min(split) >= 1
    assert sum(split) == layers
    assert worth(split) == min(map(worth, every))


def test_a_heavy_head_gets_fewer_layers() -> None:
    stages = lay(Request(parse("pp16/16mb tp8+sp"), LLAMA405, 8192)).stages
    layers = [sum(n.startswith("blocks") for n in s.names) for s in stages]
    assert sum(layers) == 126
    assert layers[-1] < layers[1]


@pytest.mark.parametrize(
    ("spec", "line", "rooms", "nearest"),
    [
        (LLAMA, "tp3", ["tp", "tp"], "tp2"),
        (model(heads=6, kv_heads=3, hidden=12), "tp2", ["tp"], "1mb"),
        (LLAMA, "pp4", ["pp"], "pp3"),
        (LLAMA, "pp2 pipeline.split=1,1", ["pp"], "pp2"),
        (LLAMA, "pp3 pipeline.split=1,0,2", ["pp"], "pp3"),
        (LLAMA, "pp2:zb_h2/2mb", ["pp"], "pp2"),
        (LLAMA, "pp2:forward/2mb", ["pp"], "pp2"),
        (LLAMA, "pp2/2mb pipeline.vertical_sync=true", ["pp"], "pp2"),
        (LLAMA, "dp_shard2.zero0 expert.chunks=2", ["ep"], "dp_shard2.zero0"),
        (LLAMA, "pp2:interleaved_1f1bx2/3mb", ["pp"], "pp2"),
        (LLAMA, "pp2:zb_v/4mb", ["pp"], "pp2:1f1b/4mb"),
        (LLAMA, 'pp2:"file:missing.csv"/2mb', ["pp"], "pp2"),
        (
            LLAMA,
            "fp32 tp2 precision.rounding=stochastic",
            ["precision"],
            "tp2",
        ),
        (LLAMA, "cp4:ulysses tp2", ["cp"], "cp2:ulysses tp2"),
        (LLAMA, "cp8:ulysses", ["cp", "cp"], "cp4:ulysses"),
        (model(heads=6, kv_heads=2, hidden=12), "cp4:ulysses", ["cp"], "cp2:ulysses"),
        (LLAMA, "dp_shard2.zero1 pp4 tp3", ["tp", "tp", "pp"], ""),
    ],
)
def test_every_problem_at_once_with_a_legal_way_out(spec, line, rooms, nearest) -> None:
    found = problems(request(spec, line))
    assert [p.room for p in found] == rooms
    assert all(p.message and p.asked and p.limit for p in found)
    with pytest.raises(PlanError) as error:
        lay(request(spec, line))
    assert error.value.problems == tuple(p for p in found if p.severity == "error")
    if nearest:
        assert found[0].nearest
        assert nearest in found[0].nearest
        assert problems(request(spec, found[0].nearest)) == []


def test_one_rank_moves_nothing() -> None:
    whole = laid(TIED, "pp1/2mb recompute:full")
    assert whole.traffic(0) == []
    assert whole.groups == []


def test_tied_weight_is_one_unit() -> None:
    """On one stage stored once; on two its sum is a unit of its own on both."""
    one = [u for u in laid(TIED, "dp_replicate2").units(0) if u.name == "embedding.table"]
    assert [u.across for u in one] == [()]
    two = laid(TIED, "dp_replicate2 pp2/2mb")
    for place in (0, 1):
        assert [u.across for u in two.units(place) if u.name == "embedding.table"] == [("tied",)]
    assert two.holders("embedding.table") == (0, 1)
    sites = [t.site for t in two.traffic(0) if t.axis == "tied"]
    assert sites == ["embedding.table:tied"]


def test_a_plan_for_405b_is_laid_and_read_in_50_ms() -> None:
    asked = Request(parse("tp8+sp pp16/32mb dp_replicate4 bf16"), LLAMA405, 8192)

    def laid_and_read() -> None:
        whole = lay(asked)
        for stage in range(16):
            whole.calls(stage)
            whole.units(stage)
        whole.traffic(0)

    assert least_seconds(laid_and_read, 0.05, tries=9) < 0.05

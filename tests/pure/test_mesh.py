"""The mesh: ranks and coordinates are one to one, groups tile the ranks, both views agree."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.spec.mesh import DENSE, EXPERT, Mesh
from partita.spec.plan_text import parse

LINES = [
    "pp2 dp_replicate2 tp2",
    "pp2 dp_shard2.zero0 cp2 tp2",
    "dp_shard2 cp4:hybrid2x2 tp2+sp ep4",
]


def mesh_of(line: str) -> Mesh:
    plan = parse(line)
    return Mesh(plan.sizes, plan.mesh.order)


@pytest.mark.parametrize("line", LINES)
def test_ranks_and_coordinates_are_one_to_one(line) -> None:
    mesh = mesh_of(line)
    assert mesh.world_size == parse(line).world_size
    for view in (DENSE, EXPERT):
        seen = {tuple(mesh.coords(r)[a] for a in view) for r in range(mesh.world_size)}
        assert len(seen) == mesh.world_size
    for rank in range(mesh.world_size):
        assert mesh.rank_of(mesh.coords(rank)) == rank


@pytest.mark.parametrize("line", LINES)
def test_groups_tile_the_ranks(line) -> None:
    mesh = mesh_of(line)
    for view in (DENSE, EXPERT):
        for axes in [c for n in (1, 2) for c in combinations(view, n)]:
            groups = mesh.groups(*axes)
            assert Counter(r for g in groups for r in g) == Counter(range(mesh.world_size))
            size = 1
            for a in axes:
                size *= mesh.sizes[a]
            for group in groups:
                assert len(group) == size
                assert all(mesh.group(rank, *axes) == group for rank in group)


def test_tp_is_innermost_and_order_is_the_plans() -> None:
    assert mesh_of("pp2 tp2").groups("tp") == ((0, 1), (2, 3))
    turned = "pp2 tp2 order:pp,cp,dp_shard,dp_replicate,tp"
    assert mesh_of(turned).groups("tp") == ((0, 2), (1, 3))
    assert mesh_of(turned).groups("pp") == ((0, 1), (2, 3))


def test_the_last_axis_of_a_group_is_its_innermost() -> None:
    mesh = mesh_of("dp_replicate2 tp2")
    assert mesh.group(0, "dp_replicate", "tp") == (0, 1, 2, 3)
    assert mesh.group(0, "tp", "dp_replicate") == (0, 2, 1, 3)


@given(st.permutations(["tp", "cp", "dp_shard", "dp_replicate", "pp"]), st.data())
def test_any_order(order, data) -> None:
    sizes = {a: data.draw(st.integers(1, 3)) for a in DENSE} | {"ep": 1, "etp": 1}
    sizes["efsdp"] = sizes["dp_shard"] * sizes["cp"] * sizes["ulysses"] * sizes["tp"]
    mesh = Mesh(sizes, tuple(order))
    rank = data.draw(st.integers(0, mesh.world_size - 1))
    assert mesh.rank_of(mesh.coords(rank)) == rank

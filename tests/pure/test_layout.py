"""Layouts: primaries tile every tensor once; scatter then gather, and any plan to any plan, are the
identity: of all weights of laid plans, and of layouts that are yet to come (flat shards, experts)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
from executed import DROPS, GPT2, LLAMA, TIED, laid
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.spec.layout import Cut, Layout, Section, flat_unit, intersect, range_boxes
from partita.spec.mesh import EXPERT, Mesh
from partita.spec.plan_text import parse

MESHES = [
    "fp32", "tp2", "tp4", "dp_replicate2 tp2", "dp_shard3 tp2", "pp3 tp2", "pp3 dp_shard2 tp4",
    "cp2 dp_shard2 tp2+sp ep4",
]  # fmt: skip


def mesh_of(line: str) -> Mesh:
    plan = parse(line)
    return Mesh(plan.sizes, plan.mesh.order)


def labels(layout: Layout) -> np.ndarray:
    return np.arange(prod(layout.shape)).reshape(layout.shape)


def at(box: Sequence[tuple[int, int]], origin: Sequence[tuple[int, int]] | None = None) -> tuple:
    start = [0] * len(box) if origin is None else [a for a, _ in origin]
    return tuple(slice(a - o, b - o) for (a, b), o in zip(box, start, strict=True))


def scatter(layout: Layout, mesh: Mesh, whole: np.ndarray) -> list[dict[int, int]]:
    """Each rank's local storage: place -> value. No two pieces share a place."""
    found = []
    for rank in range(mesh.world_size):
        held: dict[int, int] = {}
        for p in layout.pieces(mesh, rank):
            new = dict(enumerate(whole[at(p.box)].ravel().tolist(), p.start))
            assert not held.keys() & new.keys()
            assert len(new) == p.numel() > 0
            held |= new
        found.append(held)
    return found


def gather(layout: Layout, mesh: Mesh, held: list[dict[int, int]]) -> np.ndarray:
    """The whole tensor from primary pieces, each element exactly once."""
    whole = np.full(layout.shape, -1)
    for rank in range(mesh.world_size):
        for p in (p for p in layout.pieces(mesh, rank) if p.primary):
            assert (whole[at(p.box)] == -1).all(), "two primaries"
            values = [held[rank][p.start + i] for i in range(p.numel())]
            whole[at(p.box)] = np.array(values).reshape([b - a for a, b in p.box])
    return whole


def reshard(a: Layout, am: Mesh, held: list[dict[int, int]], b: Layout, bm: Mesh) -> list[dict]:
    """From primaries of `a` into every piece of `b`, by intersecting boxes alone."""
    sources = [(p, r) for r in range(am.world_size) for p in a.pieces(am, r) if p.primary]
    found: list[dict[int, int]] = []
    for rank in range(bm.world_size):
        found.append({})
        for q in b.pieces(bm, rank):
            places = np.arange(q.start, q.start + q.numel()).reshape([y - x for x, y in q.box])
            for p, r in sources:
                both = intersect(p.box, q.box)
                if both is not None:
                    values = np.array([held[r][p.start + i] for i in range(p.numel())])
                    cut = values.reshape([y - x for x, y in p.box])[at(both, p.box)]
                    to = places[at(both, q.box)]
                    found[-1] |= dict(zip(to.ravel().tolist(), cut.ravel().tolist(), strict=True))
    return found


HEADS = (Section(0, 12, 6), Section(12, 4, 2, share=True), Section(16, 4, 2, share=True))
QKV = Layout((20, 3), (Cut(0, ("tp",), HEADS),))  # 6 query heads and 2 kv heads of width 2, fused
VOCAB = Layout((10, 3), (Cut(0, ("tp",), (Section(0, 10, 10, padded=12),)),))
ROW = Layout((5, 7), (Cut(1, ("tp",), (Section(0, 7, 7),)),))
PAIRS = Layout((6, 3), (Cut(0, ("tp",), (Section(0, 3, 3), Section(3, 3, 3))),))
EXPERTS = Layout(
    (4, 6, 3),
    (Cut(0, ("ep",), (Section(0, 4, 4),)), Cut(1, ("etp",), (Section(0, 3, 3), Section(3, 3, 3)))),
    view=EXPERT,
)


def ways(x: Layout, neighbour: Layout) -> list[Layout]:
    """One logical tensor laid whole, cut, tied to two stages, and in a flat unit behind another."""
    axes = ("efsdp",) if x.view == EXPERT else ("dp_shard", "cp")
    tied = Layout(x.shape, x.cuts, (0, 2), x.view)
    unit = flat_unit([neighbour, x] if neighbour.view == x.view else [x], axes)
    return [Layout(x.shape, view=x.view), x, tied, unit[-1]]


ZOO = [
    ways(*pair) for pair in ((QKV, ROW), (VOCAB, QKV), (ROW, VOCAB), (PAIRS, ROW), (EXPERTS, ROW))
]


def fits(x: Layout, line: str) -> bool:
    return max(x.stages) < parse(line).mesh.pp


@pytest.mark.parametrize("line", MESHES)
def test_primaries_tile_once_and_scatter_then_gather_is_identity(line) -> None:
    mesh, n = mesh_of(line), 0
    for x in (x for group in ZOO for x in group if fits(x, line)):
        held = scatter(x, mesh, labels(x))
        assert np.array_equal(gather(x, mesh, held), labels(x)), x
        n += 1
    assert n >= 15


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_layout_to_any_layout_is_identity(data) -> None:
    group = data.draw(st.sampled_from(ZOO))
    (a, am), (b, bm) = (
        data.draw(
            st.tuples(st.sampled_from(group), st.sampled_from(MESHES)).filter(lambda p: fits(*p))
        )
        for _ in range(2)
    )
    held = scatter(a, mesh_of(am), labels(a))
    assert reshard(a, mesh_of(am), held, b, mesh_of(bm)) == scatter(b, mesh_of(bm), labels(b))


PLANS = [
    "fp32", "tp2", "dp_shard3.zero3", "tp4+sp", "dp_shard2.zero1 tp4", "dp_replicate2 tp2",
    "pp2/2mb tp2+sp", "dp_replicate2 dp_shard2.zero2 pp2/2mb", "pp3/1mb",
]  # fmt: skip


@pytest.mark.parametrize("spec", [LLAMA, TIED, GPT2, DROPS], ids=["llama", "tied", "gpt2", "drops"])
def test_laid_weights_from_any_plan_to_any_plan(spec) -> None:
    for line, other in zip(PLANS, [*PLANS[1:], PLANS[0]], strict=True):
        a, b = laid(spec, line), laid(spec, other)
        assert set(a.layouts) == set(b.layouts)
        for name in a.layouts:
            x, y = a.layouts[name], b.layouts[name]
            held = scatter(x, a.mesh, labels(x))
            assert np.array_equal(gather(x, a.mesh, held), labels(x)), (line, name)
            want = scatter(y, b.mesh, labels(y))
            assert reshard(x, a.mesh, held, y, b.mesh) == want, (line, other, name)


def test_laid_weights_in_flat_units() -> None:
    """The units of a plan, were they sharded over dp_shard: they still tile."""
    whole, sizes = laid(TIED, "dp_shard2.zero0 pp2/2mb tp2"), 0
    for stage in range(2):
        for unit in whole.units(stage):
            for x in flat_unit([layout for _, _, layout in unit.weights], ("dp_shard",)):
                held = scatter(x, whole.mesh, labels(x))
                assert np.array_equal(gather(x, whole.mesh, held), labels(x))
                sizes += prod(x.shape) * (x.stages[0] == stage)
    assert sizes == whole.program.parameters()


def test_shared_heads_and_padding_by_hand() -> None:
    mesh = mesh_of("tp4")
    wk = laid(LLAMA, "tp4").layouts["blocks.0.attention.wk"]
    boxes = [[(p.box[0], p.primary) for p in wk.pieces(mesh, r)] for r in range(4)]
    assert boxes == [[((0, 1), True)], [((0, 1), False)], [((1, 2), True)], [((1, 2), False)]]
    rows = [[p.box[0] for p in VOCAB.pieces(mesh, r)] for r in range(4)]
    assert rows == [[(0, 3)], [(3, 6)], [(6, 9)], [(9, 10)]]
    down = Layout((2, 10), (Cut(1, ("tp",), VOCAB.cuts[0].sections),))
    boxes = [[(p.box, p.start) for p in down.pieces(mesh, r)] for r in (0, 3)]
    assert boxes[0] == [(((0, 2), (0, 3)), 0)]
    assert boxes[1] == [(((0, 1), (9, 10)), 0), (((1, 2), (9, 10)), 3)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=3), st.data())
def test_range_boxes_are_the_range(spans, data) -> None:
    box = tuple((a, a + n) for a, n in spans)
    size = prod(n for _, n in spans)
    first = data.draw(st.integers(0, size))
    end = data.draw(st.integers(first, size))
    found = list(range_boxes(box, first, end))
    assert len(found) <= 2 * len(box) - 1
    order = np.arange(size).reshape([n for _, n in spans])
    got = []
    for part, start in found:
        got += order[at(part, box)].ravel().tolist()
        assert start == got[-1] - prod(b - a for a, b in part) + 1
    assert got == list(range(first, end))

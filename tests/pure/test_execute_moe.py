"""Experts, laid and executed: equal to one device, sending what the routers' choice says; and what is
missing is noticed. Of what is left out, and of slow plans, every other is tried, the rest with the next
commit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from executed import (
    MOE,
    change_region,
    declared,
    difference,
    found_wrong,
    laid,
    model,
    regions,
    request,
)
from turns import in_turn

from partita.parallel.exact.execute import execute
from partita.parallel.laid import problems
from partita.parallel.read import replayed

PLANS = [
    "fp32", "2mb", "dp4 ep4", "dp2 ep2", "dp_replicate2 dp2 ep2", "tp2+sp", "tp2+sp ep2", "tp4+sp ep2",
    "tp2 etp2", "dp2 tp2 etp2", "dp2 tp2 ep2 etp2", "dp2 tp2+sp ep2 expert.chunks=2", "dp2 tp2+sp ep4",
    "dp2 tp2+sp etp2",
    "dp2 tp2+sp ep2 etp2", "tp4+sp ep2 etp2", "tp4+sp etp4", "pp2/2mb dp2 ep2", "pp2/2mb tp2+sp ep2",
    "cp2 ep2", "cp2:ulysses ep2", "cp2:all_gather tp2+sp ep4", "dp2 cp2 tp2+sp ep4",
    "dp2 ep2 order:dp_shard,tp,cp,dp_replicate,pp tp2+sp",
    "dp4.zero3 ep2", "dp4.zero1 ep2", "dp4.zero2 ep2", "dp2.zero3 tp2+sp ep2", "dp2.zero1 tp2+sp ep2 etp2",
    "pp2/2mb dp2.zero2 tp2+sp ep2", "dp_replicate2 dp_shard2.zero3 tp2+sp ep2",
]  # fmt: skip


LESS = (" recompute:full", " recompute:selective")
FEW = ("dp2 tp2+sp ep2 etp2", "dp2 tp2 ep2 etp2", "dp4 ep4")
CASES = [*PLANS, *(line + less for line in FEW for less in LESS)]
SLOW = [line + less for line in PLANS if line not in FEW for less in LESS]
SLOW = [pytest.param(line, marks=pytest.mark.slow) for line in in_turn(SLOW)]


@pytest.mark.parametrize("line", [*CASES, *SLOW])
def test_plan_equals_one_device(line) -> None:
    whole = laid(MOE, line)
    got = execute(whole)
    assert difference(MOE, got, 2) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == declared(whole, got, rank)


CAPACITY = replace(MOE, capacity_factor=0.75)


@pytest.mark.parametrize(
    "line",
    [
        "tp4+sp ep2",
        "dp2 tp2+sp ep2 recompute:full",
        "dp2 tp2 ep2 etp2",
        "cp2:ring ep2",
        "cp4:hybrid2x2 ep2 etp2",
        "cp4:hybrid2x2 ep2 etp2 recompute:full recompute.collectives=keep",
        "tp2 dp2 ep2 etp2 recompute:full recompute.collectives=keep",
    ],
)
def test_rows_beyond_the_capacity_are_dropped_as_on_one_device(line) -> None:
    """2 of the 4 rows that 4 positions may send to an expert; later positions wait for earlier ones."""
    whole = laid(CAPACITY, line)
    got = execute(whole)
    assert difference(CAPACITY, got, 2) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == declared(whole, got, rank)
    sent = sum(sum(rows) for counts in got.routed.values() for rows in counts.values())
    assert sent < 2 * 2 * 16 * (2 if "etp2" in line else 1)


FAULTY = [
    "dp2 ep2",
    "dp2 tp2+sp ep2 etp2",
    pytest.param("dp2 tp2 ep2 etp2", marks=pytest.mark.slow),
    pytest.param("tp4+sp ep2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("line", FAULTY)
def test_every_event_and_gradient_axis_is_needed(line) -> None:
    whole = laid(MOE, f"{line} data.bucket_bytes=1")  # every block's units by themselves
    unneeded, every = [], []
    for name, region in regions(whole):
        if name == "layer":
            continue
        changes = [
            replace(region, events=tuple(e for e in region.events if e is not event))
            for event in region.events
        ]
        if region.kind == "reduce":
            kept = (tuple(a for a in region.axes if a != axis) or ("cp",) for axis in region.axes)
            changes += [replace(region, axes=axes) for axes in kept]
        every += [(name, region, changed) for changed in changes]
    assert len(every) >= 15
    for name, region, changed in in_turn(every):
        if not found_wrong(MOE, change_region(whole, (name, region), (changed,))):
            unneeded.append((name, region.name, changed.axes, changed.events))
    assert not unneeded


@pytest.mark.parametrize("line", ["dp2 tp2+sp ep2 etp2", "tp2+sp ep2 recompute:full"])
def test_every_kept_tensor_and_replayed_op_is_needed(line) -> None:
    whole = laid(MOE, line)
    block = next(b for b in whole.program.blocks if b.name == "moe_layer")
    small = {"order", "chosen"} if "full" not in line else set()
    assert {"inside", "back"} & block.kept or "full" in line
    assert small <= block.kept
    for lost in sorted(block.kept - {"lse"}):
        assert found_wrong(MOE, whole, lost=lost), lost
    again = {op.name for op in replayed(block)}
    assert ("experts.back:all_to_all" in again) == ("full" in line)
    assert "combine.sum" not in again


def test_experts_gradients_are_summed_over_what_holds_the_same_experts() -> None:
    def axes(line: str) -> dict[str, tuple[str, ...]]:
        return {
            w: u.axes for u in laid(MOE, line).units(0) for w, *_ in u.weights if "blocks.2" in w
        }

    seen = axes("dp_replicate2 dp2 tp2+sp ep2")
    assert seen["blocks.2.experts.gate_up"] == ("dp_replicate", "efsdp")
    assert seen["blocks.2.router.gate"] == ("dp_replicate", "dp_shard", "tp")
    assert seen["blocks.2.shared.down"] == ("dp_replicate", "dp_shard")
    assert axes("dp2 tp2 ep2 etp2")["blocks.2.router.gate"] == ("dp_shard",)


def test_dropless_dispatch_sends_top_k_rows_a_token_and_no_copies() -> None:
    whole = laid(MOE, "dp2 tp2+sp ep4")
    got = execute(whole, 1)
    site = "blocks.1.dispatch.send:all_to_all"
    tokens, hidden, word = 4 * 4 // 4, 8, 4
    for rank in range(4):
        line = next(t for t in got.traffic[rank] if t.site == site and t.phase == "F")
        assert line.bytes == 2 * tokens * hidden * word


@pytest.mark.parametrize(
    ("spec", "line", "rule"),
    [
        (model(), "dp2 ep2", "dense"),
        (MOE, "dp_shard3.zero0 ep3", "experts"),
        (MOE, "dp2 ep4", "fold"),
        (MOE, "tp2", "tp"),
        (MOE, "tp4 etp2", "tp"),
    ],
)
def test_refusals_say_what_would_fit(spec, line, rule) -> None:
    found = [p for p in problems(request(spec, line)) if p.room == "ep"]
    assert [p.rule for p in found if p.rule == rule]
    for p in found:
        nearest = request(spec, p.nearest)
        assert p.rule not in [q.rule for q in problems(nearest) if q.room == "ep"]

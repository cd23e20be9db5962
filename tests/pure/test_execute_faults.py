"""Whatever is left out of, or doubled in, a laid plan is noticed: regions, their events, gradient axes,
tensors that are kept, ops that are replayed. Of what each plan has every other is tried, the rest with the
next commit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from executed import DROPS, GPT2, LLAMA, TIED, change_region, found_wrong, laid, regions
from turns import in_turn

from partita.parallel.exact import block as execute_block
from partita.parallel.read import replayed

ALONE = " data.bucket_bytes=1"  # every block's unit is reduced by itself
FAULTY = [
    (LLAMA, "tp4", 11), (TIED, "tp2+sp" + ALONE, 21),
    (DROPS, "dp_replicate2 tp2+sp recompute:full" + ALONE, 27),
    (TIED, "pp2/2mb", 6), (GPT2, "dp_replicate2 dp_shard2.zero0" + ALONE, 6),
    (LLAMA, "dp_replicate2 pp2/2mb tp2" + ALONE, 18), (LLAMA, "dp_replicate2 pp2/2mb tp2", 17),
    (TIED, "pp2/2mb dp_shard2.zero1", 14), (TIED, "dp_replicate2 dp_shard2.zero2", 9),
    (TIED, "dp_shard2.zero3 tp2+sp", 36), (TIED, "pp2/2mb dp_shard2.zero3", 19),
    (LLAMA, "dp_shard2.zero3 data.reshard_after_forward=false", 9),
    (LLAMA, "cp2:ring tp2+sp" + ALONE, 32), (DROPS, "cp2:ring recompute:full" + ALONE, 11),
    (DROPS, "cp4:hybrid2x2" + ALONE, 19),
    (LLAMA, "pp2:gpipe/4mb recompute:full offload:cpu offload.targets=activations", 10),
    (LLAMA, "cp2:ulysses tp2" + ALONE, 23), (LLAMA, "cp2:all_gather" + ALONE, 11),
]  # fmt: skip
IDS = [line for _, line, _ in FAULTY]


@pytest.mark.parametrize(("spec", "line", "events"), FAULTY, ids=IDS)
def test_every_event_is_needed(spec, line, events) -> None:
    whole, unneeded = laid(spec, line), []
    every = [(name, region, event) for name, region in regions(whole) for event in region.events]
    assert len(every) == events
    for name, region, event in in_turn(every):
        left = replace(region, events=tuple(e for e in region.events if e is not event))
        steps = 2 if region.kind == "gather" else 1
        if not found_wrong(spec, change_region(whole, (name, region), (left,)), steps):
            unneeded.append((name, region.name, event))
    assert not unneeded


@pytest.mark.parametrize("line", ["tp2", "dp_replicate2" + ALONE])
def test_every_sum_done_twice_is_found(line) -> None:
    whole = laid(TIED, line)
    sums = [s for s in regions(whole) if s[1].events[0].collective == "all_reduce"]
    assert len(sums) >= 5
    for name, region in sums:
        once_more = (replace(region, events=region.events * 2),)
        twice = (region, region) if region.kind == "reduce" else once_more
        assert found_wrong(TIED, change_region(whole, (name, region), twice)), (name, region.name)


AXES = [
    (LLAMA, "tp4", 1), (LLAMA, "dp_replicate2 tp4+sp" + ALONE, 9),
    (DROPS, "dp_shard2.zero0 tp2+sp" + ALONE, 9), (DROPS, "dp_replicate2 dp_shard2.zero1 tp2+sp", 3),
    (GPT2, "cp4:hybrid2x2 tp2" + ALONE, 8),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "line", "axes"), AXES, ids=[line for _, line, _ in AXES])
def test_every_gradient_axis_is_needed(spec, line, axes) -> None:
    whole = laid(spec, line)
    sums = [(name, op) for name, op in regions(whole) if op.kind == "reduce"]
    every = [(name, region, axis) for name, region in sums for axis in region.axes]
    assert len(every) == axes
    for name, region, axis in in_turn(every):
        left = tuple(a for a in region.axes if a != axis) or ("ep",)
        changed = change_region(whole, (name, region), (replace(region, axes=left),))
        assert found_wrong(spec, changed), (name, region.name, axis)


KEPT = [
    (LLAMA, "fp32"),
    (LLAMA, "tp4+sp"),
    (LLAMA, "tp2 recompute:full"),
    (DROPS, "tp2+sp"),
    (DROPS, "pp2/2mb"),
    (LLAMA, "cp4:hybrid2x2"),
    (DROPS, "cp2:ring"),
    (DROPS, "cp2:ulysses recompute:full"),
]


@pytest.mark.parametrize(("spec", "line"), KEPT, ids=[f"{s.family} {line}" for s, line in KEPT])
def test_every_kept_tensor_is_needed(spec, line) -> None:
    whole = laid(spec, line)
    kept = sorted({t for b in whole.program.blocks for t in b.kept})
    assert len(kept) >= 5
    assert [name for name in in_turn(kept) if not found_wrong(spec, whole, lost=name)] == []


@pytest.mark.parametrize("spec", [LLAMA, DROPS], ids=["llama", "gpt2"])
@pytest.mark.parametrize("line", ["tp2+sp recompute:full", "recompute:full"])
def test_every_replayed_op_is_needed(spec, line, monkeypatch) -> None:
    whole = laid(spec, line)
    names = sorted({op.name for b in whole.program.blocks for op in replayed(b)})
    assert len(names) >= 10
    for name in in_turn(names):
        left_out = lambda b, name=name: [op for op in replayed(b) if op.name != name]  # noqa: E731
        monkeypatch.setattr(execute_block, "replayed", left_out)
        assert found_wrong(spec, whole), name

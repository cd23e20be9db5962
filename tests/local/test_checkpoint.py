"""Any plan loads any checkpoint; the newest complete one is found, the last are kept."""

import json

import pytest
import torch
import verify_jobs
from saves import (
    ROLES,
    SHAPES,
    alone,
    cut,
    files,
    finished,
    flip,
    header,
    is_step,
    load,
    save,
    value,
)

from partita.base.errors import CheckpointError
from partita.planner.answers.judge import judged
from partita.train.checkpoints import checkpoint, manifest, pieces
from partita.train.checkpoints.checkpoint import Wanted, outlook
from partita.train.launch.start import prepare


@pytest.mark.parametrize(("world", "dim"), [(1, 0), (2, 0), (3, 1)])
@pytest.mark.parametrize(("other", "along"), [(1, 0), (4, 1), (2, 0)])
def test_any_cut_loads_any_cut(tmp_path, world, dim, other, along):
    path = save(tmp_path, 5, world=world, dim=dim)
    whole = load(path, world=other, dim=along)
    for (name, role), tensor in whole.items():
        assert torch.equal(tensor, value(name, role, 5))
    assert path.name == "step-00000005"
    assert files(path) == ["manifest.json", *(f"rank-{r}.safetensors" for r in range(world))]


def test_flat_shards_that_split_rows_load(tmp_path):
    box = (((0, 1), (2, 6)), ((1, 3), (0, 6)), ((3, 4), (0, 1)))
    path = save(tmp_path, 1)
    for b in box:
        part = torch.zeros(pieces.box_size(b))
        checkpoint.load(path, [Wanted("blocks.0.wq", "weight", (8, 6), b, part)])
        whole = value("blocks.0.wq", "weight", 1)
        assert torch.equal(part, whole[tuple(slice(x, y) for x, y in b)].flatten())


def test_other_libraries_read_the_pieces(tmp_path):
    from safetensors.torch import load_file

    path = save(tmp_path, 3, world=1)
    held = load_file(path / "rank-0.safetensors")
    assert torch.equal(held["weight:blocks.0.norm[0:6]"], value("blocks.0.norm", "weight", 3))
    assert len(held) == len(SHAPES) * len(ROLES)


def test_dtypes_are_kept_and_masters_convert(tmp_path):
    path = save(tmp_path, 1, dtype=torch.float64)
    assert torch.equal(load(path)["blocks.0.wq", "weight"], value("blocks.0.wq", "weight", 1))
    with pytest.raises(CheckpointError, match=r"F64, the run keeps BF16"):
        load(path, dtype=torch.bfloat16)


def test_the_last_are_kept_and_the_newest_is_found(tmp_path):
    assert checkpoint.newest_complete(tmp_path / "none") is None
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=2)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000030",
        "step-00000020",
    ]
    newest = checkpoint.newest_complete(tmp_path)
    assert newest is not None and is_step(newest, 30)


def test_saving_a_saved_step_keeps_it(tmp_path):
    first = save(tmp_path, 10)
    before = (first / "manifest.json").read_bytes()
    assert save(tmp_path, 10) == first
    assert (first / "manifest.json").read_bytes() == before


def test_after_a_fallback_the_step_is_saved_beside_the_damaged_one(tmp_path):
    old, bad = save(tmp_path, 10), save(tmp_path, 20)
    flip(bad / "rank-0.safetensors", -1)
    damaged = (bad / "rank-0.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"rank-0\.safetensors.*--allow-fallback"):
        checkpoint.newest_complete(tmp_path)
    assert checkpoint.newest_complete(tmp_path, allow_fallback=True) == old
    between = save(tmp_path, 15, keep_last=1)
    assert between.is_dir() and not old.exists()  # the damaged newer one takes no place
    again = save(tmp_path, 20, keep_last=2)
    assert again.name == "step-00000020-2" and checkpoint.newest_complete(tmp_path) == again
    assert (bad / "rank-0.safetensors").read_bytes() == damaged


def test_another_model_or_role_is_named(tmp_path):
    path = save(tmp_path, 1)
    part = torch.zeros(6)
    for want, message in (
        (Wanted("blocks.9.norm", "weight", (6,), ((0, 6),), part), "is not in it"),
        (Wanted("blocks.0.norm", "weight", (7,), ((0, 6),), part), r"has shape \[6\]"),
        (Wanted("blocks.0.norm", "weight", (6,), ((1, 7),), part), r"1:7\] of shape \[6\], which"),
        (Wanted("blocks.0.norm", "momentum", (6,), ((0, 6),), part), "was not saved"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path, [want])


def test_pieces_that_do_not_tile_are_never_committed(tmp_path):
    some = [p for p in cut(0, 1, 5, 0) if p.name != "blocks.0.norm"]
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm"):
        finished(tmp_path, 5, some)
    assert list(tmp_path.iterdir()) == []


def test_inspection_counts(tmp_path):
    path = save(tmp_path, 7)
    answer = checkpoint.inspect(path)
    elements = sum(torch.Size(s).numel() for s in SHAPES.values())
    assert answer == checkpoint.Inspection(7, "tp2", True, 3, elements * 2 * 4, ())


def test_the_first_different_field_is_named(tmp_path):
    held = checkpoint.verify(save(tmp_path, 7, optimizer={"betas": (0.9, 0.95)}))
    same = header(optimizer={"betas": [0.9, 0.95]}, plan="dp4")
    assert manifest.first_difference(held, same) is None
    other = header(model={"layers": 2}, optimizer={"betas": [0.9, 0.95]})
    assert manifest.first_difference(held, other) == manifest.Difference("model.layers", 1, 2)


def test_a_tensor_that_the_stated_model_lacks_is_named():
    assert manifest.foreign_tensors(SHAPES, dict(SHAPES)) is None
    name, text = manifest.foreign_tensors(SHAPES, {**SHAPES, "blocks.9.norm": (6,)})
    assert name == "blocks.9.norm" and "another model than its manifest states" in text
    name, text = manifest.foreign_tensors(SHAPES, {**SHAPES, "blocks.0.norm": (7,)})
    assert name == "blocks.0.norm" and "[6]" in text and "[7]" in text


def test_a_start_says_where_it_goes_on_and_keeps_metrics_of_what_was_lost(tmp_path):
    """Steps that no checkpoint holds are told before the next start, by it, and kept."""
    job = verify_jobs.job(tmp_path, "1mb")
    folder, checkpoints = tmp_path / "tiny", tmp_path / "tiny" / "checkpoints"
    (folder / "logs").mkdir(parents=True)
    assert outlook(checkpoints).startswith("no checkpoint was written yet")
    first = prepare(job, judged(job), folder, False).notices
    for number, steps in ((1, 3), (2, 1)):
        lines = "".join(json.dumps({"step": i + 1}) + "\n" for i in range(steps))
        (folder / "metrics.jsonl").write_text(lines)
        *others, told = prepare(job, judged(job), folder, False).notices
        assert tuple(others) == first
        assert "holds no checkpoint, so it starts anew" in told and f"of {steps} step" in told
        assert told.endswith(f"metrics-{number}.jsonl") and not (folder / "metrics.jsonl").exists()
        assert (folder / f"metrics-{number}.jsonl").read_text() == lines
    saved = alone(checkpoints, 40).parent
    assert outlook(saved) == "start the job again to go on from step 40"

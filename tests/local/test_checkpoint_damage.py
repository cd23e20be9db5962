"""A damaged checkpoint is refused with file and tensor named; an older one needs leave."""

import os
import pickle
import shutil

import msgspec
import pytest
import torch
from saves import SHAPES, cut, flip, load, save

from partita.base.errors import CheckpointError
from partita.train.checkpoints import checkpoint, manifest
from partita.train.checkpoints.pieces import Piece, write_pieces


def edit(path, change):
    """Edits a manifest and seals it again, so that only the change is left to find."""
    held = msgspec.json.decode((path / "manifest.json").read_bytes(), type=manifest.Manifest)
    (path / "manifest.json").write_bytes(manifest.encode(change(held)))


def edit_piece(**fields):
    def change(held):
        first = msgspec.structs.replace(held.pieces[0], **fields)
        return msgspec.structs.replace(held, pieces=(first, *held.pieces[1:]))

    return lambda path, other: edit(path, change)


def edit_model(tensors):
    return lambda path, other: edit(path, lambda held: with_header(held, tensors=tensors))


def replace_text(old, new):
    def damage(path, other):
        text = (path / "manifest.json").read_text()
        assert old in text
        (path / "manifest.json").write_text(text.replace(old, new, 1))

    return damage


def with_header(held, **fields):
    return msgspec.structs.replace(held, header=msgspec.structs.replace(held.header, **fields))


def with_file(held, **fields):
    first = msgspec.structs.replace(held.files[0], **fields)
    return msgspec.structs.replace(held, files=(first, *held.files[1:]))


def twice(path, other):
    """The first rank's half of a tensor in the second's file too, in place of its own."""
    held = checkpoint.verify(path)
    mine = [e for e in held.pieces if e.file == "rank-0.safetensors"]
    parts = [Piece(e.name, e.role, e.box, torch.zeros([b - a for a, b in e.box])) for e in mine]
    theirs = [p for p in cut(1, 2, 20, 0) if p.name != "blocks.0.norm"]
    file = path / "rank-1.safetensors"
    file.unlink()
    stated = {"format": "partita", "save_id": held.save_id, "step": str(held.step)}
    parts = [p for p in parts if p.name == "blocks.0.norm"] + theirs
    wrote = write_pieces(file, parts, stated)
    files, pieces = (held.files[0], wrote.file), (*mine, *wrote.pieces)
    sealed = msgspec.structs.replace(held, files=files, pieces=pieces)
    (path / "manifest.json").write_bytes(manifest.encode(sealed))


def _emptied(path):
    path.write_bytes(b"")
    return path


DAMAGE = {
    "truncated": (
        lambda p, o: (p / "rank-1.safetensors").write_bytes(
            (p / "rank-1.safetensors").read_bytes()[:-5]
        ),
        r"rank-1\.safetensors: is not a whole",
    ),
    "empty file": (lambda p, o: (p / "rank-1.safetensors").write_bytes(b""), "rank-1"),
    "flipped bit": (
        lambda p, o: flip(p / "rank-1.safetensors", -1),
        r"rank-1\.safetensors: exp_avg:embedding.table.* differs from its digest",
    ),
    "flipped header": (lambda p, o: flip(p / "rank-1.safetensors", 30), r"rank-1.*header differs"),
    "piece of another step": (
        lambda p, o: shutil.copy(o / "rank-0.safetensors", p / "rank-0.safetensors"),
        r"rank-0\.safetensors: belongs to another save",
    ),
    "a rank's file missing": (
        lambda p, o: (p / "rank-1.safetensors").unlink(),
        r"rank-1\.safetensors: listed",
    ),
    "no manifest": (lambda p, o: (p / "manifest.json").unlink(), "not a whole checkpoint"),
    "a manifest that never ends": (
        lambda p, o: (
            (p / "manifest.json").unlink(),
            os.mkfifo(p / "manifest.json"),
        ),
        "no plain file",
    ),
    "a manifest outside": (
        lambda p, o: (
            (p / "manifest.json").unlink(),
            (p / "manifest.json").symlink_to(o / "manifest.json"),
        ),
        "no plain file",
    ),
    "a huge hole as a manifest": (
        lambda p, o: os.truncate(_emptied(p / "manifest.json"), 1 << 40),
        "not a manifest",
    ),
    "more ranks than there can be": (
        lambda p, o: edit(p, lambda held: msgspec.structs.replace(held, world=10**12)),
        "files of 1000000000000 ranks are expected",
    ),
    "half a manifest": (
        lambda p, o: (p / "manifest.json").write_bytes((p / "manifest.json").read_bytes()[:300]),
        "not a manifest",
    ),
    "a pickle as a piece": (
        lambda p, o: (p / "rank-0.safetensors").write_bytes(pickle.dumps({"a": [1] * 99})),
        r"rank-0\.safetensors: is a pickle",
    ),
    "torch.save as a piece": (
        lambda p, o: torch.save({"a": torch.ones(3)}, p / "rank-0.safetensors"),
        r"rank-0\.safetensors: is a pickle or zip",
    ),
    "a pickle beside": (
        lambda p, o: (p / ".metadata").write_bytes(pickle.dumps([1])),
        r"\.metadata: a pickle",
    ),
    "another model stated": (
        edit_model({**SHAPES, "blocks.0.norm": (7,)}),
        r"blocks\.0\.norm: the pieces hold 6 elements, the stated model 7",
    ),
    "a tensor the model lacks": (
        edit_model({k: v for k, v in SHAPES.items() if "wq" not in k}),
        r"no tensor blocks\.0\.wq",
    ),
    "a tensor more": (edit_model({**SHAPES, "new": (2,)}), "weight of new: the pieces hold 0"),
    "an edited model field": (replace_text('"layers": 1', '"layers": 2'), "its own digest"),
    "an edited step": (replace_text('"step": 20', '"step": 21'), "its own digest"),
    "a path outside": (
        edit_piece(file="../step-00000010/rank-0.safetensors"),
        r"'\.\./step-00000010/rank-0\.safetensors', which is not a file of this save",
    ),
    "an absolute path": (edit_piece(file="/etc/passwd"), "not a file of this save"),
    "a link outside": (
        lambda p, o: (
            (p / "rank-0.safetensors").unlink(),
            (p / "rank-0.safetensors").symlink_to(o / "rank-0.safetensors"),
        ),
        "not a plain file",
    ),
    "another dtype": (edit_piece(dtype="F64"), r"is F32\[4, 6\], manifest.json says F64"),
    "another box": (edit_piece(box=((1, 5), (0, 6))), "under another piece's key"),
    "a box outside": (edit_piece(box=((6, 10), (0, 6))), "lies outside the stated shape"),
    "bytes at the end": (
        lambda p, o: (p / "rank-1.safetensors").write_bytes(
            (p / "rank-1.safetensors").read_bytes() + b"x"
        ),
        r"rank-1\.safetensors: is not a whole",
    ),
    "a byte that is no text": (
        lambda p, o: flip(
            p / "manifest.json", (p / "manifest.json").read_bytes().index(b"tp2"), 128
        ),
        "not a manifest",
    ),
    "a piece twice, another not": (twice, r"\[0:3\] and \[0:3\] hold the same elements"),
    "frozen weights that are none": (
        lambda p, o: edit(p, lambda held: with_header(held, optimizer={"frozen": [{}]})),
        "no list of names",
    ),
    "another size": (
        lambda p, o: edit(p, lambda held: with_file(held, bytes=1)),
        r"rank-0\.safetensors: has \d+ bytes, manifest.json says 1",
    ),
    "an old pickle below": (
        lambda p, o: ((p / "more").mkdir(), (p / "more/a.pkl").write_bytes(pickle.dumps([1], 0))),
        r"a\.pkl: a pickle",
    ),
    "another format": (replace_text('"format": 1', '"format": 2'), "format 2"),
    "an unknown key": (replace_text('"world"', '"wurld"'), "wurld"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name_and_an_older_one_needs_leave(tmp_path, damage):
    old, path = save(tmp_path, 10), save(tmp_path, 20)
    hurt, message = DAMAGE[damage]
    hurt(path, old)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.newest_complete(tmp_path)
    assert caught.value.exit_code == 66 and str(path) in str(caught.value.file)
    answer = checkpoint.inspect(path, digests=True)
    assert answer.problems and not answer.complete
    if damage not in ("a pickle beside", "an old pickle below"):
        with pytest.raises(CheckpointError):
            load(path)
    assert checkpoint.newest_complete(tmp_path, allow_fallback=True) == old


def test_a_bad_only_checkpoint_is_refused_with_leave_too(tmp_path):
    path = save(tmp_path, 10)
    flip(path / "rank-0.safetensors", -1)
    with pytest.raises(CheckpointError):
        checkpoint.newest_complete(tmp_path, allow_fallback=True)

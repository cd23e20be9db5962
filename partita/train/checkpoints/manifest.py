"""manifest.json: what a checkpoint holds, piece by piece, with digests.

    step-00000100/
      manifest.json            format, save id, step, plan, model, fingerprints, every piece
      rank-0.safetensors ...   the pieces each rank wrote; the save id stands in each file's header

A piece is a box of a logical tensor: any plan loads any checkpoint by intersecting boxes. The boxes
of a tensor's role tile it once. Reading a manifest checks it whole: an older format, an edited field, a
path outside the folder, a box outside its tensor, one that is there twice, a tensor not covered are
CheckpointErrors.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from partita.base.errors import CheckpointError
from partita.spec.layout import Box

FORMAT = 1
MANIFEST = "manifest.json"
AMAX = "amax"  # a role beside those of weights: what a rank's fp8 scales look back at, each rank's its own


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a save states about the run. Free of the mesh but for `plan`, which is told, not obeyed.

    `tensors` maps every weight's name to its logical shape; `roles` lists what is kept of each
    ("weight", "exp_avg", ...); the other fields are compared at a resume, field by field.
    """

    plan: str
    tensors: dict[str, tuple[int, ...]]
    roles: tuple[str, ...] = ("weight",)
    model: dict[str, Any] = {}
    tokenizer: dict[str, Any] = {}
    data: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    state: dict[str, Any] = {}  # seed, update count and the like: whatever the loop resumes by

    def frozen(self) -> frozenset[str]:
        """Weights that are not trained: nothing is kept of them but themselves, in what they compute in."""
        return frozenset(self.optimizer.get("frozen", ()))

    def roles_of(self, name: str) -> tuple[str, ...]:
        """What is kept of a weight."""
        return ("weight",) if name in self.frozen() else self.roles


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One piece: box `box` of role `role` of tensor `name`, under `key` in `file`."""

    file: str
    key: str
    name: str
    role: str
    box: Box
    dtype: str
    bytes: int
    digest: str


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's file: its size in bytes, and the digest of all that stands before the pieces."""

    file: str
    bytes: int
    head_digest: str


class Listing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank wrote."""

    file: File
    pieces: tuple[Entry, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint's contents; `digest` is over everything else in it."""

    format: int
    save_id: str
    step: int
    world: int
    header: Header
    files: tuple[File, ...]
    pieces: tuple[Entry, ...]
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first field in which a checkpoint and a job disagree."""

    field: str
    checkpoint: object
    job: object


def encode(manifest: Manifest) -> bytes:
    """The file's bytes, with the digest filled in."""
    sealed = msgspec.structs.replace(manifest, digest=_digest(manifest))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=1) + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step folder, checked. Raises CheckpointError naming file and tensor."""
    path = folder / MANIFEST
    try:
        manifest = msgspec.json.decode(_raw(path), type=Manifest)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no readable {MANIFEST} ({error.strerror}): not a whole checkpoint",
            file=str(path),
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a manifest: {error}", file=str(path)) from error
    for problem, key in chain(_entry_problems(manifest), _cover_problems(manifest)):
        raise CheckpointError(f"{path}: {problem}", file=str(path), key=key)
    if manifest.digest != _digest(manifest):
        raise CheckpointError(
            f"{path}: its own digest does not match: a field was changed after the save",
            file=str(path),
        )
    return manifest


def _raw(path: Path) -> bytes:
    """Of an object alone: what is anything else may be endless, or outside the folder."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(errno.EINVAL, "it is no plain file")
    with path.open("rb") as file:
        head = file.read(1)
        return head + file.read() if head == b"{" else head


def box_text(box: Box) -> str:
    """'0:4,8:16': a box as it stands in keys and messages."""
    return ",".join(f"{a}:{b}" for a, b in box)


def piece_key(name: str, role: str, box: Box) -> str:
    """A piece's name within its file: 'weight:blocks.0.mlp.down[0:4,8:16]'."""
    return f"{role}:{name}[{box_text(box)}]"


def box_size(box: Box) -> int:
    """Elements in a box."""
    return prod(b - a for a, b in box)


def first_difference(manifest: Manifest, job: Header) -> Difference | None:
    """The first field of model, tokenizer, optimizer and data that differs from the job's."""
    for section in ("model", "tokenizer", "optimizer", "data"):
        mine, theirs = (_plain(getattr(h, section)) for h in (manifest.header, job))
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                return Difference(f"{section}.{key}", mine.get(key), theirs.get(key))
    return None


def foreign_tensors(
    held: Mapping[str, tuple[int, ...]], stated: Mapping[str, tuple[int, ...]]
) -> tuple[str, str] | None:
    """(tensor, what is wrong) where the tensors held are not those of the stated model."""
    for name in sorted({*held, *stated}):
        mine, theirs = held.get(name), stated.get(name)
        if mine != theirs:
            here = f"of shape {list(mine)}" if mine else "not there"
            there = f"has shape {list(theirs)}" if theirs else "is not there"
            text = "it holds tensors of another model than its manifest states: "
            return name, f"{text}{name} is {here}, in the stated model it {there}"
    return None


def _plain(section: dict[str, Any]) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(section))


def _digest(manifest: Manifest) -> str:
    bare = msgspec.json.encode(msgspec.structs.replace(manifest, digest=""), order="deterministic")
    return xxhash.xxh3_128_hexdigest(bare)


def _entry_problems(manifest: Manifest):
    if manifest.format != FORMAT:
        yield f"format {manifest.format}; this version reads format {FORMAT}", None
    frozen = manifest.header.optimizer.get("frozen", [])
    if not isinstance(frozen, list) or not all(isinstance(name, str) for name in frozen):
        yield f"the frozen weights are {frozen!r:.100}, no list of names", None
        return
    files = {f"rank-{rank}.safetensors" for rank in range(len(manifest.files))}
    if manifest.world != len(files) or {held.file for held in manifest.files} != files:
        yield f"files of {manifest.world} ranks are expected, each once", None
    for entry in manifest.pieces:
        where = f"{entry.role} of {entry.name}[{box_text(entry.box)}]"
        if entry.file not in files:
            yield f"{where} lies in {entry.file!r}, which is not a file of this save", entry.name
        if entry.role == AMAX:  # of no weight's shape: no plan but the same one reads it
            continue
        shape = manifest.header.tensors.get(entry.name)
        if shape is None:
            yield f"{where}: the stated model has no tensor {entry.name}", entry.name
        elif not inside(entry.box, shape):
            yield f"{where} lies outside the stated shape {list(shape)}", entry.name
        elif entry.key != piece_key(entry.name, entry.role, entry.box):
            yield f"{where} lies under another piece's key, {entry.key}", entry.name
        elif entry.role not in manifest.header.roles:
            yield f"{where}: the stated roles are {', '.join(manifest.header.roles)}", entry.name


def inside(box: Box, shape: tuple[int, ...]) -> bool:
    """Whether a box is one of a tensor of this shape: within its bounds, not empty."""
    return len(box) == len(shape) and all(
        0 <= a < b <= n for (a, b), n in zip(box, shape, strict=True)
    )


def _cover_problems(manifest: Manifest):
    held: defaultdict[tuple[str, str], list[Box]] = defaultdict(list)
    for entry in manifest.pieces:
        held[entry.name, entry.role].append(entry.box)
    frozen = manifest.header.frozen()
    for name, shape in manifest.header.tensors.items():
        for role in ("weight",) if name in frozen else manifest.header.roles:
            boxes = held[name, role]
            size = sum(map(box_size, boxes))
            if size != prod(shape):
                yield (
                    f"{role} of {name}: the pieces hold {size} elements, the stated "
                    f"model {prod(shape)} ({list(shape)})",
                    name,
                )
            elif twice := overlap(tuple(boxes)):
                a, b = map(box_text, twice)
                yield f"{role} of {name}: the pieces [{a}] and [{b}] hold the same elements", name


@lru_cache(maxsize=256)  # of equal layers, and of the roles of a weight, boxes are the same
def overlap(boxes: tuple[Box, ...]) -> tuple[Box, Box] | None:
    """Two boxes of one tensor that share an element. Swept along the dim in which most of them differ."""
    if len(boxes) < 2:
        return None
    starts = [{side[0] for side in sides} for sides in zip(*boxes, strict=True)]
    along = max(range(len(starts)), key=lambda d: len(starts[d]), default=0)
    open_: list[Box] = []
    for box in sorted(boxes, key=lambda box: box[along]):
        open_ = [other for other in open_ if other[along][1] > box[along][0]]
        for other in open_:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                return other, box
        open_.append(box)
    return None

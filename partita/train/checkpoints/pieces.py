"""Pieces in safetensors files: written in a stream, read by intersecting boxes, digests verified.

The library reads (and refuses truncated, overlapping and oversized files). Writing is ours: the
library copies every tensor into bytes first, so a rank would hold its state twice, and it does not
hand on the disk's error.
"""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from partita.base.errors import CheckpointError
from partita.spec.layout import Box, intersect
from partita.train.checkpoints.manifest import (
    MANIFEST,
    Entry,
    File,
    Listing,
    Manifest,
    box_size,
    box_text,
    inside,
    piece_key,
)

DTYPES = {  # torch's, safetensors' name
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
CONVERTIBLE = {"F32", "F64"}  # masters and optimizer states under plans of other precision
WORKING = CONVERTIBLE | {"BF16", "F16"}  # weights without masters are stored as they compute
PICKLES = (b"\x80", b"PK\x03\x04")  # a bare pickle, torch's zip
PICKLED = (
    ".pkl",
    ".pickle",
    ".pt",
    ".pth",
    ".bin",
    ".ckpt",
)  # names of files; old pickles are plain text


@dataclass(frozen=True, slots=True)
class Piece:
    """Box `box` of the logical tensor `name`, in role "weight", "exp_avg", ...

    `tensor` holds the box's elements in row-major order, in any shape; it may be a view.
    """

    name: str
    role: str
    box: Box
    tensor: Tensor

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return DTYPES[self.tensor.dtype]

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return self.tensor.numel() * self.tensor.element_size()

    def raw(self) -> Any:
        """Its bytes; no copy where it is contiguous and on the host."""
        return _raw(self.tensor)

    def copied(self) -> Copied:
        """Its values as they are now, on the host."""
        return Copied(self.name, self.role, self.box, self.dtype, np.array(self.raw()))


@dataclass(frozen=True, slots=True)
class Copied:
    """A piece's values at one moment; no tensor, so that the ledger of a step does not meet it."""

    name: str
    role: str
    box: Box
    dtype: str
    held: np.ndarray

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return self.held.nbytes

    def raw(self) -> Any:
        """Its bytes."""
        return self.held


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box to fill: `tensor` (contiguous, any shape) receives its elements in row-major order.

    `shape` is the logical tensor's; the checkpoint must state the same.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor


def durable_write(path: Path, chunks: Iterable[Any]) -> None:
    """Writes buffers into a new file and flushes it to the disk; OSError where it cannot."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_pieces(path: Path, pieces: Iterable[Piece | Copied], metadata: dict[str, str]) -> Listing:
    """Writes the pieces as one safetensors file, flushed to disk; returns what it holds."""
    named = {piece_key(p.name, p.role, p.box): p for p in pieces if p.bytes}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, piece in named.items():
        end = offset + piece.bytes
        shape = [b - a for a, b in piece.box]
        header[key] = {"dtype": piece.dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8
    head = struct.pack("<Q", len(text)) + text
    entries: list[Entry] = []

    def chunks() -> Iterator[Any]:
        yield head
        for key, piece in named.items():
            raw = piece.raw()
            yield raw
            entries.append(_entry(path.name, key, piece, raw))

    durable_write(path, chunks())
    file = File(path.name, len(head) + offset, xxhash.xxh3_128_hexdigest(head))
    return Listing(file, tuple(entries))


def fill(folder: Path, manifest: Manifest, wanted: Sequence[Wanted]) -> None:
    """Copies into every wanted tensor from the pieces that meet its box."""
    by_tensor: defaultdict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in manifest.pieces:
        by_tensor[entry.name, entry.role].append(entry)
    use: defaultdict[str, dict[str, tuple[Entry, list[Wanted]]]] = defaultdict(dict)
    for want in wanted:
        _check_wanted(folder, manifest, want)
        found = 0
        for entry in by_tensor[want.name, want.role]:
            if common := intersect(entry.box, want.box):
                found += box_size(common)
                use[entry.file].setdefault(entry.key, (entry, []))[1].append(want)
        if found != box_size(want.box):
            raise _bad(
                folder / MANIFEST,
                f"{want.role} of {want.name}[{box_text(want.box)}]: the pieces hold {found} of its "
                f"{box_size(want.box)} elements",
                want.name,
            )
    for file in sorted(use):
        with _open(folder, file, manifest) as source:
            for entry, wants in use[file].values():
                piece = _read(folder / file, source, entry)
                for want in wants:
                    _copy(folder / file, piece, entry, want)


def own_pieces(folder: Path, manifest: Manifest, rank: int, role: str) -> dict[str, Tensor]:
    """What the file of `rank` holds in this role, by name, whatever it is a part of."""
    file = f"rank-{rank}.safetensors"
    entries = [e for e in manifest.pieces if e.role == role and e.file == file]
    if not entries:
        return {}
    with _open(folder, file, manifest) as source:
        return {entry.name: _read(folder / file, source, entry) for entry in entries}


def file_problems(folder: Path, manifest: Manifest, *, digests: bool) -> Iterator[CheckpointError]:
    """What is wrong with the files of a checkpoint, one error each; digests read every byte."""
    yield from _foreign(folder, manifest)
    by_file: defaultdict[str, list[Entry]] = defaultdict(list)
    for rank in range(manifest.world):
        by_file[f"rank-{rank}.safetensors"] = []
    for entry in manifest.pieces:
        by_file[entry.file].append(entry)
    for file, entries in by_file.items():
        try:
            with _open(folder, file, manifest) as source:
                stray = sorted(set(source.keys()) - {entry.key for entry in entries})
                if stray:
                    raise _bad(
                        folder / file, f"holds {stray[0]}, which {MANIFEST} does not list", stray[0]
                    )
                for entry in entries:
                    _check_piece(folder / file, source, entry)
                    if digests:
                        _read(folder / file, source, entry)
        except CheckpointError as error:
            yield error


def _entry(file: str, key: str, piece: Piece | Copied, raw: Any) -> Entry:
    digest = xxhash.xxh3_128_hexdigest(raw)
    return Entry(file, key, piece.name, piece.role, piece.box, piece.dtype, len(raw), digest)


def _raw(tensor: Tensor) -> Any:
    """The tensor's bytes as a buffer; no copy where it is contiguous and on the host."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _bad(path: Path, message: str, key: str | None = None) -> CheckpointError:
    return CheckpointError(f"{path}: {message}", file=str(path), key=key)


@contextmanager
def _open(folder: Path, file: str, manifest: Manifest) -> Iterator[Any]:
    """The opened safetensors file, after checks that it is one and belongs to this save."""
    path = folder / file
    if path.is_symlink() or not path.is_file():
        raise _bad(path, f"listed in {MANIFEST} but missing, or not a plain file")
    held = next(f for f in manifest.files if f.file == file)
    try:
        head = _head(path)
        source = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _bad(path, f"is not a whole safetensors file: {error}") from error
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror or error}") from error
    with source:
        metadata = source.metadata() or {}
        for field, expected in (("save_id", manifest.save_id), ("step", str(manifest.step))):
            if metadata.get(field) != expected:
                raise _bad(
                    path,
                    f"belongs to another save: {field} {metadata.get(field)}, the manifest's is "
                    f"{expected}",
                )
        if xxhash.xxh3_128_hexdigest(head) != held.head_digest:
            raise _bad(path, "its header differs from its digest: its bytes changed")
        if path.stat().st_size != held.bytes:
            raise _bad(path, f"has {path.stat().st_size} bytes, {MANIFEST} says {held.bytes}")
        yield source


def _head(path: Path) -> bytes:
    """All that stands before the pieces' bytes: the header's length and the header."""
    with path.open("rb") as raw:
        start = raw.read(9)
        # safetensors begins with its header's length, any 8 bytes, and then the header's '{'.
        if start.startswith(PICKLES) and start[8:9] != b"{":
            raise _bad(path, "is a pickle or zip, not safetensors; pickles are never opened")
        length = min(int.from_bytes(start[:8], "little"), path.stat().st_size)
        return start + raw.read(max(0, length - 1))


def _check_piece(path: Path, source: Any, entry: Entry) -> None:
    try:
        view = source.get_slice(entry.key)
    except SafetensorError as error:
        raise _bad(path, f"{entry.key} is missing: {error}", entry.name) from error
    shape = [b - a for a, b in entry.box]
    if view.get_dtype() != entry.dtype or list(view.get_shape()) != shape:
        raise _bad(
            path,
            f"{entry.key} is {view.get_dtype()}{list(view.get_shape())}, {MANIFEST} says "
            f"{entry.dtype}{shape}",
            entry.name,
        )


def _read(path: Path, source: Any, entry: Entry) -> Tensor:
    _check_piece(path, source, entry)
    tensor = source.get_tensor(entry.key)
    if xxhash.xxh3_128_hexdigest(_raw(tensor)) != entry.digest:
        raise _bad(path, f"{entry.key} differs from its digest: its bytes changed", entry.name)
    return tensor


def _check_wanted(folder: Path, manifest: Manifest, want: Wanted) -> None:
    stated = manifest.header.tensors.get(want.name)
    if stated != tuple(want.shape) or not inside(want.box, stated):
        held = "is not in it" if stated is None else f"has shape {list(stated)} in it"
        raise _bad(
            folder / MANIFEST,
            f"the model needs {want.name}[{box_text(want.box)}] of shape {list(want.shape)}, "
            f"which {held}",
            want.name,
        )
    if want.role not in manifest.header.roles:
        raise _bad(
            folder / MANIFEST,
            f"{want.role} of {want.name} was not saved; it holds {', '.join(manifest.header.roles)}",
            want.name,
        )


def _copy(path: Path, piece: Tensor, entry: Entry, want: Wanted) -> None:
    have, need = entry.dtype, DTYPES[want.tensor.dtype]
    convertible = WORKING if want.role == "weight" else CONVERTIBLE
    if have != need and not {have, need} <= convertible:
        raise _bad(path, f"{entry.key} is {have}, the run keeps {need}", entry.name)
    common = intersect(entry.box, want.box)
    if common is None:
        return
    target = want.tensor.detach().view([b - a for a, b in want.box])
    target[_slices(common, want.box)].copy_(piece[_slices(common, entry.box)])


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(inner, outer, strict=True))


def _foreign(folder: Path, manifest: Manifest) -> Iterator[CheckpointError]:
    """Pickles lying beside the pieces: nobody would read them, but the folder is not ours then."""
    known = {MANIFEST, *(f"rank-{rank}.safetensors" for rank in range(manifest.world))}
    for path in sorted(folder.rglob("*")):
        if (path.parent == folder and path.name in known) or not path.is_file():
            continue
        with path.open("rb") as raw:
            if raw.read(4).startswith(PICKLES) or path.name.endswith(PICKLED):
                yield _bad(path, "a pickle lies in the checkpoint; it is refused, never opened")

"""Megatron's token files, read and written: PREFIX.bin holds ids, PREFIX.idx says where documents lie.

.idx    9 bytes   MMIDIDX\\0\\0
        uint64    1, the version
        uint8     the ids' type: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6, 7: floats)
        uint64    num_sequences n, then uint64 num_entries of the document index
        int32 n   tokens of each sequence
        int64 n   the byte of .bin where each begins
        int64     the document index: the first sequence of each document, and at last n
        int8 n    perhaps: modes, of data that is not only text (not read)
.bin    the sequences, one behind the other
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from partita.base.errors import DataError, UsageError

MAGIC = b"MMIDIDX\x00\x00"
CODES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16",
}  # fmt: skip
HEAD = struct.Struct("<9sQBQQ")  # 34 bytes
SMALL_VOCAB = 65500  # Megatron's own border for uint16
LONGEST = 2**31 - 1


@dataclass(frozen=True)
class Tokens:
    """`ids` [n], mapped to memory; `starts` [documents], the token each document begins at."""

    ids: np.ndarray
    starts: np.ndarray


def prefix_of(source: str) -> Path | None:
    """PREFIX where a source is PREFIX, PREFIX.bin or PREFIX.idx of token files, else None."""
    path = Path(source).expanduser()
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix("")
    return path if not path.exists() and _part(path, ".idx").exists() else None


def _part(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def files_of(prefix: Path, key: str) -> tuple[Path, Path]:
    """PREFIX.idx and PREFIX.bin. Raises UsageError where one is missing."""
    index, held = _part(prefix, ".idx"), _part(prefix, ".bin")
    for path in (index, held):
        if not path.is_file():
            raise UsageError(f"{key}: {path}: no such file", file=str(path), key=key)
    return index, held


def read(prefix: Path, key: str = "data.source") -> Tokens:
    """The tokens of a prefix, checked: every length, place and document of the index.

    Raises UsageError for a missing file, DataError (file and place) for anything else.
    """
    index, held = files_of(prefix, key)
    raw = np.memmap(index, mode="r") if index.stat().st_size else np.zeros(0, np.uint8)
    dtype, n, entries = _head(index, bytes(raw[: HEAD.size]))
    lengths, places, documents = _columns(index, raw, n, entries)
    ends = np.cumsum(lengths, dtype=np.int64)
    for wrong, what in (
        (lengths < 0, "has a length below 0"),
        (
            places != (ends - lengths) * dtype.itemsize,
            "does not begin where the one before it ends",
        ),
    ):
        if wrong.any():
            raise _bad(index, f"sequence {int(wrong.argmax())} {what}")
    if documents[0] != 0 or documents[-1] != n or (np.diff(documents) < 0).any():
        raise _bad(index, f"its document index does not rise from 0 to {n}, the sequences")
    size, total = held.stat().st_size, int(ends[-1]) if n else 0
    if size != total * dtype.itemsize:
        raise _bad(
            held,
            f"{size} bytes; {index.name} states {total} tokens of {dtype}, {total * dtype.itemsize} bytes",
        )
    starts = np.concatenate([[0], ends])[documents[:-1]]
    ids = np.memmap(held, dtype, mode="r") if total else np.zeros(0, dtype)
    return Tokens(ids, starts)


def _head(index: Path, head: bytes) -> tuple[np.dtype, int, int]:
    if not head.startswith(MAGIC):
        raise _bad(index, f"byte 0: begins {head[:9]!r}, an index begins {MAGIC!r}")
    if len(head) < HEAD.size:
        raise _bad(index, f"{len(head)} bytes; its head alone has {HEAD.size}")
    _, version, code, n, entries = HEAD.unpack(head)
    if version != 1:
        raise _bad(index, f"byte 9: version {version}; 1 is read")
    if CODES.get(code, "float").startswith("float"):
        known = ", ".join(f"{c} {name}" for c, name in CODES.items() if "int" in name)
        raise _bad(index, f"byte 17: type {code} ({CODES.get(code, 'unknown')}); ids are {known}")
    return np.dtype(CODES[code]).newbyteorder("<"), n, entries


def _columns(index: Path, raw: np.ndarray, n: int, entries: int) -> list[np.ndarray]:
    """Lengths, places and the document index."""
    sizes = [4 * n, 8 * n, 8 * entries]
    wanted = HEAD.size + sum(sizes)
    if entries < 1 or len(raw) not in (wanted, wanted + n):
        raise _bad(
            index,
            f"{len(raw)} bytes; {n} sequences and {entries} entries of documents take {wanted}",
        )
    edges = np.cumsum([HEAD.size, *sizes])
    return [
        np.frombuffer(raw, dtype, (b - a) // np.dtype(dtype).itemsize, int(a))
        for dtype, a, b in zip(("<i4", "<i8", "<i8"), edges, edges[1:], strict=False)
    ]


def _bad(path: Path, message: str) -> DataError:
    return DataError(f"{path}: {message}", file=str(path), key="data.source")


def write(prefix: Path, documents: Iterable[Sequence[int] | np.ndarray], *, vocab: int) -> int:
    """Writes PREFIX.bin and PREFIX.idx, each document one sequence; returns the tokens written.

    Ids are uint16 for a vocabulary below 65,500, else int32, as Megatron chooses. One document is in
    memory at a time. Raises DataError for an id outside [0, vocab).
    """
    dtype = np.dtype("<u2" if vocab < SMALL_VOCAB else "<i4")
    lengths: list[int] = []

    def chunks() -> Iterator[bytes]:
        for document in documents:
            ids = np.asarray(document, np.int64)
            bad = (ids < 0) | (ids >= vocab)
            if bad.any():
                at = int(bad.argmax())
                raise _bad(
                    prefix,
                    f"document {len(lengths)}: token {at} is {ids[at]}, outside [0, {vocab})",
                )
            if len(ids) > LONGEST:
                raise _bad(
                    prefix, f"document {len(lengths)} has {len(ids)} tokens; {LONGEST} at most"
                )
            lengths.append(len(ids))
            yield ids.astype(dtype).tobytes()

    _whole(_part(prefix, ".bin"), chunks())
    counts = np.asarray(lengths, "<i4")
    places = (np.cumsum(counts, dtype="<i8") - counts) * dtype.itemsize
    code = next(c for c, name in CODES.items() if np.dtype(name).newbyteorder("<") == dtype)
    head = HEAD.pack(MAGIC, 1, code, len(counts), len(counts) + 1)
    index = np.arange(len(counts) + 1, dtype="<i8")
    _whole(_part(prefix, ".idx"), [head, counts.tobytes(), places.tobytes(), index.tobytes()])
    return int(counts.sum(dtype=np.int64))


def _whole(path: Path, chunks: Iterable[bytes]) -> None:
    """A file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

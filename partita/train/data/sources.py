"""Text sources: where the words come from, read lazily, the same on every machine and run.

    python-stdlib           the .py files of the standard library, in sorted order, tests left out
    a path or glob          .txt and the like, in sorted order; or records (records.py): .jsonl (.ndjson,
                            .json), one a line; .parquet and .arrow, one a row
    hf:NAME[:SPLIT]         what a local cache of `datasets` holds (tables.py)

A source is scanned once (size, digest, is it text?) and then gives its passages again and again. The
last `eval_fraction` of it by bytes is held out: nothing of it reaches training or the tokenizer.
"""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from partita.base.errors import DataError, UsageError
from partita.train.data.chat import Chat
from partita.train.data.records import Passage, passages_of
from partita.train.data.tables import HF, SUFFIXES, cached_dataset, lines

STDLIB = "python-stdlib"
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BLOCK = 1 << 20  # bytes read at once
LONGEST_LINE = 1 << 22  # a longer one is cut
LONGEST_RECORD = 1 << 26  # of a .jsonl
ACCEPTED = (
    "python-stdlib, a path or glob of text, .jsonl or .parquet files, a Megatron .bin/.idx prefix, "
    "tokens:FILE.npy, hf:NAME"
)
OTHER_FORMATS = {".bin", ".idx", ".npy"}

JSON_LINES = {".jsonl", ".ndjson", ".json"}
RECORDS = {*JSON_LINES, *SUFFIXES}
MARK = b"\xef\xbb\xbf"  # how some editors begin UTF-8: no text
SIGNATURES = {  # how files begin that are mistaken for text, and what to do
    b"\xff\xfe": "UTF-16; convert it to UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8",
    b"\x1f\x8b": "gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "zstd; unpack it",
    b"BZh": "bzip2; unpack it",
    b"\xfd7zXZ": "xz; unpack it",
    b"PK\x03\x04": "zip; unpack it",
    b"PAR1": "parquet; name it .parquet",
    b"ARROW1": "arrow; name it .arrow",
    b"%PDF": "PDF; take its text out",
}

Part = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class TextSource:
    """Files of text, checked: all of it is UTF-8 without NUL bytes. `sizes` are the files' bytes, of a
    table those of its rows as lines; `digest` is over them."""

    name: str
    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    digest: str
    eval_fraction: float

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.sizes)

    def passages(self, part: Part, chat: Chat | None = None) -> Iterator[Passage]:
        """The passages of the part that is trained on, or of the part held out, in order; `chat` writes
        messages as text (plain unless given).

        Text is cut between the parts at a character, records between two of them.
        """
        border = self.bytes - int(self.bytes * self.eval_fraction)
        before = 0
        for path, size in zip(self.files, self.sizes, strict=True):
            if before < border if part == "train" else before + size > border:
                if _suffix(path) in RECORDS:
                    yield from _records(path, part, border - before, chat or Chat())
                else:
                    yield from _text_passages(path, part, border - before)
            before += size


def open_text(source: str, *, key: str, eval_fraction: float = 0.0) -> TextSource:
    """Finds and checks a text source; `key` is the job's field, for messages.

    Raises UsageError for what does not exist or is not accepted, DataError (file and offset) for
    what is empty, unreadable or not text. Reads every byte once.
    """
    files = text_files(source, key)
    digest = xxhash.xxh3_128()
    sizes = tuple(_scan(path, digest) for path in files)
    if sum(sizes) == 0:
        raise DataError(f"{key} = {source!r} is empty: no text to train on", file=str(files[0]))
    return TextSource(source, tuple(files), sizes, digest.hexdigest(), eval_fraction)


def text_files(source: str, key: str) -> list[Path]:
    """The files of a text source, in order, unread. Raises UsageError as above."""
    if source == STDLIB:
        return _stdlib_files()
    return cached_dataset(source, key) if source.startswith(HF) else _found(source, key)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in root.rglob("*.py") if not STDLIB_LEFT_OUT & set(p.relative_to(root).parts)]
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _found(source: str, key: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise UsageError(
            f"{key} = {source!r} is a folder: name its files, e.g. {source.rstrip('/')}/*.txt",
            file=source,
            key=key,
        )
    files = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 (patterns may be absolute)
    files = [p for p in files if not p.is_dir()] or [path] * path.is_symlink()
    if not files:
        raise UsageError(
            f"{key} = {source!r}: no such file; accepted: {ACCEPTED}", file=source, key=key
        )
    for p in files:
        if not p.is_file():
            lost = p.is_symlink() and not p.exists()
            what = "no plain file: it could not be read again and again"
            what = "a link that leads to no file" if lost else what
            raise UsageError(f"{key} = {source!r}: {p} is {what}", file=str(p), key=key)
        if _suffix(p) in OTHER_FORMATS:
            raise UsageError(
                f"{key} = {source!r}: {p.suffix} is not read as text; accepted: {ACCEPTED}",
                file=str(p),
                key=key,
            )
    return files


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _scan(path: Path, digest: xxhash.xxh3_128) -> int:
    """The file's size; its bytes enter the digest. DataError where it is not text."""
    size = 0
    for offset, line in _blocks(path):
        if _suffix(path) not in SUFFIXES:
            _text(path, offset, line)
        digest.update(line)
        size = offset + len(line)
    digest.update(size.to_bytes(8, "little"))
    return size


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, whole lines) of about BLOCK bytes, without the mark at the file's beginning, of a table one
    row; a line of text longer than LONGEST_LINE is cut, such a record refused."""
    offset, kept = 0, b""
    if _suffix(path) in SUFFIXES:
        for line in lines(path):
            yield offset, line
            offset += len(line)
        return
    try:
        with path.open("rb") as file:
            if file.read(len(MARK)) == MARK:
                offset = len(MARK)
            file.seek(offset)
            while block := file.read(BLOCK):
                kept += block
                end = kept.rfind(b"\n") + 1
                if end == 0 and len(kept) >= LONGEST_LINE:
                    end = _cut(path, offset, kept)
                if end:
                    yield offset, kept[:end]
                    offset, kept = offset + end, kept[end:]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", file=str(path)) from error
    if kept:
        yield offset, kept


def _cut(path: Path, offset: int, kept: bytes) -> int:
    """Where a long line of text ends for us; that of a record is waited for, up to its own limit."""
    if _suffix(path) not in JSON_LINES:
        return _character_border(kept, len(kept))
    if len(kept) >= LONGEST_RECORD:
        text = f"{path}: byte {offset}: a line is longer than {LONGEST_RECORD} bytes: one record a line"
        raise DataError(text, file=str(path))
    return 0


def _character_border(data: bytes, at: int) -> int:
    """The start of the UTF-8 character that holds byte `at` (the last one, where at is the end)."""
    for border in range(min(at, len(data) - 1), max(-1, at - 5), -1):
        if data[border] & 0xC0 != 0x80:
            return border
    return at  # no character is that long: not UTF-8, which reading it will say


def _text(path: Path, offset: int, data: bytes) -> str:
    at = data.find(0)
    known = [what for mark, what in SIGNATURES.items() if offset == 0 and data.startswith(mark)]
    if known and (at >= 0 or not _is_utf8(data)):
        raise DataError(f"{path}: byte 0: it begins as {known[0]}", file=str(path))
    if at >= 0:
        raise DataError(
            f"{path}: byte {offset + at} is NUL: a binary file, not text", file=str(path)
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {offset + error.start} ({data[error.start]:#04x}) is not UTF-8: "
            "a binary file or another encoding; convert it to UTF-8",
            file=str(path),
        ) from error


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _text_passages(path: Path, part: Part, border: int) -> Iterator[Passage]:
    """The text's passages before (train) or after (eval) byte `border`."""
    for offset, block in _blocks(path):
        cut = min(len(block), max(0, border - offset))
        cut = _character_border(block, cut) if cut < len(block) else cut
        mine = block[:cut] if part == "train" else block[cut:]
        if mine:
            yield Passage(_text(path, offset, mine))
    yield Passage("", ends=True)


def _records(path: Path, part: Part, border: int, chat: Chat) -> Iterator[Passage]:
    """The passages of the records that begin before (train) or after (eval) byte `border`."""
    number, word = 0, "row" if _suffix(path) in SUFFIXES else "line"
    for offset, block in _blocks(path):
        for line in block.splitlines(keepends=True):
            number += 1
            if line.strip() and (offset < border) == (part == "train"):
                yield from passages_of(line, path, f"{word} {number}", chat)
            offset += len(line)

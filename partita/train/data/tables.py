"""Tables of records, as lines of JSON: .parquet, .arrow, and what a local cache of `datasets` holds.

A row becomes a line with the columns that records know (`records.py`), so that all that follows is the
same for a table and a .jsonl. pyarrow reads them; nothing is downloaded.

    hf:NAME[:SPLIT]     <owner>___<name>/<config>/<version>/<hash>/<name>-<split>[-00000-of-00002].arrow
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from partita.base.errors import DataError, UsageError
from partita.comm.processes import datasets_cache
from partita.train.data.records import COLUMNS, WANTED

HF = "hf:"
SUFFIXES = {".parquet", ".arrow"}
ROWS = 1024  # read at once
SHARD = re.compile(r"^(?P<name>.+?)-(?P<split>[\w.]+)(-\d{5}-of-\d{5})?\.arrow$")


def lines(path: Path) -> Iterator[bytes]:
    """The rows of a table in order, each as a JSON object ended by a newline. Raises DataError (file and
    row) for what is no table, lacks the columns, or holds what is no text."""
    arrow = _pyarrow(path)
    number = 0
    try:
        with path.open("rb") as file:
            for batch in _batches(arrow, path, file):
                for row in batch.to_pylist():
                    yield _line(row)
                    number += 1
    except (arrow.ArrowException, UnicodeDecodeError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: row {number + 1}: cannot be read: {reason}", file=str(path)
        ) from error


def _line(row: dict[str, Any]) -> bytes:
    held = {k: v for k, v in row.items() if v is not None}
    plain = {k: v.decode() if isinstance(v, bytes) else v for k, v in held.items()}
    return msgspec.json.encode(plain) + b"\n"


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow as arrow
    except ImportError:
        raise UsageError(
            f"{path}: {path.suffix} is read by pyarrow, which is not installed: pip install 'partita[hf]'",
            file=str(path),
            key="data.source",
        ) from None
    return arrow


def _batches(arrow: ModuleType, path: Path, file: Any) -> Iterator[Any]:
    """Record batches of the columns that are known."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        table = parquet.ParquetFile(file)
        kept = _known(path, table.schema_arrow.names)
        yield from table.iter_batches(batch_size=ROWS, columns=kept)
        return
    from pyarrow import ipc

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
    kept = _known(path, reader.schema.names)
    found = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    for batch in found:
        for start in range(0, batch.num_rows, ROWS):
            yield batch.select(kept).slice(start, ROWS)


def _known(path: Path, names: list[str]) -> list[str]:
    kept = [n for n in names if n in COLUMNS]
    if not kept:
        raise DataError(
            f"{path}: its columns are {', '.join(names) or 'none'}; wanted: {WANTED}",
            file=str(path),
        )
    return kept


def cached_dataset(source: str, key: str) -> list[Path]:
    """The files of hf:NAME[:SPLIT] (split 'train' unless stated; 'config/train' where there are several
    configs), newest version. Raises UsageError that says what the cache holds."""
    name, _, split = source.removeprefix(HF).partition(":")
    config, _, split = split.rpartition("/")
    cache = datasets_cache()
    folder = cache / name.replace("/", "___")
    if not name or not folder.is_dir():
        held = sorted(p.name.replace("___", "/") for p in cache.glob("*") if p.is_dir())
        raise UsageError(
            f"{key} = {source!r}: no such data set in {cache}, which holds {', '.join(held) or 'none'}; "
            f"load it once: python -c 'import datasets; datasets.load_dataset(\"{name}\")'",
            key=key,
        )
    found = _splits(folder)
    configs = sorted({c for c, _ in found})
    if not config and len(configs) == 1:
        config = configs[0]
    files = found.get((config, split or "train"))
    if files is None:
        held = ", ".join(f"{HF}{name}:{c}/{s}" for c, s in sorted(found)) or "nothing"
        raise UsageError(f"{key} = {source!r}: the cache holds {held}", key=key)
    return files


def _splits(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """(config, split) -> files of the version that was written last."""
    found: dict[tuple[str, str], list[Path]] = {}
    for version in sorted(folder.glob("*/*/*/"), key=lambda p: p.stat().st_mtime):
        here: dict[tuple[str, str], list[Path]] = {}
        for path in sorted(version.glob("*.arrow")):
            shard = SHARD.match(path.name)
            if shard is not None and not path.name.startswith("cache-"):
                here.setdefault((version.parent.parent.name, shard["split"]), []).append(path)
        found |= here
    return found

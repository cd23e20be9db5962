"""What the verbs print: one JSON document on stdout, or text; everything else goes to stderr."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from partita.base.errors import PartitaError, PlanError, Problem, UsageError, WriteError

FORMAT = 1
PICTURE = re.compile(r"\s*(rank \d+ +)?\|")


def plain(value: Any) -> Any:
    """The value as JSON has it: dataclasses are objects, a number that is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    return value


def write_json(document: Mapping[str, Any]) -> None:
    """The one document of `--json`, on stdout."""
    text = json.dumps(plain({"format": FORMAT, **document}), allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def write_text(text: str) -> None:
    """Text for people, on stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Progress and warnings, on stderr; where that is on a full disk, nowhere."""
    with suppress(OSError):
        sys.stderr.write(text.rstrip("\n") + "\n")
        sys.stderr.flush()


def in_words(lines: Iterable[str]) -> list[str]:
    """Lines of a message, stripped, but for those of a picture below it: 'rank 1 | 1F0 1B1', '| ^-- here'."""
    return [x.strip() for x in lines if not PICTURE.match(x)]


def hold_place(path: Path | None) -> None:
    """Raises UsageError where a file that is asked for can have no place: asked before long work."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist", file=str(path))
    if path.is_dir():
        raise UsageError(f"{path} is a folder, a file is wanted", file=str(path))


def write_file(path: Path, text: str) -> None:
    """A file the user asked for. Raises UsageError where its folder is missing, WriteError where the
    disk refuses."""
    hold_place(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}", file=str(path)) from None
    note(f"wrote {path}")


@contextmanager
def waiting(what: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Of long work that prints nothing before its end: what it is and for how long, on stderr where that is a
    terminal, gone when it is done. Gives what tells how far it is, which may be called from it."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as line:
        task = line.add_task(what, total=None)
        yield lambda text: line.update(task, description=f"{what}  {text}")


def problem_rows(problems: tuple[Problem, ...] | list[Problem]) -> list[dict[str, Any]]:
    """Problems as the contract prints them."""
    return [asdict(p) for p in problems]


def failure_document(error: PartitaError) -> dict[str, Any]:
    """What `--json` answers instead of a result; a plan's problems come with it."""
    document: dict[str, Any] = {
        "error": {
            "kind": error.kind,
            "message": error.message if not isinstance(error, PlanError) else str(error),
            "file": error.file,
            "key": error.key,
        }
    }
    if isinstance(error, PlanError):
        document["problems"] = problem_rows(error.problems)
    return document

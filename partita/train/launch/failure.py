"""`failure.json`: why a run ended, beside its metrics."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = "failure.json"


@dataclass(frozen=True)
class Failure:
    """The first cause, and in `secondary` what followed from it; `stack` of a rank that hangs or crashed,
    the innermost frame first."""

    rank: int
    phase: str
    step: int
    site: str
    message: str
    secondary: list[str] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)

    def write(self, folder: Path, replace: bool = True) -> None:
        """Into the run folder; without `replace` only where no other rank has told its cause. On a
        full disk nothing: the error itself is still raised."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        with suppress(OSError), (folder / FILE).open("w" if replace else "x") as file:
            file.write(text)


def forget(folder: Path) -> None:
    """A run that goes on, or has come to its end, has no failure."""
    (folder / FILE).unlink(missing_ok=True)

"""What takes turns between commits: a suite runs a part of it, and another part with the next; all where the
environment has TURNS=all, and half of the part where it has TURNS=few, as `make check` does."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

ALL, FEW = (os.environ.get("TURNS") == word for word in ("all", "few"))
Case = TypeVar("Case")
Other = TypeVar("Other")


@cache
def turn(parts: int) -> int:
    """Which of so many parts is run: another for each commit, one for all workers of a run."""
    if shutil.which("git") is None:
        return 0
    asked = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True)
    return int(done.stdout[:8] or "0", 16) % parts


def in_turn(cases: Iterable[Case], parts: int = 2) -> list[Case]:
    """Every other of the cases (or every so-manieth), the rest with the next commits."""
    every, parts = list(cases), 2 * parts if FEW else parts
    return every if ALL else every[turn(parts) :: parts]


def diagonal(cases: Iterable[Case], parts: int = 2) -> list[Case]:
    """As many as `in_turn` has, a step further in each row: of a product no column is left out."""
    every, parts = list(cases), 2 * parts if FEW else parts
    now = turn(parts)
    return every if ALL else [x for k, x in enumerate(every) if (k + k // parts) % parts == now]


def halves(lines: Iterable[Case], others: Sequence[Other]) -> list[tuple[Case, Other]]:
    """Every line with half of the others, a chessboard; the other fields with the next commits."""
    n = len(others)
    return in_turn((x, others[(i + k) % n]) for i, x in enumerate(lines) for k in range(n))

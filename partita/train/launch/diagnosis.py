"""What the doctor says: checks, and the table of them, bad ones first and one row for all that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from partita.base.text import table


@dataclass(frozen=True)
class Check:
    """One thing looked at. `rank` None: it is no rank's own. `value`: bytes, seconds, rates a second, or
    a version's digest; a name that tells which."""

    name: str
    rank: int | None
    ok: bool
    value: float | str | None
    message: str


@dataclass(frozen=True)
class Diagnosis:
    """All checks; `ok` when every one is."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(c.ok for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {"ok": self.ok, "checks": [asdict(c) for c in self.checks]}

    def __str__(self) -> str:
        rows = [_row("BAD", c, "") for c in self.checks if not c.ok]
        by: dict[str, list[Check]] = {}
        for c in self.checks:
            by.setdefault(c.name, []).append(c)
        for alike in by.values():
            fine = [c for c in alike if c.ok]
            if fine:
                which, one = _one_of(fine)
                many = f"{len(fine)} of {len(alike)}, {which}: " if len(alike) > 1 else ""
                rows.append(_row("ok", one, many))
        wrong = sum(not c.ok for c in self.checks)
        end = f"{wrong} of {len(self.checks)} checks failed" if wrong else "all is well"
        return f"{table(rows, ['', 'check', 'rank', 'what was seen'])}\n{end}"


def _one_of(fine: Sequence[Check]) -> tuple[str, Check]:
    """The check that is shown for all alike: the one nearest to what is not fine."""
    if isinstance(fine[0].value, str):  # versions, all the same
        return "the first", fine[0]
    if fine[0].name == "clock":
        return "the farthest", max(fine, key=lambda c: abs(float(c.value or 0)))
    return "the least", min(fine, key=lambda c: float(c.value or 0))


def _row(word: str, c: Check, lead: str) -> list[object]:
    return [word, c.name, "-" if c.rank is None else c.rank, lead + c.message]

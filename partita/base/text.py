"""Text that one would paste into a paper: aligned tables, and names that are near."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER = re.compile(r"[+-]?\.?\d[\d.,]*(e[+-]?\d+)?[%x]?( .*)?")


def _is_number(cell: str) -> bool:
    """Whether the cell is a number, perhaps of a unit, so that its column stands on the right; no plan that
    begins with '8mb' is."""
    return NUMBER.fullmatch(cell) is not None


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Rows as aligned columns, two spaces apart; columns of numbers stand on the right.

    >>> print(table([["tp", 12], ["dp", 3]], header=["axis", "calls"]))
    axis  calls
    tp       12
    dp        3
    """
    cells = [["" if c is None else str(c) for c in row] for row in rows]
    lines = [list(header), *cells] if header else cells
    width = max((len(line) for line in lines), default=0)
    columns = [[line[i] if i < len(line) else "" for line in lines] for i in range(width)]
    body = [column[1:] if header else column for column in columns]
    right = [any(b) and all(_is_number(c) or c in ("", "-") for c in b) for b in body]
    sizes = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            column[i].rjust(size) if r else column[i].ljust(size)
            for column, size, r in zip(columns, sizes, right, strict=True)
        ).rstrip()
        for i in range(len(lines))
    )


def printable(text: str) -> str:
    r"""The text with what would move or hide a terminal's line spelled out.

    >>> print(printable("a\x00b"))
    a\x00b
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The known name that is most like `name`; empty where nothing is like it."""
    from difflib import get_close_matches

    by_fold = {k.casefold(): k for k in known}
    found = get_close_matches(str(name)[:80].casefold(), by_fold, n=1, cutoff=0.5)
    return by_fold[found[0]] if found else ""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """\"; did you mean 'layers'?\" where a known name is near, else \"; known: a, b, c\"."""
    if near := nearest_name(name, known):
        return f"; did you mean '{near}'?"
    shown = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return f"; known: {shown}" if known else ""

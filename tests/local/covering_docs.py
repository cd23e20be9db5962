"""Run, it writes the lists of docs/composition.md; a test holds the page to them."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import covering
import covering_jobs

PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
BEGIN, END = "<!-- plans: generated -->\n", "<!-- end of plans -->"
REFUSED, REFUSED_END = "<!-- refusals: generated -->\n", "<!-- end of refusals -->"


def plans() -> str:
    """Every plan with its ranks, and the backend it runs on besides threads."""
    rows = covering_jobs.ROWS
    backends = {covering.name(r): backend for r, backend in covering.on_processes(rows)}
    lines = [
        f"{len(rows)} plans, {len(covering.wanted())} pairs, {len(backends)} plans on processes too.",
        "",
        "| ranks | on processes | model, what is trained, what is seen: plan |",
        "|--:|---|---|",
    ]
    for name, row in sorted((covering.name(r), r) for r in rows):
        lines.append(f"| {covering.ranks(row)} | {backends.get(name, '')} | {_short(name)} |")
    return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    model, _, plan = name.partition(": ")
    return f"{model}: `{plan}`"


def refused(folder: Path) -> str:
    """Every pair that is left out, and what refuses it; or why no plan says it."""
    said: dict[str, list[str]] = {}
    for pair in covering.left_out():
        said.setdefault("; ".join(covering_jobs.refusals(folder, pair)), []).append(_pair(pair))
    lines = ["| left out | refused with |", "|---|---|"]
    lines += [f"| {', '.join(pairs)} | {why} |" for why, pairs in said.items()]
    lines += [
        f"| {a} and {b}, some | {why}: no rule, no plan says both |"
        for (a, b), why in covering.UNSPELT.items()
    ]
    return "\n".join(lines) + "\n"


def _pair(pair: covering.Pair) -> str:
    return " with ".join(
        f"`{x}`" if f not in ("family", "trains") else x
        for f, x in zip(pair[::2], pair[1::2], strict=True)
    )


def page(folder: Path) -> str:
    """The page with its lists made anew."""
    text = PAGE.read_text()
    for begin, end, made in ((BEGIN, END, plans()), (REFUSED, REFUSED_END, refused(folder))):
        text = text[: text.index(begin) + len(begin)] + made + text[text.index(end) :]
    return text


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        PAGE.write_text(page(Path(folder)))

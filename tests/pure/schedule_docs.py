"""Run, it writes the table of docs/schedules.md; a test holds the page to it."""

from __future__ import annotations

from pathlib import Path

from partita.base.errors import ScheduleError
from partita.base.text import table
from partita.schedule.clock import (
    bubble_overhead,
    clock,
    peak_share,
    steady_bubble_overhead,
)
from partita.schedule.make import GENERATORS, schedule
from partita.schedule.steps import repeat
from partita.schedule.versions import versions_held

PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"
BEGIN, END = "<!-- table: generated -->\n```text\n", "```\n<!-- end of table -->"
SIZES = ((4, 8), (4, 16), (8, 16), (8, 32))
VIRTUAL = {"interleaved_1f1b": (2, 4), "looped_bfs": (2,), "interleaved_zb": (2,)}
EXTRA: dict[str, tuple[str, dict[str, object]]] = {
    "v_2_3": ("v_2_3", {}),
    "pipedream, vertical": ("pipedream", {"vertical_sync": True}),  # pipeline.vertical_sync
}
HEADER = ("schedule", "p", "m", "overhead", "steady", "peak", "peak is at most", "copies")
BOUND = {
    "gpipe": "m", "1f1b": "min(m, p)", "interleaved_1f1b": "(2(p-1) + (v-1)p + 1)/v", "looped_bfs": "m",
    "zb_h1": "p", "zb_h2": "2p-1", "zb_v": "p", "v_half": "(p+2) div 2", "v_min": "(p+4) div 3",
    "v_2_3": "ceil(2p/3) + 1", "interleaved_zb": "p where p divides m", "dualpipe": "p+1",
    "dualpipev": "p + 1/2", "chimera": "p", "pipedream": "min(m, p)",
    "pipedream, vertical": "min(m, p)", "pipedream_2bw": "min(m, p)", "forward": "0",
}  # fmt: skip


def rows() -> list[tuple[object, ...]]:
    """A row for each schedule and size that exists: both overheads at F=I=W, the peak in whole shares of a
    rank, its bound, and how often the weights are held."""
    out = []
    for name in [*(n for n in GENERATORS if n not in ("auto", "forward")), *EXTRA]:
        for v in VIRTUAL.get(name, (1,)):
            for p, m in SIZES:
                own, options = EXTRA.get(name, (name, {}))
                try:
                    s = schedule(own, num_ranks=p, num_microbatches=m, virtual_stages=v, **options)
                except ScheduleError:
                    continue
                spans = clock(s)
                copies = (
                    max(versions_held(repeat(s, 4)))
                    if s.is_asynchronous
                    else 2
                    if s.is_bidirectional
                    else 1
                )
                overheads = (bubble_overhead(spans), steady_bubble_overhead(spans))
                shown = [f"{x:.4f}" for x in overheads]
                title = name + (f" x{v}" if v > 1 else "")
                out.append((title, p, m, *shown, f"{max(peak_share(s)):g}", BOUND[name], copies))
    return out


def page() -> str:
    """The page with its table made anew."""
    text = PAGE.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + table(rows(), HEADER) + "\n" + text[end:]


if __name__ == "__main__":
    PAGE.write_text(page())

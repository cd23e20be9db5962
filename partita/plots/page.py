"""One self-contained page of figures and tables: plotly's script is inside, nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0;color:#1c2430;background:#f5f6f8}
header,section{max-width:1240px;margin:0 auto;padding:0 24px}
header{padding-top:28px}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:18px;margin:0 0 10px}
section{margin:18px auto;padding:18px 24px;background:#fff;border:1px solid #dfe3e8;border-radius:8px;
 box-sizing:border-box}
pre{max-height:420px;overflow:auto}
code,pre{font:13px/1.4 ui-monospace,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f5f6f8;padding:12px;border-radius:6px;margin:0}
table{border-collapse:collapse;font-size:13px;width:100%}
th,td{padding:3px 10px;text-align:left;border-bottom:1px solid #e8ebef;white-space:nowrap}
th{position:sticky;top:0;background:#fff}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
tr.different td{background:#fdecea}
.scroll{max-height:420px;overflow:auto}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:14px 0 0}
.tile{background:#fff;border:1px solid #dfe3e8;border-radius:8px;padding:10px 16px}
.tile b{display:block;font-size:20px;font-weight:600}
.tile span{color:#5b6674;font-size:13px}
.detail{font:13px/1.4 ui-monospace,monospace;background:#f5f6f8;border-radius:6px;padding:10px 12px;
 min-height:20px;white-space:pre-wrap}
.note{color:#5b6674;font-size:13px;margin:6px 0}
.good{color:#1a7f37}.bad{color:#b3261e}
"""

# A click on a span writes its words, which are its last custom datum, under the figure.
SCRIPT = """
document.querySelectorAll('.opens').forEach(function (box) {
  var plot = box.querySelector('.plotly-graph-div'), detail = box.querySelector('.detail');
  plot.on('plotly_click', function (event) { detail.textContent = event.points[0].customdata; });
});
"""


@dataclass(frozen=True)
class Section:
    """A part of the page: `body` is HTML."""

    title: str
    body: str
    name: str


def figure(fig: Any, name: str, detail: str = "") -> str:
    """A plotly figure as HTML; with `detail`, a box below it that shows the words of what is clicked."""
    from plotly.io import to_html

    config = {"displayModeBar": False, "responsive": True, "scrollZoom": False}
    body = to_html(fig, include_plotlyjs=False, full_html=False, div_id=name, config=config)
    if not detail:
        return body
    return f'<div class="opens">{body}<div class="detail" id="{name}-detail">{escape(detail)}</div></div>'


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], marks: Sequence[str] = ()
) -> str:
    """A table; numbers stand on the right. `marks[i]` is the class of row i."""
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(header))
    ]
    head = "".join(
        f"<th{' class=n' if n else ''}>{escape(h)}</th>"
        for h, n in zip(header, numeric, strict=True)
    )
    lines = []
    for i, row in enumerate(rows):
        mark = f' class="{marks[i]}"' if marks and marks[i] else ""
        cells = "".join(
            f"<td{' class=n' if n else ''}>{_cell(c)}</td>"
            for c, n in zip(row, numeric, strict=True)
        )
        lines.append(f"<tr{mark}>{cells}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """Short facts in boxes: (value, what it is)."""
    boxes = (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name in facts
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page; `lead` is HTML under the title."""
    from plotly.offline import get_plotlyjs

    parts = "".join(
        f'<section id="{escape(s.name)}"><h2>{escape(s.title)}</h2>{s.body}</section>'
        for s in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<link rel="icon" href="data:,">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<header><h1>{escape(title)}</h1>{lead}</header>{parts}<script>{SCRIPT}</script></body></html>\n"
    )

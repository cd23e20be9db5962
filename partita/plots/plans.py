"""The plans of a search as one self-contained page: a table that sorts, time against memory, and the
timeline, memory and reasons of the plan that is clicked. Nothing is fetched; the pictures are drawn from the
page's own data (plans_script.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from partita.base.units import format_bytes, format_seconds
from partita.plots.memory import COLOURS as CATEGORIES
from partita.plots.page import STYLE
from partita.plots.plans_script import SCRIPT, SHEET
from partita.plots.timeline import COLOURS as KINDS
from partita.simulate.forecast import first_ranks, forecast
from partita.simulate.predict import Prediction, measures

COLUMNS = ("", "plan", "step", "memory", "MFU", "bubble", "devices")
DIGITS = 6  # of the times that the page holds


def plans_page(
    title: str, lead: str, plans: Sequence[Prediction], why: Mapping[str, Sequence[str]]
) -> str:
    """The page of plans that were simulated, best first; `why` has sentences by a plan's line."""
    data = {
        "kinds": KINDS,
        "categories": CATEGORIES,
        "plans": [_plan(p, why.get(p.plan, ())) for p in plans],
    }
    held = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}{SHEET}</style></head><body>'
        f'<header><h1>{escape(title)}</h1><p class="note">{escape(lead)}</p></header>'
        f'<section id="plans"><h2>Plans</h2>{_table(plans)}</section>'
        '<section id="front"><h2>Time against memory</h2><div class="wide">'
        '<svg id="scatter" role="img" aria-label="Time of a step against memory"></svg></div></section>'
        '<section id="chosen"><h2 id="chosen-plan"></h2><div class="wide"><svg id="timeline"></svg></div>'
        '<div class="detail" id="span-detail">Click a span.</div>'
        '<div class="wide"><svg id="memory"></svg></div>'
        '<ul id="why"></ul></section>'
        f'<script type="application/json" id="data">{held}</script><script>{SCRIPT}</script>'
        "</body></html>\n"
    )


def _table(plans: Sequence[Prediction]) -> str:
    """Rows that a click on a header sorts by their `data-value`."""
    head = "".join(f'<th data-column="{i}">{escape(c)}</th>' for i, c in enumerate(COLUMNS))
    rows = []
    for i, p in enumerate(plans):
        seconds, peak, world = measures(p)
        cells = (
            (i + 1, str(i + 1)), (p.plan, p.plan), (seconds, format_seconds(seconds)),
            (peak, format_bytes(peak)), (p.mfu, f"{p.mfu:.1%}"),
            (p.bubble_fraction, f"{p.bubble_fraction:.1%}"), (world, f"{world:,}"),
        )  # fmt: skip
        row = "".join(f'<td data-value="{escape(str(v))}">{escape(t)}</td>' for v, t in cells)
        rows.append(f'<tr data-plan="{i}">{row}</tr>')
    return (
        f'<div class="scroll"><table id="table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _plan(p: Prediction, why: Sequence[str]) -> dict[str, Any]:
    """What the page draws of one plan: a rank of each place of pp."""
    seconds, peak, _ = measures(p)
    ranks = forecast(p, first_ranks(p)).ranks
    return {
        "line": p.plan,
        "seconds": seconds,
        "shown": format_seconds(seconds),
        "bytes": peak,
        "limit": p.limit_bytes,
        "why": list(why),
        "ranks": [
            {
                "rank": r.rank,
                "spans": [
                    [_short(s.start_s), _short(s.duration_s), s.kind, s.name, s.microbatch]
                    for s in r.spans
                ],
                "held": [[_short(t), b] for t, b in r.held],
                "peak": dict(r.ledger.at_peak) if r.ledger else {},
            }
            for r in ranks
        ],
    }


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")

"""Memory by category against the limit, predicted beside measured, for every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from partita.base.units import format_bytes
from partita.record.ledger import CATEGORIES
from partita.record.run import RankRecord

COLOURS = {
    "parameters": "#4c78a8",
    "gradients": "#59a14f",
    "optimizer": "#f28e2b",
    "activations": "#b07aa1",
    "buffers": "#76b7b2",
    "untagged": "#9d9da1",
}


def memory_figure(
    predicted: Sequence[RankRecord], measured: Sequence[RankRecord], limit_bytes: int
) -> Any:
    """Stacked bars in MB, two a rank, and a line at the limit."""
    from plotly import graph_objects as go

    both = [(r, "predicted") for r in predicted] + [(r, "measured") for r in measured]
    both = sorted((b for b in both if b[0].ledger), key=lambda b: (b[0].rank, b[1] == "measured"))
    fig = go.Figure()
    for category in CATEGORIES:
        sizes = [r.ledger.at_peak.get(category, 0) if r.ledger else 0 for r, _ in both]
        if not any(sizes):
            continue
        fig.add_trace(
            go.Bar(
                name=category,
                x=[[f"rank {r.rank}" for r, _ in both], [what for _, what in both]],
                y=[s / 1e6 for s in sizes],
                marker_color=COLOURS[category],
                hovertext=[f"{category}: {format_bytes(s)}" for s in sizes],
                hoverinfo="text",
            )
        )  # fmt: skip
    if limit_bytes:
        fig.add_hline(
            y=limit_bytes / 1e6, line_color="#b3261e", line_dash="dash",
            annotation_text=f"limit {format_bytes(limit_bytes)}", annotation_font_color="#b3261e",
            annotation_position="top left",
        )  # fmt: skip
    tallest = max([limit_bytes, *(r.ledger.peak_bytes for r, _ in both if r.ledger)], default=0)
    fig.update_yaxes(
        title="MB", gridcolor="#e8ebef", range=[0, 1.12 * tallest / 1e6], fixedrange=True
    )
    fig.update_layout(
        barmode="stack", height=400, margin={"l": 10, "r": 10, "t": 40, "b": 10}, plot_bgcolor="white",
        bargap=0.25, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    return fig

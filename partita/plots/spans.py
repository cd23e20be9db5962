"""Every rank's step, predicted above measured, as an interactive figure: zoom, hover, click."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from partita.base.units import format_seconds
from partita.plots.timeline import COLOURS, colour
from partita.record.run import RankRecord
from partita.record.span import Span

_THICK, _THIN = 0.62, 0.24  # compute, and what lies below it: collectives, waiting, other lanes
_ROW_PIXELS = 34


def words(span: Span, what: str) -> str:
    """What the page says of a span when it is clicked."""
    place = [f"rank {span.rank}", f"lane {span.lane}", what]
    if span.stage >= 0:
        place.append(f"stage {span.stage}")
    if span.microbatch >= 0:
        place.append(f"microbatch {span.microbatch}")
    times = f"{format_seconds(span.start_s)} to {format_seconds(span.end_s)}"
    return f"{span.name} ({span.kind})   {times}, {format_seconds(span.duration_s)}\n{', '.join(place)}"


def timeline_figure(predicted: Sequence[RankRecord], measured: Sequence[RankRecord]) -> Any:
    """Two rows a rank on one time axis in milliseconds, a colour a kind; collectives and waits are thin
    and lie in the lower part of their row."""
    from plotly import graph_objects as go

    rows = _rows(predicted, measured)
    kinds: dict[str, list[tuple[int, Span, str]]] = {}
    for place, (record, what) in enumerate(rows):
        for span in record.spans:
            kinds.setdefault(span.kind, []).append((place, span, what))
    fig = go.Figure()
    for kind in sorted(kinds, key=_drawn_late):
        fig.add_trace(_bars(kind, kinds[kind]))
    labels = [f"rank {record.rank} {what}" for record, what in rows]
    fig.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=labels, range=[len(rows) - 0.5, -0.5],
        fixedrange=True, showgrid=False, zeroline=False,
    )  # fmt: skip
    fig.update_xaxes(title="milliseconds since the step began", rangemode="tozero")
    for place in range(2, len(rows), 2):
        fig.add_hline(y=place - 0.5, line_width=1, line_color="#dfe3e8")
    fig.update_layout(
        barmode="overlay", height=150 + _ROW_PIXELS * len(rows), margin={"l": 10, "r": 10, "t": 40, "b": 40},
        plot_bgcolor="white", hovermode="closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    return fig


def _rows(
    predicted: Sequence[RankRecord], measured: Sequence[RankRecord]
) -> list[tuple[RankRecord, str]]:
    both = [(r, "predicted") for r in predicted] + [(r, "measured") for r in measured]
    return sorted(both, key=lambda x: (x[0].rank, x[1] == "measured"))


def _drawn_late(kind: str) -> tuple[bool, int]:
    order = list(COLOURS)
    return kind in ("comm", "wait"), order.index(kind) if kind in order else len(order)


def _is_thin(span: Span) -> bool:
    return span.kind in ("comm", "wait") or span.lane != "compute"


def _bars(kind: str, found: Sequence[tuple[int, Span, str]]) -> Any:
    from plotly import graph_objects as go

    texts = [words(span, what) for _, span, what in found]
    return go.Bar(
        orientation="h",
        name=kind,
        base=[1e3 * span.start_s for _, span, _ in found],
        x=[1e3 * span.duration_s for _, span, _ in found],
        y=[place + (0.24 if _is_thin(span) else -0.06) for place, span, _ in found],
        width=[_THIN if _is_thin(span) else _THICK for _, span, _ in found],
        marker={"color": colour(kind), "line": {"color": "white", "width": 0.5}},
        customdata=texts,
        hovertext=[t.replace("\n", "<br>") for t in texts],
        hoverinfo="text",
    )

"""Where experts are: the share of rows that each one is sent, step by step, and the even share beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def experts_figure(metrics: Sequence[Mapping[str, Any]]) -> Any:
    """Rows of each expert as a share of all, by step; `metrics` are lines with `expert_load`."""
    from plotly import graph_objects as go

    fig = go.Figure()
    steps, experts = [m["step"] for m in metrics], len(metrics[-1]["expert_load"])
    for e in range(experts):
        shares = [m["expert_load"][e] for m in metrics]
        fig.add_trace(go.Scatter(x=steps, y=shares, name=f"expert {e}", mode="lines"))
    fig.add_hline(y=1 / experts, line_dash="dash", line_color="#9c755f")
    fig.update_xaxes(title="step", gridcolor="#e8ebef", zeroline=False)
    fig.update_yaxes(
        title="share of rows", tickformat=".0%", gridcolor="#e8ebef", rangemode="tozero"
    )
    fig.update_layout(
        height=320, margin={"l": 10, "r": 10, "t": 20, "b": 40}, plot_bgcolor="white",
        showlegend=experts <= 16,
    )  # fmt: skip
    return fig

"""The loss curve, held-out losses on it, and the unigram entropy that a model must beat to know more than
how often each token occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def loss_figure(metrics: Sequence[Mapping[str, Any]], unigram_entropy: float | None) -> Any:
    """Loss by step in nats a token."""
    from plotly import graph_objects as go

    fig = go.Figure()
    steps = [m["step"] for m in metrics]
    fig.add_trace(
        go.Scatter(
            x=steps, y=[m.get("loss") for m in metrics], name="training loss", mode="lines",
            line_color="#4c78a8",
        )
    )  # fmt: skip
    held_out = [(m["step"], m["eval_loss"]) for m in metrics if m.get("eval_loss") is not None]
    if held_out:
        fig.add_trace(
            go.Scatter(
                x=[s for s, _ in held_out], y=[x for _, x in held_out], name="held-out loss",
                mode="markers", marker={"size": 10, "color": "#e15759"},
            )
        )  # fmt: skip
    if unigram_entropy is not None:
        fig.add_hline(
            y=unigram_entropy, line_dash="dash", line_color="#9c755f",
            annotation_text=f"unigram entropy {unigram_entropy:.3f}", annotation_position="top right",
        )  # fmt: skip
    fig.update_xaxes(title="step", gridcolor="#e8ebef", zeroline=False)
    fig.update_yaxes(title="nats a token", gridcolor="#e8ebef", zeroline=False)
    fig.update_layout(
        height=380, margin={"l": 10, "r": 10, "t": 40, "b": 40}, plot_bgcolor="white", showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    return fig

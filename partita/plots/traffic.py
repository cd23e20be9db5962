"""Traffic declared beside recorded, as a table: a line that differs stands out, and comes first."""

from __future__ import annotations

from collections.abc import Sequence

from partita.plots.page import html_table
from partita.record.compare import TrafficPair

_HEADER = (
    "rank", "axis", "op", "site", "phase", "calls declared", "calls recorded", "bytes declared",
    "bytes recorded", "",
)  # fmt: skip


def traffic_table(pairs: Sequence[TrafficPair]) -> str:
    """The pairs as an HTML table."""
    ordered = sorted(pairs, key=lambda p: (p.equal, p.rank))
    rows = [
        (
            p.rank, p.axis, p.op, p.site, p.phase, p.declared_count, p.recorded_count,
            p.declared_bytes, p.recorded_bytes, "equal" if p.equal else "different",
        )
        for p in ordered
    ]  # fmt: skip
    return html_table(_HEADER, rows, ["" if p.equal else "different" for p in ordered])

"""Spans as a Chrome/Perfetto trace: predicted and measured open side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from partita.record.span import Span


def chrome_trace(spans: Iterable[Span], process: str = "") -> dict[str, Any]:
    """Trace events: a process a rank, a thread a lane, microseconds."""
    events: list[dict[str, Any]] = []
    lanes: dict[tuple[int, str], int] = {}
    for s in spans:
        lane = lanes.setdefault((s.rank, s.lane), len(lanes) + 1)
        events.append(
            {
                "name": s.name,
                "cat": s.kind,
                "ph": "X",
                "ts": s.start_s * 1e6,
                "dur": s.duration_s * 1e6,
                "pid": s.rank,
                "tid": lane,
                "args": {"stage": s.stage, "microbatch": s.microbatch, "step": s.step},
            }
        )
    for (rank, lane), number in lanes.items():
        name = f"{process} rank {rank}".strip()
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": name}})
        events.append(
            {"name": "thread_name", "ph": "M", "pid": rank, "tid": number, "args": {"name": lane}}
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}

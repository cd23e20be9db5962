"""Timelines of Spans, predicted or measured: as text, as SVG, and as one self-contained HTML page.

`draw` is the short way from a schedule to text; the pictures in the docstrings of schedule/make are
its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from partita.plots.held import Curves, held_svg
from partita.record.span import Span
from partita.schedule.clock import Costs, clock, makespan
from partita.schedule.ir import Schedule

COLOURS = {
    "F": "#4c78a8",
    "B": "#59a14f",
    "I": "#76b7b2",
    "W": "#edc948",
    "U": "#e15759",
    "step": "#e15759",
    "comm": "#b07aa1",
    "wait": "#d3d3d3",
    "data": "#9c755f",
    "checkpoint": "#ff9da7",
    "eval": "#bab0ac",
}
OTHER = "#bab0ac"
_MAX_COLUMNS = 400  # cells of an exact picture; beyond it, one character a column
_ROW, _GAP, _LEFT, _TOP = 26, 4, 64, 34  # pixels of the SVG
_CURVE = 64  # the height of what is held, below a timeline


def draw(schedule: Schedule, F: float = 1.0, I: float = 1.0, W: float = 1.0) -> str:  # noqa: E741
    """The schedule as text; F, I, W are the costs of a rank's whole share (B = I + W)."""
    return text(clock(schedule, Costs.equal(schedule, F, I, W)))


def text(spans: Sequence[Span], width: int | None = None, longest: float = 0.0) -> str:
    """One row a rank, one cell a unit of time; an action longer than a unit is drawn on with '-'.

    The unit is the largest that every start and end is a multiple of. Where there is none, the picture is
    wider than `width` characters, or it stands beside one of `longest` seconds, each column is one
    character: the kind of what runs.
    """
    if not spans:
        return "(nothing runs)"
    unit = _unit(spans)
    cell = max(len(s.name) for s in spans) + 1
    columns = round(makespan(spans) / unit) if unit else 0
    label = len(str(max(s.rank for s in spans)))
    if (
        longest
        or not unit
        or columns > _MAX_COLUMNS
        or (width and columns * cell + label + 8 > width)
    ):
        return _compact(spans, label, width or 120, longest)
    start = min(s.start_s for s in spans)
    rows = []
    for rank, own in _rows(spans).items():
        line = ""
        for s in own:
            at, end = (round((t - start) / unit) * cell for t in (s.start_s, s.end_s))
            if end > at:
                line = line.ljust(at) + s.name.ljust(end - at - 1, "-") + " "
        rows.append(f"rank {rank:>{label}} | {line.rstrip()}")
    return "\n".join(rows)


def _rows(spans: Sequence[Span]) -> dict[int, list[Span]]:
    rows: dict[int, list[Span]] = {rank: [] for rank in sorted({s.rank for s in spans})}
    for s in sorted(spans, key=lambda s: (s.start_s, s.end_s)):
        rows[s.rank].append(s)
    return rows


def _unit(spans: Sequence[Span]) -> float:
    """The largest unit of which all times are multiples, 0 where none of those tried is."""
    start = min(s.start_s for s in spans)
    shortest = min((s.duration_s for s in spans if s.duration_s > 0), default=0.0)
    times = {t - start for s in spans for t in (s.start_s, s.end_s)}
    for parts in (1, 2, 3, 4, 5, 6, 8, 10):
        unit = shortest / parts
        if unit and all(abs(t / unit - round(t / unit)) < 1e-6 for t in times):
            return unit
    return 0.0


def _compact(spans: Sequence[Span], label: int, width: int, longest: float) -> str:
    start, columns = min(s.start_s for s in spans), max(width - label - 8, 20)
    per_column = max(makespan(spans), longest) / columns or 1.0
    rows = []
    for rank, own in _rows(spans).items():
        line = [" "] * columns
        for s in own:
            at = int((s.start_s - start) / per_column)
            end = max(int((s.end_s - start) / per_column), at + 1)
            line[at : min(end, columns)] = s.kind[0] * (min(end, columns) - at)
        rows.append(f"rank {rank:>{label}} | {''.join(line).rstrip()}")
    return "\n".join(rows)


def svg(
    timelines: Mapping[str, Sequence[Span]],
    width: int = 1100,
    held: Mapping[str, Curves] | None = None,
    unit: str = "",
) -> str:
    """The named timelines one above the other on one time axis, one row a rank. Colours are by kind, paler
    by microbatch, darker by chunk. `held[title]`: what each rank holds over time, in `unit`, drawn below."""
    rows = {title: _rows(spans) for title, spans in timelines.items()}
    longest = max((makespan(s) for s in timelines.values()), default=0.0) or 1.0
    scale = (width - _LEFT - 10) / longest
    parts: list[str] = []
    top = 0
    for title, spans in timelines.items():
        parts.append(f'<text class="title" x="4" y="{top + 20}">{escape(title)}</text>')
        parts += _svg_rows(rows[title], spans, top + _TOP, scale)
        top += _TOP + len(rows[title]) * (_ROW + _GAP) + 8
        if held and title in held:
            start = min((s.start_s for s in spans), default=0.0)
            parts += held_svg(held[title], start, (_LEFT, top), scale, _CURVE, unit)
            top += _CURVE + 14
    kinds = dict.fromkeys(s.kind for spans in timelines.values() for s in spans)
    for i, kind in enumerate(kinds):
        parts.append(
            f'<rect x="{_LEFT + 70 * i}" y="{top}" width="12" height="12" fill="{colour(kind)}"/>'
            f'<text x="{_LEFT + 70 * i + 17}" y="{top + 11}">{escape(kind)}</text>'
        )
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.in{font-size:10px}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + 22}" '
        f'width="{width}" height="{top + 22}" role="img"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )


def colour(kind: str) -> str:
    """The colour of a kind of span, the same in every picture."""
    return COLOURS.get(kind, OTHER)


def shade(kind: str, microbatch: int, chunk: int) -> str:
    """The kind's colour, paler with the microbatch (in turns of four) and darker with the rank's chunk."""
    base = [int(colour(kind)[i : i + 2], 16) for i in (1, 3, 5)]
    pale, dark = 0.13 * (max(microbatch, 0) % 4), 1 - 0.22 * min(chunk, 3)
    mixed = [round((c + (255 - c) * pale) * dark) for c in base]
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _svg_rows(
    rows: Mapping[int, Sequence[Span]], spans: Sequence[Span], top: int, scale: float
) -> list[str]:
    start = min((s.start_s for s in spans), default=0.0)
    parts = []
    for i, (rank, own) in enumerate(rows.items()):
        y = top + i * (_ROW + _GAP)
        chunks = {
            stage: j for j, stage in enumerate(sorted({s.stage for s in own if s.stage >= 0}))
        }
        parts.append(f'<text x="4" y="{y + 17}">rank {rank}</text>')
        for s in own:
            x, w = _LEFT + (s.start_s - start) * scale, max(s.duration_s * scale, 0.3)
            name = escape(s.name)
            tip = f"{name} on rank {rank}: {s.start_s:.6g} to {s.end_s:.6g} s"
            inside = f'<text class="in" x="{x + 2:.2f}" y="{y + 17}">{name}</text>'
            fill = shade(s.kind, s.microbatch, chunks.get(s.stage, 0))
            parts.append(
                f'<g class="span" data-rank="{rank}"><title>{tip}</title><rect x="{x:.2f}" y="{y}" '
                f'width="{w:.2f}" height="{_ROW}" rx="2" fill="{fill}" stroke="white" '
                f'stroke-width="0.6"/>{inside if w > 6.5 * len(s.name) else ""}</g>'
            )
    return parts


def html(
    timelines: Mapping[str, Sequence[Span]],
    title: str = "Partita",
    held: Mapping[str, Curves] | None = None,
    unit: str = "",
) -> str:
    """One page that needs nothing else: the SVG, and the words of a span where it is clicked."""
    script = (
        "document.querySelectorAll('.span').forEach(g=>g.addEventListener('click',()=>{"
        "document.getElementById('detail').textContent=g.querySelector('title').textContent}))"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{font:14px sans-serif;margin:24px}.span{cursor:pointer}"
        ".wide{overflow-x:auto}</style></head><body>"
        f'<h1>{escape(title)}</h1><p id="detail">Click a span.</p>'
        f'<div class="wide">{svg(timelines, held=held, unit=unit)}</div>'
        f"<script>{script}</script></body></html>\n"
    )

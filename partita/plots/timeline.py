"""Timelines of Spans, predicted or measured: as text, as SVG, and as one self-contained HTML page.

`draw` is the short way from a schedule to text; the pictures in the docstrings of schedule/make are
its output.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from partita.plots.held import Curves, held_svg, ink
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
_WORDS = {
    "F": "F forward", "B": "B backward", "I": "I input half", "W": "W weight half", "U": "U update",
}  # fmt: skip
_MAX_COLUMNS = 400  # cells of an exact picture; beyond it, one character a column
_MOST = 0.9  # of a picture's actions, for the names of which there is room
_ROW, _GAP, _LEFT, _TOP = 26, 4, 88, 34  # pixels of the SVG
_UPDATE = 3  # pixels of an update that takes no time
_LETTER, _WIDEST = 6.8, 6000  # of a label; a picture is widened so far for its labels to fit
_LINE = 16  # pixels of a line of words
_DARK, _LIGHT = "#222222", "#ffffff"  # labels
_CURVE = 64  # the height of what is held, below a timeline
_SHADES = (
    8  # microbatches that a kind's shades tell apart; lines along a cell tell which eight of 64
)
_DRAIN = "#f4ead5"


def draw(schedule: Schedule, F: float = 1.0, I: float = 1.0, W: float = 1.0) -> str:  # noqa: E741
    """The schedule as text; F, I, W are the costs of a rank's whole share (B = I + W)."""
    return text(clock(schedule, Costs.equal(schedule, F, I, W)))


def text(spans: Sequence[Span], width: int | None = None, longest: float = 0.0) -> str:
    """One row a rank, one cell a unit of time; an action longer than a unit is drawn on with '-'.

    The unit is the largest that every start and end is a multiple of. Where there is none, the picture is
    wider than `width` characters, or it stands beside one of `longest` seconds, each column is the kind of
    what runs; where nearly all actions have room for names, or for kind and microbatch, these.
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

    def places(s: Span) -> tuple[int, int]:
        at = int((s.start_s - start) / per_column)
        return at, min(max(int((s.end_s - start) / per_column), at + 1), columns)

    rows, names = [], _names(spans, [end - at for at, end in map(places, spans)])
    for rank, own in _rows(spans).items():
        line = [" "] * columns
        for s in own:
            at, end = places(s)
            name = names.get(s, "")
            fits = name and len(name) < end - at
            line[at:end] = name.ljust(end - at, "-") if fits else s.kind[0] * (end - at)
        rows.append(f"rank {rank:>{label}} | {''.join(line).rstrip()}")
    return "\n".join(rows)


def _names(spans: Sequence[Span], columns: Sequence[int]) -> dict[Span, str]:
    """What spans of so many columns are called: their names if nearly all leave a column, so that neighbours
    stand apart; else kind and microbatch if these do, where each rank has one stage; else nothing. One column
    is a kind in any case."""
    one = len({(s.rank, s.stage) for s in spans}) == len({s.rank for s in spans})
    if any(s.microbatch < 0 for s in spans):
        return {}
    for short in (False, True)[: 1 + one]:
        names = {s: f"{s.kind[0]}{s.microbatch}" if short else s.name for s in spans}
        room = [len(names[s]) < c for s, c in zip(spans, columns, strict=True) if c > 1]
        if sum(room) > _MOST * len(room):
            return names
    return {}


def svg(
    timelines: Mapping[str, Sequence[Span]],
    width: int = 1100,
    held: Mapping[str, Curves] | None = None,
    unit: str = "",
    seconds: bool = False,
    drains: Collection[str] = (),
    refused: Mapping[str, str] | None = None,
) -> str:
    """The named timelines one above the other on one time axis, one row a rank. Colours are by kind, paler
    by microbatch, darker by chunk; lines along a cell count eights of microbatches. `width` is the least: it
    grows until the labels of passes fit. `held[title]`: what each rank holds over time, in `unit`, drawn
    below. `seconds`: times are seconds, else units of the costs. `drains`: titles of steps that would run on
    into the next; where they end instead, the ground of each rank behind its last forward is tinted.
    `refused`: words below the titles of what cannot run."""
    rows = {title: _rows(spans) for title, spans in timelines.items()}
    longest = max((makespan(s) for s in timelines.values()), default=0.0) or 1.0
    width = max(_wide(timelines, width, longest), _widest(refused or {}))
    scale = (width - _LEFT - 24) / longest
    parts: list[str] = []
    top = 0
    for title, spans in timelines.items():
        curves = (held or {}).get(title)
        parts.append(f'<text class="title" x="4" y="{top + 20}">{escape(title)}</text>')
        if title in drains:
            parts += _drained(rows[title], spans, top + _TOP, scale)
        parts += _svg_rows(rows[title], spans, top + _TOP, scale, " s" if seconds else "")
        if curves:
            parts += _marks(rows[title], len(curves), top + _TOP)
        top += _TOP + len(rows[title]) * (_ROW + _GAP) + 8
        if curves:
            start = min((s.start_s for s in spans), default=0.0)
            parts += held_svg(curves, start, (_LEFT, top), scale, _CURVE, unit)
            top += _CURVE + 14
    for title, words in (refused or {}).items():
        parts += _told(title, words.splitlines(), top)
        top += _TOP + _LINE * len(words.splitlines()) + 8
    parts += _axis(longest, scale, top, "s" if seconds else "units of the costs") if rows else []
    top += 38 if rows else 0
    every = (s for spans in timelines.values() for s in spans)
    kinds = dict.fromkeys(s.kind for s in every if s.duration_s > 0 or s.kind == "U")
    x = float(_LEFT)
    for words, kind in ((_WORDS.get(kind, kind), kind) for kind in kinds):
        parts.append(
            f'<rect x="{x:g}" y="{top}" width="12" height="12" fill="{colour(kind)}"/>'
            f'<text x="{x + 17:g}" y="{top + 11}">{escape(words)}</text>'
        )
        x += 34 + _LETTER * len(words)
    parts += _legend(timelines, bool(drains), x, top)
    style = (
        "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.in{font-size:10px}"
        ".refused{font:12px monospace;white-space:pre;fill:#b3261e}"
    )
    name = escape("Timelines: " + "; ".join((*timelines, *(refused or {}))), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + 22}" '
        f'width="{width}" height="{top + 22}" role="img" aria-label="{name}"><title>{name}</title>'
        f"<style>{style}</style>"
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>'
    )


def _told(title: str, lines: Sequence[str], top: int) -> list[str]:
    """What is wrong with a schedule that cannot run, as the checker draws it."""
    heads = [f'<text class="title" x="4" y="{top + 20}">{escape(title)}</text>']
    return heads + [
        f'<text class="refused" x="16" y="{top + _TOP + _LINE * (i + 0.8):g}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    ]


def _widest(refused: Mapping[str, str]) -> int:
    """The width of the longest line of words."""
    longest = max((len(s) for words in refused.values() for s in words.splitlines()), default=0)
    return round(_LETTER * 1.1 * longest) + 40 if longest else 0


def _legend(timelines: Mapping[str, Sequence[Span]], drains: bool, x: float, y: float) -> list[str]:
    """What lines along cells mean, where there are any, and the ground of a drain."""
    parts = []
    most = max((s.microbatch for spans in timelines.values() for s in spans), default=0)
    for eight in range(1, min(most // _SHADES, 7) + 1):
        words = f"microbatch {eight * _SHADES}+"
        ground = f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour("F")}"/>'
        parts.append(f"{ground}{''.join(_lines(eight, x, y, 12, 12))}")
        parts.append(f'<text class="in" x="{x + 17}" y="{y + 11}">{words}</text>')
        x += 104
    if drains:
        parts.append(
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_DRAIN}" stroke="#b89b5e"/>'
            f'<text class="in" x="{x + 17}" y="{y + 11}">drains: no forward follows</text>'
        )
    return parts


def _lines(eight: int, x: float, y: float, width: float, height: float) -> list[str]:
    """Which eight of 64 microbatches it is: a line below, above and at the right end count 1, 2 and 4."""
    places = [(x, y + height - 3, width, 1.5), (x, y + 1.5, width, 1.5)]
    places.append((x + max(width - 2.5, 0), y, min(width, 1.5), height))
    return [
        f'<rect class="eight" x="{at:.2f}" y="{up:.2f}" width="{wide:.2f}" height="{high:g}" '
        f'fill="{_DARK}" opacity="0.75"/>'
        for bit, (at, up, wide, high) in enumerate(places)
        if eight >> bit & 1
    ]


def _drained(
    rows: Mapping[int, Sequence[Span]], spans: Sequence[Span], top: int, scale: float
) -> list[str]:
    """The ground of each rank from the end of its last forward to that of the step."""
    start, end = min(s.start_s for s in spans), max(s.end_s for s in spans)
    parts = []
    for i, (rank, own) in enumerate(rows.items()):
        since = max((s.end_s for s in own if s.kind == "F"), default=end)
        x, width = _LEFT + (since - start) * scale, (end - since) * scale
        parts.append(
            f'<rect class="drain" x="{x:.2f}" y="{top + i * (_ROW + _GAP) - 2}" width="{width:.2f}" '
            f'height="{_ROW + _GAP}" fill="{_DRAIN}"><title>rank {rank} drains: no forward of a next step '
            "runs here</title></rect>"
        )
    return parts


def _wide(timelines: Mapping[str, Sequence[Span]], width: int, longest: float) -> int:
    """The width at which the label of every pass fits its cell; `width` where that is beyond _WIDEST."""
    passes = [
        s for spans in timelines.values() for s in spans if s.kind in "FBIW" and s.duration_s > 0
    ]
    scale = max((_room(s.name) / s.duration_s for s in passes), default=0.0)
    wanted = math.ceil(scale * longest * (1 + 1e-9)) + _LEFT + 24
    return max(width, wanted) if wanted <= _WIDEST else width


def _room(name: str) -> float:
    return _LETTER * len(name) + 3


def _axis(longest: float, scale: float, top: float, unit: str) -> list[str]:
    """A line with ticks at round times, about a hundred pixels apart."""
    step = 10.0 ** math.floor(math.log10(100 / scale))
    step *= next(n for n in (1, 2, 5, 10) if n * step * scale >= 60)
    end = _LEFT + longest * scale
    parts = [f'<line x1="{_LEFT}" y1="{top}" x2="{end:.1f}" y2="{top}" stroke="#777"/>']
    for i in range(math.floor(longest / step * (1 + 1e-9)) + 1):
        x = _LEFT + i * step * scale
        parts.append(
            f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + 4}" stroke="#777"/>'
            f'<text class="in tick" x="{x:.1f}" y="{top + 15}" text-anchor="middle">{i * step:.6g}</text>'
        )
    return [*parts, f'<text class="in" x="{_LEFT}" y="{top + 28}">time ({unit})</text>']


def _marks(rows: Mapping[int, Sequence[Span]], ranks: int, top: int) -> list[str]:
    """Beside each rank's name the colour of its curve below."""
    return [
        f'<rect class="mark" x="{_LEFT - 14}" y="{top + i * (_ROW + _GAP) + 4}" width="8" '
        f'height="{_ROW - 8}" fill="{ink(rank, ranks)}"><title>the colour of rank {rank} below</title></rect>'
        for i, rank in enumerate(rows)
        if 0 <= rank < ranks
    ]


def colour(kind: str) -> str:
    """The colour of a kind of span, the same in every picture."""
    return COLOURS.get(kind, OTHER)


def shade(kind: str, microbatch: int, chunk: int) -> str:
    """The kind's colour, paler with the microbatch (in turns of eight, which `_lines` count) and darker with
    the rank's chunk."""
    base = [int(colour(kind)[i : i + 2], 16) for i in (1, 3, 5)]
    pale, dark = 0.075 * (max(microbatch, 0) % _SHADES), 1 - 0.22 * min(chunk, 3)
    mixed = [round((c + (255 - c) * pale) * dark) for c in base]
    return "#" + "".join(f"{c:02x}" for c in mixed)


def ink_on(fill: str) -> str:
    """The colour of words on a fill: dark or white, whichever stands out more (WCAG's contrast)."""
    ground = _luminance(fill)
    dark = (ground + 0.05) / (_luminance(_DARK) + 0.05)
    return _DARK if dark >= 1.05 / (ground + 0.05) else _LIGHT


def _luminance(fill: str) -> float:
    """Relative luminance of sRGB, from 0 to 1."""
    parts = [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _svg_rows(
    rows: Mapping[int, Sequence[Span]], spans: Sequence[Span], top: int, scale: float, unit: str
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
            if s.kind == "U" and w < _UPDATE:  # it takes no time, and changes the weights
                x, w = x - _UPDATE, _UPDATE
            name = escape(s.name)
            tip = f"{name} on rank {rank}: {s.start_s:.6g} to {s.end_s:.6g}{unit}"
            fill = shade(s.kind, s.microbatch, chunks.get(s.stage, 0))
            white = ' style="fill:#fff"' if ink_on(fill) == _LIGHT else ""
            inside = f'<text class="in" x="{x + 2:.2f}" y="{y + 17}"{white}>{name}</text>'
            eight = max(s.microbatch, 0) // _SHADES % _SHADES
            lines = "".join(_lines(eight, x, y, w, _ROW)) if s.kind in "FBIW" else ""
            parts.append(
                f'<g class="span" data-rank="{rank}"><title>{tip}</title><rect x="{x:.2f}" y="{y}" '
                f'width="{w:.2f}" height="{_ROW}" rx="2" fill="{fill}" stroke="white" '
                f'stroke-width="0.6"/>{lines}{inside if w >= _room(s.name) * (1 - 1e-6) else ""}</g>'
            )
    return parts


def html(
    timelines: Mapping[str, Sequence[Span]],
    title: str = "Partita",
    held: Mapping[str, Curves] | None = None,
    unit: str = "",
    seconds: bool = False,
    drains: Collection[str] = (),
    refused: Mapping[str, str] | None = None,
) -> str:
    """One page that needs nothing else: the SVG, and the words of a span where it is clicked or has the
    focus; Tab enters a row of spans, arrows walk along it."""
    script = (
        "const all=[...document.querySelectorAll('.span')];all.forEach((g,i)=>{"
        "const say=()=>{document.getElementById('detail').textContent=g.querySelector('title').textContent};"
        "const new_row=!i||all[i-1].dataset.rank!==g.dataset.rank;"
        "g.setAttribute('tabindex',new_row?'0':'-1');g.addEventListener('click',say);"
        "g.addEventListener('focus',say);g.addEventListener('keydown',e=>{"
        "const to=all[i+({ArrowRight:1,ArrowLeft:-1}[e.key]||0)];"
        "if(to&&to!==g){e.preventDefault();to.focus()}})})"
    )
    picture = svg(timelines, 1100, held, unit, seconds, drains, refused)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body{font:14px sans-serif;margin:24px}.span{cursor:pointer}"
        ".span:focus{outline:2px solid #b3261e}h1{overflow-wrap:anywhere}#detail{position:sticky;top:0;"
        "background:#fff;padding:6px 0;margin:0 0 6px}.wide{overflow-x:auto}</style></head><body>"
        f'<h1>{escape(title)}</h1><p id="detail" aria-live="polite">'
        f'Click a span, or walk with Tab and arrows.</p><div class="wide">{picture}</div>'
        f"<script>{script}</script></body></html>\n"
    )

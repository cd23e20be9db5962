"""What ranks hold over time, as a step curve a rank below a timeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from colorsys import hls_to_rgb
from itertools import groupby

Curves = Sequence[Sequence[tuple[float, float]]]  # a rank's (time, held from then on)
_HUES = 300  # from the first rank's to the last's, in degrees of the colour wheel


def held_svg(
    curves: Curves,
    start_s: float,
    corner: tuple[float, float],
    scale: float,
    height: float,
    unit: str = "",
) -> list[str]:
    """SVG elements: one polyline a rank in a box of `height` pixels, `scale` pixels a second; without a
    `unit` in shares, what a rank keeps of one microbatch."""
    left, top = corner
    most = max((held for curve in curves for _, held in curve), default=0.0)
    if not most:
        return []
    parts = [
        f'<text class="in" x="4" y="{top + 10}">held{"" if unit else " (shares)"}</text>',
        f'<text class="in" x="4" y="{top + 22}">peak {most:.4g}{unit}</text>',
        f'<line x1="{left}" y1="{top + height}" x2="{left + 8}" y2="{top + height}" stroke="#999"/>',
    ]
    for rank, curve in enumerate(curves):
        points, level = [], 0.0
        for time, held in _seen(curve):
            x = left + (time - start_s) * scale
            points += [(x, level), (x, held)]
            level = held
        line = " ".join(f"{x:.1f},{top + height * (1 - value / most):.1f}" for x, value in points)
        parts.append(
            f'<polyline class="held" points="{line}" fill="none" stroke="{ink(rank, len(curves))}" '
            f'stroke-width="1.2"><title>rank {rank}: held</title></polyline>'
        )
    return parts


def _seen(curve: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The curve without what lasts no time: one action that frees as the next one takes; a peak is kept."""
    level = 0.0
    for time, changes in groupby(curve, key=lambda point: point[0]):
        values = [held for _, held in changes]
        if max(values) > max(level, values[-1]):
            yield time, max(values)
        level = values[-1]
        yield time, level


def ink(rank: int, ranks: int) -> str:
    """The colour of a rank's curve."""
    red, green, blue = hls_to_rgb(_HUES / 360 * rank / ranks, 0.42, 0.6)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"

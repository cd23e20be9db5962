"""Pictures of spans: exact where times share a unit, compact where they do not."""

from partita.plots.held import held_svg
from partita.plots.timeline import COLOURS, OTHER, colour, draw, html, shade, svg, text
from partita.record.span import Span
from partita.schedule.clock import clock, held_over_time
from partita.schedule.make import schedule


def test_a_unit_is_a_cell_and_longer_actions_are_drawn_on():
    picture = draw(schedule("1f1b", num_ranks=2, num_microbatches=2))
    assert picture.splitlines() == [
        "rank 0 | 0F0 0F1         0B0----     0B1----",
        "rank 1 |     1F0 1B0---- 1F1 1B1----",
    ]


def test_times_without_a_unit_are_compact():
    spans = [Span(0, "compute", "F", "a", 5.0, 6.0), Span(1, "compute", "B", "b", 6.0, 8.7182818)]
    rows = [row.partition("| ")[2] for row in text(spans, width=50).splitlines()]
    first, second = rows
    assert set(first) == {"F"} and set(second.strip()) == {"B"}
    start = len(second) - len(second.lstrip())
    assert abs(start - len(first)) <= 1 and 36 <= len(second) <= 43
    assert text([]) == "(nothing runs)"


def test_a_picture_fits_the_width_asked_for():
    spans = clock(schedule("1f1b", num_ranks=8, num_microbatches=64))
    assert max(map(len, text(spans, width=100).splitlines())) <= 100


def test_names_are_escaped_and_colours_are_by_kind():
    spans = [Span(0, "compute", "odd", "<b>&", 0.0, 1.0), Span(0, "compute", "F", "f", 1.0, 2.0)]
    picture = svg({"<measured>": spans})
    assert "<b>" not in picture and "&lt;b&gt;&amp;" in picture and "&lt;measured&gt;" in picture
    assert colour("odd") == OTHER and COLOURS["F"] in picture
    assert picture in html({"<measured>": spans})


def test_shades_tell_microbatches_and_chunks_apart():
    four = [shade("F", k, 0) for k in range(4)]
    assert len(set(four)) == 4 and four[0] == COLOURS["F"] == shade("F", 4, 0) == shade("F", -1, 0)
    assert len({shade("F", 0, chunk) for chunk in range(3)}) == 3


def test_what_is_held_is_drawn_below():
    s = schedule("1f1b", num_ranks=3, num_microbatches=4)
    spans = clock(s)
    curves = held_over_time(s, spans)
    assert [max(held for _, held in curve) for curve in curves] == [3, 2, 1]
    assert all(curve[-1][1] == 0 for curve in curves)
    picture = svg({"1f1b": spans}, held={"1f1b": curves})
    assert picture.count('class="held"') == 3 and "peak 3" in picture
    assert held_svg([[], []], 0.0, (0, 0), 1.0, 10.0) == []
    assert 'class="held"' not in svg({"1f1b": spans})

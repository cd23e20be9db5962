"""Pictures of spans: exact where times share a unit, compact where they do not."""

from partita.plots.timeline import COLOURS, OTHER, colour, draw, html, svg, text
from partita.record.span import Span
from partita.schedule.clock import clock
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

"""Pictures of spans: exact where times share a unit, compact where they do not."""

import re
import xml.etree.ElementTree as ET

import pytest

from partita.plots.held import held_svg
from partita.plots.timeline import COLOURS, OTHER, colour, draw, html, ink_on, shade, svg, text
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
    eight = [shade("F", k, 0) for k in range(8)]
    assert len(set(eight)) == 8 and eight[0] == COLOURS["F"] == shade("F", 8, 0) == shade(
        "F", -1, 0
    )
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


def luminance(fill: str) -> float:
    """WCAG 2's relative luminance."""
    parts = [int(fill[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("kind", "FBIW")
def test_every_label_stands_out_from_its_cell(kind):
    """Dark words on the fills of a third and a fourth chunk had a contrast of 1.1 to 1.9."""
    for chunk in range(4):
        for microbatch in range(8):
            fill = shade(kind, microbatch, chunk)
            light, dark = sorted((luminance(fill), luminance(ink_on(fill))), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4


def test_a_picture_grows_until_every_label_fits():
    s = schedule("v_half", num_ranks=4, num_microbatches=8)
    root = ET.fromstring(svg({"v_half": clock(s)}))
    spans = root.findall(".//{*}g[@class='span']")
    assert len(spans) == 4 * 2 * 8 * 3 and all(g.find("{*}text") is not None for g in spans)
    widths = [float(g.find("{*}rect").get("width")) for g in spans]
    assert min(widths) > 3 * 6 and float(root.get("width")) > 1100
    long = svg({"long": clock(schedule("1f1b", num_ranks=2, num_microbatches=400))})
    assert 'width="1100"' in long


def test_a_picture_has_an_axis_a_name_and_the_colours_of_its_curves():
    s = schedule("1f1b", num_ranks=3, num_microbatches=4)
    spans = clock(s)
    picture = svg({"1f1b": spans}, held={"1f1b": held_over_time(s, spans)})
    root = ET.fromstring(picture)
    ticks = [float(t.text or "") for t in root.findall(".//{*}text[@class='in tick']")]
    assert ticks[0] == 0 and len(ticks) > 5 and max(ticks) <= max(x.end_s for x in spans)
    marks = [m.get("fill") for m in root.findall(".//{*}rect[@class='mark']")]
    curves = [c.get("stroke") for c in root.findall(".//{*}polyline[@class='held']")]
    assert marks == curves and len(set(marks)) == 3
    assert root.get("aria-label") == root.find("{*}title").text == "Timelines: 1f1b"
    named = [t.text for t in root.findall("{*}text")]
    assert "F forward" in named and "U update" not in named and "held (shares)" in named
    assert "time (units of the costs)" in named
    assert not re.search(r"to [0-9.]+ s<", picture)
    measured = svg({"1f1b": spans}, seconds=True)
    assert "time (s)" in measured and re.search(r"to [0-9.]+ s<", measured)


def test_an_update_that_takes_no_time_is_a_mark():
    s = schedule("pipedream", num_ranks=2, num_microbatches=3)
    root = ET.fromstring(svg({"pipedream": clock(s)}))
    marks = [g for g in root.findall(".//{*}g") if g.find("{*}title").text.startswith("0U")]
    assert [g.find("{*}rect").get("width") for g in marks] == ["3.00"] * 3
    assert "U update" in [t.text for t in root.findall("{*}text")]


def test_what_is_freed_as_the_next_is_taken_shows_no_dip():
    curve = [(0.0, 1.0), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (3.0, 3.0), (3.0, 2.0), (4.0, 0.0)]
    (line,) = [x for x in held_svg([curve], 0.0, (0, 0), 1.0, 3.0) if "polyline" in x]
    levels = [float(p.split(",")[1]) for p in re.findall(r"[0-9.]+,[0-9.]+", line)]
    assert levels == [3, 2, 2, 1, 1, 1, 1, 0, 0, 1, 1, 3], "a peak of no duration is one"


def test_the_peak_stands_left_of_the_curve():
    words = held_svg([[(0.0, 12.34)]], 0.0, (88, 0), 1.0, 10.0, " GB")[1]
    assert "peak 12.34 GB" in words and 4 + 6 * len("peak 12.34 GB") < 88
    assert 'x1="88' in svg({"": [Span(0, "compute", "F", "a", 0.0, 1.0)]})


def test_eights_of_microbatches_and_a_drain_are_told_apart():
    made = schedule("pipedream", num_ranks=2, num_microbatches=26)
    picture = svg({"a": clock(made)}, drains={"a"})
    cells = re.findall(r"<title>0F(\d+) on.*?</g>", picture)
    drawn = {k: re.search(rf"<title>0F{k} on.*?</g>", picture)[0] for k in map(int, cells)}
    assert [drawn[k].count('class="eight"') for k in (0, 7, 8, 16, 24)] == [0, 0, 1, 1, 2]
    looks = {
        re.sub(r'<title>.*?</title>|[xy]="[^"]*"|<text.*?</text>', "", drawn[k]) for k in (2, 10)
    }
    assert len(looks) == 2
    assert "microbatch 24+" in picture and "microbatch 32+" not in picture
    grounds = re.findall(r'class="drain" x="([\d.]+)".*?<title>(rank \d drains)', picture)
    assert [words for _, words in grounds] == ["rank 0 drains", "rank 1 drains"]
    assert "drain" not in svg({"a": clock(made)})


def test_what_cannot_run_is_told_in_the_picture():
    words = "alive: deadlock\n  rank 0 | 0F0 <-- 0B0 waits for 1B0"
    root = ET.fromstring(svg({}, refused={"mine.csv cannot run": words}))
    lines = [t.text for t in root.findall("{*}text")]
    assert lines == ["mine.csv cannot run", *words.splitlines()], "no axis of nothing"
    assert "white-space:pre" in root.find("{*}style").text

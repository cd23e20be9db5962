"""The page of plans in a real browser: it sorts, draws, and shows the plan that is clicked."""

from pathlib import Path

import pytest
from pages import click, largest

from partita.cli.main import run

pytest.importorskip("selenium")
WORDS = (
    "plan tiny 4xh100 --global-batch-size 8 --seq-len 64 --fix pp2 --fix 4mb --forbid cp --top 6"
)


def column(browser, number: int) -> list[str]:
    cells = browser.find_elements("css selector", f"#table tbody td:nth-child({number})")
    return [cell.get_attribute("data-value") for cell in cells]


@pytest.mark.browser
@pytest.mark.timeout(120)
def test_a_plan_that_is_clicked_is_drawn(browser, tmp_path: Path) -> None:
    page, script = (
        tmp_path / "plans.html",
        "return document.getElementById(arguments[0]).textContent",
    )
    assert run([*WORDS.split(), "--html", str(page)]) == 0
    browser.get(page.as_uri())
    requested = [x["message"] for x in browser.get_log("performance")]
    assert not any('"url":"http' in x for x in requested if "requestWillBeSent" in x)

    steps = [float(x) for x in column(browser, 3)]
    told = [float(f"{s:.12e}") for s in steps]  # beyond that plans are equally fast (nodes.py)
    assert len(steps) == 6 and told == sorted(told)
    for times in (1, 2):
        click(browser, browser.find_element("css selector", '#table th[data-column="3"]'))
        sizes = [float(x) for x in column(browser, 4)]
        assert sizes == sorted(sizes, reverse=times == 2)

    first = browser.find_element("id", "chosen-plan").text
    assert first in column(browser, 2) and browser.find_elements("css selector", "#why li")
    other = next(
        r for r in browser.find_elements("css selector", "#table tbody tr") if first not in r.text
    )
    click(browser, other)
    chosen = browser.find_element("id", "chosen-plan").text
    assert chosen != first and chosen in other.text and "chosen" in other.get_attribute("class")
    spans = browser.find_elements("css selector", "#timeline .span")
    assert len(spans) >= 2 * 4 * 2, "two stages, four microbatches, forward and backward"
    assert len(browser.find_elements("css selector", "#timeline .held")) == 2
    assert browser.find_elements("css selector", "#memory .bar")
    click(browser, largest(spans))
    assert " on rank " in browser.execute_script(script, "span-detail")

    dots = browser.find_elements("css selector", "#scatter .dot")
    assert len(dots) == 6
    browser.execute_script("arguments[0].dispatchEvent(new Event('click'))", dots[0])
    assert browser.find_element("id", "chosen-plan").text == first
    ticks = browser.execute_script(
        "return [...document.querySelectorAll('#scatter text')].map(t=>t.textContent)"
    )
    assert len(ticks) == 11 and len(set(ticks)) == 11, "no value stands twice on an axis"
    long = "pp2:1f1b pipeline.split=" + ",".join(["13"] * 60)
    cell = browser.find_element("css selector", "#table tbody td:nth-child(2)")
    browser.execute_script("arguments[0].textContent=arguments[1]", cell, long)
    name = browser.find_element("id", "chosen-plan")
    browser.execute_script("arguments[0].textContent=arguments[1]", name, long)
    for width in (420, 1400):
        resize = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", resize)
        shown = "return [document.documentElement.scrollWidth, window.innerWidth]"
        wide, room = browser.execute_script(shown)
        assert room == width and wide <= room, "nothing runs out of its card"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_log("browser") == []
    assert browser.save_screenshot(str(tmp_path / "plans.png"))

"""The report in a real browser: it draws, it says nothing wrong, and a click opens a span."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import click, largest
from runs import write_run

from partita.report.make import write_report
from partita.report.summary import read_run

pytest.importorskip("selenium")


@pytest.mark.browser
@pytest.mark.timeout(120)
def test_the_report_opens_and_a_click_opens_a_span(browser, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    folder = tmp_path / "run"
    write_run(folder)
    page = write_report(read_run(folder), folder / "report.html")
    browser.get(page.as_uri())
    WebDriverWait(browser, 30).until(
        lambda b: b.find_elements(By.CSS_SELECTOR, "#timeline-figure .point path")
    )
    assert browser.get_log("browser") == []
    requested = [x["message"] for x in browser.get_log("performance")]
    assert not any('"url":"http' in x for x in requested if "requestWillBeSent" in x)

    rows = {x.text for x in browser.find_elements(By.CSS_SELECTOR, "#timeline-figure .ytick")}
    assert rows == {f"rank {r} {what}" for r in range(4) for what in ("predicted", "measured")}
    assert browser.find_elements(By.CSS_SELECTOR, "#memory-figure .point path")
    assert browser.find_elements(By.CSS_SELECTOR, "#loss-figure .scatterlayer path")
    assert "unigram entropy" in browser.find_element(By.ID, "loss-figure").text

    detail = browser.find_element(By.ID, "timeline-figure-detail")
    assert detail.text == "Click a span."
    click(browser, largest(browser.find_elements(By.CSS_SELECTOR, "#timeline-figure .point path")))
    assert "lane compute" in detail.text
    assert "microbatch" in detail.text
    assert browser.get_log("browser") == []
    assert browser.save_screenshot(str(folder / "report.png"))
    assert (folder / "report.png").stat().st_size > 20_000

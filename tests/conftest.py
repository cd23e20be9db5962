"""What all tests share: a deadline for each test, tolerances by dtype and number of terms, a browser."""

import gc
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import hypothesis  # noqa: F401 (what it registers must be there before objects are frozen)
import pytest
from turns import diagonal

# Seconds a test of each folder may take; a mark on the test itself goes before.
DEADLINES = {"house": 60, "pure": 60, "local": 60, "scale": 60, "gloo": 120, "e2e": 300}
SLOW = (
    240  # of those marked slow: a starved machine takes many times as long, and that fails nothing
)
# The longest, which should not be last; ranks that are processes wait much, best while others compute
FIRST = {"e2e": 0, "gloo": 1}
EPSILON = {"fp64": 2.0**-52, "fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
TURNS = count()
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1360,2600", "--disable-dev-shm-usage",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--require-browser", action="store_true", help="fail, not skip, where Chromium is missing"
    )
    parser.addoption(
        "--every",
        action="store_true",
        help="run all chosen plans on processes, not a third of them",
    )
    parser.addoption(
        "--hosts", action="store_true", help="make two hosts of network namespaces (root, ip)"
    )


def pytest_collection_modifyitems(config, items):
    leave_to_other_commits(config, items)
    here = Path(__file__).parent

    def folder_of(item) -> str:
        return item.path.relative_to(here).parts[0] if here in item.path.parents else ""

    items.sort(key=lambda item: FIRST.get(folder_of(item), len(FIRST)))
    for item in items:
        folder = folder_of(item)
        if item.get_closest_marker("timeout") is None:
            least = SLOW if item.get_closest_marker("slow") else 60
            item.add_marker(pytest.mark.timeout(max(DEADLINES.get(folder, 60), least)))


def leave_to_other_commits(config, items):
    """Of a grid, or of tests that name one group, with the mark `turns(n)` or `turns(n, group)` one case in n
    stays; all where cases are asked for by name."""
    if any("[" in word for word in config.args):
        return
    grids = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("turns"):
            parts, *group = mark.args
            grids[parts, *(group or (item.module, item.originalname))].append(item)
    kept = {item for (parts, *_), cases in grids.items() for item in diagonal(cases, parts)}
    left = {item for cases in grids.values() for item in cases} - kept
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


def pytest_collection_finish():
    """What torch, pytest and all modules hold stays: no collection walks it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    """Each worker keeps its thread ranks on one core, where they take turns anyway: waking one on another
    costs a quarter more. A worker beyond the cores takes one after the other; processes may run anywhere."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and CPUS:
        at = int(worker) if int(worker) < len(CPUS) else next(TURNS)
        own = [CPUS[at % len(CPUS)]]
        os.sched_setaffinity(0, own if item.path.parent.name in ("local", "e2e") else CPUS)


@pytest.fixture
def tolerance():
    """tolerance(dtype, num_terms): the relative error that sums of so many terms may differ by."""

    def of(dtype: str, num_terms: int) -> float:
        # Two orders of one sum differ by about sqrt(n) roundings (Higham 2002, 2.8); 8 covers the
        # handful of such sums that a value passes through.
        return 8 * EPSILON[dtype] * math.sqrt(max(num_terms, 1))

    return of


@pytest.fixture
def chromium(request) -> str:
    """The path of a Chromium; the test is skipped without one, or fails under --require-browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not (found and shutil.which("chromedriver")):
        message = "chromium and chromedriver are not installed (Debian: chromium chromium-driver)"
        if request.config.getoption("--require-browser"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture
def browser(chromium: str, tmp_path: Path) -> Iterator:
    """A headless Chromium that tells what it logged and asked for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()

"""Tests that need CUDA, on one GPU that all thread ranks share; `make test-gpu` runs them, from the source
tree. They are skipped without one, unless PARTITA_TEST_DEVICE=cpu says to try themselves on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
for folder in ("local", "gloo"):  # jobs and small runs are theirs
    sys.path.append(str(HERE.parent / folder))
from gpu_jobs import DEVICE, TABLE  # noqa: E402

MISSING = DEVICE.type == "cuda" and not torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    for item in (i for i in items if HERE in i.path.parents):
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.filterwarnings("default"))
        item.add_marker(pytest.mark.timeout(180))
        if MISSING:
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


def pytest_runtest_logreport(report):
    """A line as soon as a test is over, with what it has measured: a run may be cut short."""
    if report.when != "call" or "tests/gpu" not in report.nodeid or MISSING:
        return
    name = report.nodeid.partition("::")[2]
    words = [f"{report.duration:5.1f} s {report.outcome} {name}", *TABLE]
    if report.failed:
        words += [line for line in report.longreprtext.splitlines() if line.startswith("E ")][:12]
    TABLE.clear()
    sys.__stdout__.write("\n" + "\n".join(word[:200] for word in words))
    sys.__stdout__.flush()

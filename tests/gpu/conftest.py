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


def pytest_terminal_summary(terminalreporter):
    if TABLE:
        terminalreporter.section(
            "measured on " + (torch.cuda.get_device_name() if not MISSING else "-")
        )
        for line in TABLE:
            terminalreporter.write_line(line)

"""What the tests of the GPU share: the device, and what they tell of it in the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import verify_jobs

from partita.spec.job import Job

DEVICE = torch.device(os.environ.get("PARTITA_TEST_DEVICE", "cuda"))
TABLE: list[str] = []  # lines of what was measured


def job(folder, plan: str, *given: Any, **model: Any) -> Job:
    """A tiny job (verify_jobs.py) on the device."""
    return replace(verify_jobs.job(folder, plan, *given, **model), device=DEVICE.type)


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The least that a call takes, once it has been made, on the device's clock as the host sees it."""
    found = []
    for _ in range(times + 1):
        settle()
        start = time.perf_counter()
        work()
        settle()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def settle() -> None:
    """The device has done all."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()

"""What needs no torch starts at once."""

import os
import resource
import subprocess
import sys
from functools import partial

import pytest
from layers import ROOT
from took import least_seconds

from partita.cli.main import available

LIMIT_S = 0.8  # 0.25 to 0.45 on a core of one's own; more beside work on its other thread
TRIES = 12  # a busy machine spoils some, not all

LINES = {
    "draw": ["draw", "1f1b", "-p", "4", "-m", "8"],
    "simulate": ["simulate", "--help"],
    "plan": [
        *("plan", "llama3-8b", "16xh100", "--plan", "pp2:1f1b/8mb tp8+sp bf16"),
        *("--global-batch-size", "16", "--seq-len", "8192"),
    ],
}


def processor_time_of_children() -> float:
    """Seconds of work, which a busy machine does not change."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("verb", [verb for verb in LINES if verb in available()])
def test_it_starts_at_once(verb):
    words = [sys.executable, "-m", "partita", *LINES[verb]]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # as a user's
    once = partial(
        subprocess.run, words, check=True, capture_output=True, cwd=ROOT, env=env, timeout=30
    )
    took = least_seconds(once, LIMIT_S, TRIES, clock=processor_time_of_children)
    assert took < LIMIT_S, f"partita {verb}: the least of {TRIES} starts {took:.2f} s"


@pytest.mark.parametrize("verb", [verb for verb in LINES if verb in available()])
def test_it_starts_without_the_heavy_libraries(verb):
    words = [sys.executable, "-X", "importtime", "-m", "partita", *LINES[verb]]
    told = subprocess.run(words, check=True, capture_output=True, cwd=ROOT, timeout=30, text=True)
    modules = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "partita.cli.main" in modules
    assert not modules & {"torch", "numpy", "scipy"}

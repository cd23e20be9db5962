"""Every example runs, as its docstring says."""

import resource
import subprocess
import sys

import pytest
from layers import ROOT

SLOW = {"long_context"}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CASES = [
    pytest.param(e, id=e.stem, marks=(pytest.mark.slow, pytest.mark.timeout(200)))
    if e.stem in SLOW
    else pytest.param(e, id=e.stem, marks=pytest.mark.timeout(200))
    for e in EXAMPLES
]


@pytest.mark.turns(2)
@pytest.mark.parametrize("example", CASES)
def test_an_example_runs(example, tmp_path):
    """Under torchrun where its docstring says so; within a minute of two cores, which other tests may
    share, so that processor time is held to it."""
    said = [line.split() for line in example.read_text().splitlines() if "torchrun" in line]
    words = ["-m", "torch.distributed.run", *said[0][1:-1]] if said else []
    before = _used()
    done = subprocess.run(
        [sys.executable, *words, str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=190,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
    assert _used() - before < 2 * 60


def _used() -> float:
    """Processor seconds of all processes that this one started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

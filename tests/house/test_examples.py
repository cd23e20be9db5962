"""Every example runs, as its docstring says."""

import subprocess
import sys

import pytest
from layers import ROOT

LONG = {"long_context": 170}  # seconds, where other work may share the cores
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CASES = [
    pytest.param(e, id=e.stem, marks=(pytest.mark.slow, pytest.mark.timeout(200)))
    if e.stem in LONG
    else pytest.param(e, id=e.stem)
    for e in EXAMPLES
]


@pytest.mark.parametrize("example", CASES)
def test_an_example_runs(example, tmp_path):
    """Under torchrun where its docstring says so."""
    said = [line.split() for line in example.read_text().splitlines() if "torchrun" in line]
    words = ["-m", "torch.distributed.run", *said[0][1:-1]] if said else []
    done = subprocess.run(
        [sys.executable, *words, str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LONG.get(example.stem, 55),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout

"""Every example runs, as its docstring says."""

import subprocess
import sys

import pytest
from layers import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path):
    """Under torchrun where its docstring says so."""
    said = [line.split() for line in example.read_text().splitlines() if "torchrun" in line]
    words = ["-m", "torch.distributed.run", *said[0][1:-1]] if said else []
    done = subprocess.run(
        [sys.executable, *words, str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout

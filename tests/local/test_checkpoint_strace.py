"""The system calls of a save, as strace sees them: flushed before the rename, and killed at each of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
from saves import is_step

from partita.train import checkpoint

CALLS = "write,fsync,rename"
SAVE = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import saves as t

    t.behind.threading.Thread = t.Inline  # strace counts calls by thread
    for step in map(int, sys.argv[3:]):
        t.alone(Path(sys.argv[2]), step, keep_last=1)
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]


def save(folder: Path, steps: Sequence[int], *options: str) -> int:
    """Saves these steps in a process under strace; its exit code, negative for a signal."""
    code = textwrap.dedent(SAVE)
    words = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder), *map(str, steps)]
    traced = ["strace", "-f", "-qq", "-y", *options, *words]
    return subprocess.run(traced, capture_output=True, timeout=120).returncode


def calls(trace: Path, folder: Path) -> list[tuple[str, str]]:
    """(call, path within the checkpoints folder) in order; of a rename the old name."""
    found = []
    for line in trace.read_text().splitlines():
        call = re.search(r"\b(write|fsync|rename)\((?:\d+<|\")([^>\"]+)", line)
        if call and call[2].startswith(str(folder)):
            found.append((call[1], call[2].removeprefix(str(folder)).strip("/")))
    return found


def test_a_save_is_flushed_before_it_is_renamed_and_killed_anywhere_leaves_one(
    tmp_path: Path,
) -> None:
    trace = tmp_path / "trace"
    assert save(tmp_path / "whole", [10], "-o", str(trace), "-e", f"trace={CALLS}") == 0
    seen = calls(trace, tmp_path / "whole")
    (commit,) = [i for i, (call, _) in enumerate(seen) if call == "rename"]
    temporary = seen[commit][1]
    for name in ("rank-0.safetensors", "manifest.json"):
        inside = [i for i, x in enumerate(seen) if x[1] == f"{temporary}/{name}"]
        assert [seen[i][0] for i in inside][-1] == "fsync" and inside[-1] < commit
        assert [seen[i][0] for i in inside].count("fsync") == 1
    assert seen[commit - 1] == ("fsync", temporary) and seen[commit + 1] == ("fsync", "")
    shutil.copytree(tmp_path / "whole", tmp_path / "first")

    outcomes = []
    for call in CALLS.split(","):
        number = 0
        while True:
            number += 1
            folder = tmp_path / f"{call}-{number}"
            shutil.copytree(tmp_path / "first", folder)
            inject = f"inject={call}:signal=KILL:when={number}"
            killed = save(folder, [20], "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
            newest = checkpoint.newest_complete(folder)
            assert newest is not None
            step = int(newest.name.removeprefix("step-"))
            assert step in (10, 20) and is_step(newest, step)
            if killed == 0:
                break
            outcomes.append((call, step))
            shutil.rmtree(folder)
        assert number > 2, f"{call} was never struck"
    assert {step for _, step in outcomes} == {10, 20}
    assert {call for call, _ in outcomes} == set(CALLS.split(","))

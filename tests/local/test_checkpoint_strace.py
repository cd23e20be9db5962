"""The system calls of a save, as strace sees them: flushed before the rename, and killed at each of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from saves import is_step

from partita.train.checkpoints import checkpoint

CALLS = "write,fsync,rename"
AT = 300  # strace kills a process at this call of its own
SAVE = """
    import os, shutil, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import saves as t

    t.background_save.threading.Thread = t.Inline  # strace counts calls by thread
    root, call, at = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    t.alone(root / "0", 10, keep_last=1)

    def waste():  # one call, elsewhere
        file = os.open(root / "waste", os.O_CREAT | os.O_WRONLY)
        if call == "rename":
            os.rename(root / "waste", root / "waste")
        else:
            os.write(file, b".") if call == "write" else os.fsync(file)
        os.close(file)

    number, status = 0, -1
    while call and status != 0:
        number += 1
        shutil.copytree(root / "0", root / str(number))
        child = os.fork()
        if child == 0:
            for _ in range(at - number):
                waste()
            t.alone(root / str(number), 20, keep_last=1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -9)
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed"),
]


def saved(folder: Path, call: str, *options: str) -> None:
    """Saves step 10 in a process under strace; then, where a call is named, step 20 in children of which
    number n is killed at its n-th such call, until one is not."""
    folder.mkdir()
    words = [str(Path(__file__).parent), str(folder), call, str(AT)]
    code = [sys.executable, "-c", textwrap.dedent(SAVE), *words]
    alone = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # no calls but the save's
    ran = subprocess.run(
        ["strace", "-f", "-qq", "-y", *options, *code],
        capture_output=True, text=True, timeout=280, env=alone,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def calls(trace: Path, folder: Path) -> list[tuple[str, str]]:
    """(call, path within the checkpoints folder) in order; of a rename the old name."""
    found = []
    for line in trace.read_text().splitlines():
        call = re.search(r"\b(write|fsync|rename)\((?:\d+<|\")([^>\"]+)", line)
        if call and call[2].startswith(str(folder)):
            found.append((call[1], call[2].removeprefix(str(folder)).strip("/")))
    return found


def test_a_save_is_flushed_before_it_is_renamed(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    saved(tmp_path / "whole", "", "-o", str(trace), "-e", f"trace={CALLS}")
    seen = calls(trace, tmp_path / "whole" / "0")
    (commit,) = [i for i, (call, _) in enumerate(seen) if call == "rename"]
    temporary = seen[commit][1]
    for name in ("rank-0.safetensors", "manifest.json"):
        inside = [i for i, x in enumerate(seen) if x[1] == f"{temporary}/{name}"]
        assert [seen[i][0] for i in inside][-1] == "fsync" and inside[-1] < commit
        assert [seen[i][0] for i in inside].count("fsync") == 1
    assert seen[commit - 1] == ("fsync", temporary) and seen[commit + 1] == ("fsync", "")


@pytest.mark.parametrize("call", CALLS.split(","))
def test_a_save_killed_at_any_call_leaves_one(call: str, tmp_path: Path) -> None:
    inject = f"inject={call}:signal=KILL:when={AT}"
    saved(tmp_path / "runs", call, "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
    steps = []
    for number in range(1, len(os.listdir(tmp_path / "runs")) - 1):  # beside "0" and the waste
        newest = checkpoint.newest_complete(tmp_path / "runs" / str(number))
        assert newest is not None
        steps.append(int(newest.name.removeprefix("step-")))
        assert steps[-1] in (10, 20) and is_step(newest, steps[-1])
    *killed, whole = steps
    assert whole == 20 and killed == sorted(killed)
    assert len(killed) > 1 and set(killed) == ({10} if call == "write" else {10, 20}), killed

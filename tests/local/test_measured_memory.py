"""The measured ledger against another witness: what the C allocator has handed out."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

JOB = {
    "name": "big",
    "plan": "2mb",
    "model": {
        "family": "llama", "layers": 4, "hidden": 384, "heads": 6, "ffn_hidden": 1024, "vocab": 8192,
        "max_seq_len": 128,
    },
    "cluster": {"preset": "laptop", "memory_bytes": 2_000_000_000},
    "data": {"source": "python-stdlib", "tokenizer": "byte"},
    "train": {"steps": 3, "global_batch_size": 4, "seq_len": 128, "micro_batch_size": 2},
}  # fmt: skip


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ledger_grows_as_the_allocator_does(precision: str, tmp_path: Path) -> None:
    job = {**JOB, "plan": f"2mb {precision}"}
    script = Path(__file__).with_name("measured_memory.py")
    alone = {"OMP_NUM_THREADS": "1", "MKL_DISABLE_FAST_MM": "1"}  # MKL keeps no buffers of its own
    ran = subprocess.run(
        [sys.executable, str(script), json.dumps(job), str(tmp_path)],
        capture_output=True, text=True, timeout=110, env={**os.environ, **alone},
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["ledger"] >= 200_000_000
    assert found["malloc"] == pytest.approx(found["ledger"], rel=0.10)
    assert found["at_peak"].get("untagged", 0) < 0.03 * found["ledger"]

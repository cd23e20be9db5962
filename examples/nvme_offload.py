"""A model whose training state is three times the memory limit trains: its states lie in files.

    python examples/nvme_offload.py

bf16 AdamW keeps 18 bytes a parameter. On the device stay the 2 of the working weights, and one unit's
gradient while a backward makes it; gradients, masters and moments (16) are in files, and pass through a few
buffers of host memory, chunk by chunk, when they are added to and updated. Device and host together stay
below the limit; the ledger measures each arena from its allocator, and the disk from the file system.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import chdir
from pathlib import Path

import partita as pt

HERE = "1mb bf16 data.bucket_bytes=1000000 recompute:full"
PLANS = {"on the device": HERE, "in files": f"{HERE} offload:nvme"}
MODEL = {
    "family": "llama",
    "layers": 6,
    "hidden": 384,
    "heads": 6,
    "ffn_hidden": 1024,
    "vocab": 4096,
    "max_seq_len": 64,
}
STATE_BYTES = 18 * pt.ModelSpec.from_toml(MODEL).parameters()
LIMIT_BYTES = STATE_BYTES // 3


def job_of(plan: str) -> pt.Job:
    """Three steps of a 13.8M-parameter Llama on the standard library's sources, a byte a token."""
    return pt.Job.load(
        {
            "name": "nvme-offload",
            "plan": plan,
            "model": MODEL,
            "cluster": {"preset": "laptop", "memory_bytes": LIMIT_BYTES},
            "data": {"source": "python-stdlib", "tokenizer": "byte", "eval_fraction": 0.0},
            "train": {"steps": 3, "global_batch_size": 1, "seq_len": 64, "lr": 1e-3},
        }
    )


def measured(folder: Path) -> dict[str, dict[str, int]]:
    """Bytes by arena and category at the peak of the run's measured steps."""
    record = json.loads((folder / "records" / "rank-0.json").read_bytes())
    found = {
        "device": record["ledger"],
        "host": record["host_ledger"],
        "disk": record["disk_ledger"],
    }
    return {arena: ledger["at_peak"] for arena, ledger in found.items()}


def main() -> None:
    """Predicts both plans, trains the one that fits, and holds what was measured against the limit."""
    print(f"state {STATE_BYTES / 1e6:.0f} MB, limit {LIMIT_BYTES / 1e6:.0f} MB")
    for name, plan in PLANS.items():
        prediction = pt.simulate(job_of(plan))
        print(f"{name:<14} fits: {prediction.fits}")
        assert prediction.fits == (name == "in files")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        report = pt.train(job_of(PLANS["in files"]))
        arenas = measured(Path(report["run"]))
    print(f"loss {report['loss']:.4f} after {report['step']} steps")
    for arena, held in arenas.items():
        parts = ", ".join(f"{c} {n / 1e6:.1f}" for c, n in sorted(held.items()))
        print(f"{arena:<8}{sum(held.values()) / 1e6:7.1f} MB: {parts}")
    assert sum(arenas["device"].values()) + sum(arenas["host"].values()) <= LIMIT_BYTES
    assert sum(arenas["disk"].values()) > 2.5 * LIMIT_BYTES


if __name__ == "__main__":
    main()

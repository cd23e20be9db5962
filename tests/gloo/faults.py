"""A small run under `partita train`, and what must hold after any fault of it."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import psutil

from partita.base.config import to_toml
from partita.cli.main import run as command
from partita.comm.processes import is_alive
from partita.train.checkpoints import checkpoint

TIMEOUT_S = 60  # far beyond what anything takes: what is seen sooner is not seen by it
SHORT_S = 4  # where it must pass
SLACK_S = 30  # for a busy machine
JOB: dict[str, Any] = {
    "name": "small",
    "plan": "tp2",
    "model": {
        "family": "llama", "layers": 2, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn_hidden": 32,
        "vocab": 256, "max_seq_len": 32,
    },
    "cluster": {"preset": "laptop"},
    "data": {"source": "text.txt", "tokenizer": "byte", "eval_fraction": 0},
    "train": {
        "steps": 5, "global_batch_size": 2, "seq_len": 16, "checkpoint_every": 2,
        "comm_timeout_s": TIMEOUT_S,
    },
}  # fmt: skip
RUN = Path("runs/small")


def write_job(**sections: Any) -> None:
    """job.toml and text.txt in the current folder; sections are merged into JOB."""
    job = {k: {**v, **sections.get(k, {})} if isinstance(v, dict) else sections.get(k, v)
           for k, v in JOB.items()}  # fmt: skip
    Path("job.toml").write_text(to_toml(job))
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "ate", "it")
    dice = random.Random(0)
    Path("text.txt").write_text(" ".join(dice.choice(words) for _ in range(2000)))


def train(*words: str) -> int:
    """`partita train job.toml ...` in this process; its ranks are processes of their own."""
    return command(["train", "job.toml", *words])


def metrics(run: Path = RUN) -> list[tuple[float, ...]]:
    """(step, loss, norm, lr) of every line."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(x["step"], x["loss"], x["grad_norm"], x["lr"]) for x in lines]


def weights(run: Path = RUN) -> bytes:
    """The newest checkpoint's pieces, bit by bit."""
    newest = checkpoint.newest_complete(run / "checkpoints")
    assert newest is not None
    return b"".join(p.read_bytes()[-4096:] for p in sorted(newest.glob("*.safetensors")))


def left_behind(scratch: Path) -> set[Path]:
    """Segments and folders that this test's runs made outside their run folder."""
    shared = Path("/dev/shm")
    names = str(scratch).strip("/").replace("/", "-")
    found = set(shared.glob(f"{names}*")) if shared.is_dir() else set()
    return found | set(scratch.glob("partita-*"))


def are_gone(processes: list[psutil.Process]) -> bool:
    """Whether they end by themselves, soon."""
    deadline = time.monotonic() + SLACK_S
    while any(is_alive(p.pid) for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(is_alive(p.pid) for p in processes)


def failure() -> dict[str, Any]:
    """failure.json."""
    return json.loads((RUN / "failure.json").read_text())

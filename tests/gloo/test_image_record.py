"""Ranks of images as processes hold what is declared, channels cut by tp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from partita.base.config import to_toml
from partita.cli.main import run as command
from partita.report.summary import read_run

IMAGE = {
    "size": 51, "colors": 3, "channels": [32, 64, 32], "kernels": [7, 5, 3], "strides": [2, 1, 1],
    "paddings": [0, 2, 1], "joins": [3], "norms": [1, 2], "pools": [1, 2, 3], "groups": 2, "dense": 1,
}  # fmt: skip


@pytest.mark.timeout(120)
def test_ranks_of_images_hold_what_is_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    dice = np.random.default_rng(0)
    images = dice.integers(0, 256, (24, 3, 51, 51), dtype=np.uint8)
    np.savez("images.npz", images=images, labels=dice.integers(0, 7, 24))
    job = {
        "name": "photos",
        "plan": "tp2 2mb",
        "model": {"family": "alexnet", "hidden": 64, "vocab": 7, "image": IMAGE},
        "cluster": {"preset": "laptop"},
        "data": {"source": "images:images.npz"},
        "train": {"steps": 3, "global_batch_size": 16, "seq_len": 1},
    }
    Path("job.toml").write_text(to_toml(job))
    assert command(["train", "job.toml", "--json"]) == 0, capsys.readouterr().err
    run = read_run(Path("runs/photos"))
    assert run.traffic_equal is True
    for predicted, record in zip(run.predicted, run.ranks, strict=True):
        ledger = record.ledger
        assert ledger.at_peak.get("untagged", 0) < 0.03 * ledger.peak_bytes, json.dumps(
            dict(ledger.at_peak)
        )
        assert ledger.peak_bytes == pytest.approx(predicted.ledger.peak_bytes, rel=0.10)

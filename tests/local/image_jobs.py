"""A small AlexNet: four convolutions in four groups, one of them a join, two fully connected layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from partita.spec.job import Job

IMAGE: dict[str, Any] = {
    "size": 9, "colors": 2, "channels": [8, 16, 8, 8], "kernels": [3, 3, 3, 1], "strides": [1, 1, 1, 1],
    "paddings": [1, 1, 1, 0], "joins": [3], "norms": [1, 2], "pools": [1, 4], "groups": 4, "dense": 2,
}  # fmt: skip
MODEL: dict[str, Any] = {"family": "alexnet", "hidden": 16, "vocab": 7, "dropout": 0.2}


def write(folder, **changed: Any) -> str:
    """Twenty random images as a file; returns the source's name."""
    dice = np.random.default_rng(0)
    arrays = {
        "images": dice.integers(0, 256, (24, 2, 9, 9), dtype=np.uint8),
        "labels": dice.integers(0, 7, 24),
    }
    np.savez(folder / "images.npz", **(arrays | changed))
    return f"images:{folder / 'images.npz'}"


def job(
    folder, plan: str, image: dict[str, Any] | None = None, batch: int = 8, **model: Any
) -> Job:
    """Two steps of the small model."""
    return Job.load(
        {
            "name": "images",
            "seed": 3,
            "plan": plan,
            "model": {**MODEL, "image": {**IMAGE, **(image or {})}, **model},
            "cluster": {"preset": "laptop", "devices": 64, "memory_bytes": 1e9},
            "data": {"source": write(folder)},
            "train": {"steps": 2, "global_batch_size": batch, "seq_len": 1, "comm_timeout_s": 20},
        }
    )

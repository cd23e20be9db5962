"""A checkpoint as a Hugging Face folder: weights piece by piece, each digest verified, one file's tensors
in memory at a time.
"""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partita.base.config import decode
from partita.base.errors import DataError, UsageError
from partita.model.families.export import export
from partita.spec.model import ModelSpec
from partita.train.build import open_job_data
from partita.train.manifest import read_manifest
from partita.train.pieces import Wanted, fill
from partita.train.sample import job_of

EXPORTED = torch.float32  # masters are fp32, fp64 only under fp64


def export_checkpoint(step_folder: Path, target: Path) -> dict[str, Any]:
    """Writes the model of a step folder, whatever plan wrote it, as a folder that transformers loads,
    with the run's tokenizer.json where it has one.

    Returns tensors, bytes, files and whether the tokenizer is there. Raises CheckpointError for a bad
    checkpoint, UsageError for a target that holds something, WriteError.
    """
    manifest = read_manifest(step_folder)
    stated = {k: v for k, v in manifest.header.model.items() if v is not None}
    spec = decode(ModelSpec, stated, file=str(step_folder))

    @lru_cache(maxsize=1)  # gate and up lie in one tensor, and are asked for one after the other
    def get(name: str) -> Tensor:
        shape = tuple(manifest.header.tensors.get(name, ()))
        value = torch.empty(shape, dtype=EXPORTED)
        fill(
            step_folder,
            manifest,
            [Wanted(name, "weight", shape, tuple((0, n) for n in shape), value)],
        )
        return value

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _tokenizer(step_folder, Path(folder))
        done = export(target, spec, get, dtype=EXPORTED, tokenizer=tokenizer)
    return {
        "tensors": done.tensors,
        "bytes": done.bytes,
        "files": list(done.files),
        "tokenizer": tokenizer is not None,
    }


def _tokenizer(step_folder: Path, folder: Path) -> Path | None:
    """The run's tokenizer.json; None for bytes, tokens, or data that is no longer there."""
    if not (step_folder.parent.parent / "job.toml").exists():
        return None
    try:
        found = open_job_data(job_of(step_folder)).tokenizer
    except (UsageError, DataError):
        return None  # weights are exported without their data
    if found is None or found.digest == "byte":
        return None
    found.save(folder / "tokenizer.json")
    return folder / "tokenizer.json"

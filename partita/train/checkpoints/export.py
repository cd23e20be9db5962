"""A checkpoint as a Hugging Face folder: weights piece by piece, each digest verified, one file's tensors
in memory at a time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partita.base.config import decode, load_json
from partita.base.errors import DataError, UsageError
from partita.model.families.adapters import TENSORS, merged, write_adapter
from partita.model.families.config import NO_SPECIAL_TOKENS
from partita.model.families.export import GENERATION, export
from partita.spec.lora import ADAPTER_CONFIG, A, B
from partita.spec.model import ModelSpec
from partita.train.build import open_job_data
from partita.train.checkpoints.manifest import Manifest, read_manifest
from partita.train.checkpoints.pieces import Wanted, fill
from partita.train.checkpoints.sample import job_of
from partita.train.data.tokenizer import open_tokenizer

EXPORTED = torch.float32  # masters are fp32, fp64 only under fp64
TOKENIZER = "tokenizer.json"
BESIDE = (  # what transformers reads beside it
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def export_checkpoint(step_folder: Path, target: Path) -> dict[str, Any]:
    """Writes the model of a step folder, whatever plan wrote it, as a folder that transformers loads,
    with the run's tokenizer.json where it has one; LoRA merged into its base. What the base says of special
    tokens and generation goes along where its tokenizer does.

    Returns tensors, bytes, files and whether the tokenizer is there. Raises CheckpointError for a bad
    checkpoint, UsageError for a target that holds something, WriteError.
    """
    manifest, spec = _stated(step_folder)
    stored = _reader(step_folder, manifest)

    @lru_cache(maxsize=1)  # gate and up lie in one tensor, and are asked for one after the other
    def get(name: str) -> Tensor:
        value = stored(name)
        if f"{name}{A}" not in manifest.header.tensors:
            return value
        return merged(value, stored(f"{name}{A}"), stored(f"{name}{B}"), spec.lora_scale)

    with tempfile.TemporaryDirectory() as folder:
        along, special = _along(step_folder, Path(folder))
        plain = replace(spec, lora_rank=0, lora_alpha=0.0, lora_targets=(), lora_dropout=0.0)
        done = export(target, plain, get, dtype=EXPORTED, along=along, special=special)
    return {
        "tensors": done.tensors,
        "bytes": done.bytes,
        "files": list(done.files),
        "tokenizer": any(file.name == TOKENIZER for file in along),
    }


def export_adapter(step_folder: Path, target: Path) -> dict[str, Any]:
    """Writes LoRA's A and B of a step folder in the format of peft; the base stays where it is.

    Returns and raises as `export_checkpoint`."""
    manifest, spec = _stated(step_folder)
    if not spec.lora_rank:
        raise UsageError(f"{step_folder} has no adapter: model.lora_rank is 0", key="lora_rank")
    known = (step_folder.parent.parent / "job.toml").exists()
    base = job_of(step_folder).model_path if known else None
    done = write_adapter(target, spec, _reader(step_folder, manifest), base or "")
    files = [TENSORS, ADAPTER_CONFIG]
    size = sum(t.nbytes for t in done.values())
    return {"tensors": len(done), "bytes": size, "files": files, "tokenizer": False}


def _stated(step_folder: Path) -> tuple[Manifest, ModelSpec]:
    manifest = read_manifest(step_folder)
    stated = {k: v for k, v in manifest.header.model.items() if v is not None}
    return manifest, decode(ModelSpec, stated, file=str(step_folder))


def _reader(step_folder: Path, manifest: Manifest) -> Callable[[str], Tensor]:
    """Whole weights by name."""

    def stored(name: str) -> Tensor:
        shape = tuple(manifest.header.tensors.get(name, ()))
        value = torch.empty(shape, dtype=EXPORTED)
        whole = tuple((0, n) for n in shape)
        fill(step_folder, manifest, [Wanted(name, "weight", shape, whole, value)])
        return value

    return stored


def _along(step_folder: Path, folder: Path) -> tuple[list[Path], Mapping[str, Any]]:
    """Files that go along, and ids of special tokens: the run's tokenizer, with what stands beside it; of the
    base what generates text, where the tokenizer is the base's or the data were tokens. Nothing for bytes, or
    for data that is no longer there."""
    if not (step_folder.parent.parent / "job.toml").exists():
        return [], NO_SPECIAL_TOKENS
    job = job_of(step_folder)
    try:
        used = open_job_data(job).tokenizer
    except (UsageError, DataError):
        return [], NO_SPECIAL_TOKENS  # weights are exported without their data
    found: list[Path] = []
    if used is not None and used.digest != "byte":
        used.save(folder / TOKENIZER)
        found.append(folder / TOKENIZER)
        named = Path(job.data.tokenizer).expanduser()
        if named.exists():
            home = named if named.is_dir() else named.parent
            found += [home / file for file in BESIDE]
    special = NO_SPECIAL_TOKENS
    base = Path(job.model_path) if job.model_path else None
    if base is not None and base.is_dir() and (used is None or used.digest == _digest(base)):
        config = load_json(base / "config.json")
        special = {key: config.get(key) for key in NO_SPECIAL_TOKENS}
        found.append(base / GENERATION)
    return [file for file in found if file.exists()], special


def _digest(base: Path) -> str:
    """Of the base's tokenizer."""
    try:
        return open_tokenizer(str(base), vocab=sys.maxsize).digest
    except (UsageError, DataError):
        return ""

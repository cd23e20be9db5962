"""Writes a Hugging Face folder that transformers loads: config.json, generation_config.json, safetensors.

The folder appears whole or not at all: it is written beside its place and renamed. One file up to 5 GB,
above that several and an index; one file's tensors are in memory at a time.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from partita.base.errors import UsageError, WriteError
from partita.model.families.config import NO_SPECIAL_TOKENS, hf_config
from partita.model.families.names import Source, names
from partita.model.families.read import INDEX, SINGLE
from partita.spec.model import ModelSpec

SHARD_BYTES = 5_000_000_000
GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    tensors: int
    bytes: int
    files: tuple[str, ...]


def export(
    folder: str | Path,
    spec: ModelSpec,
    get: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    along: Sequence[Path] = (),
    special: Mapping[str, Any] = NO_SPECIAL_TOKENS,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes the model whose logical tensor `name` is get(name), rounded to `dtype`.

    `folder` is new or empty; `along` are files that are copied into it, `special` the ids of special
    tokens. Raises UsageError for a folder that holds something, WriteError where the disk cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something already: name a new folder", file=str(folder))
    beside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    try:
        beside.mkdir(parents=True)
        done = _write_tensors(beside, spec, get, dtype, shard_bytes)
        _write_json(beside / "config.json", hf_config(spec, dtype) | dict(special))
        _write_json(beside / GENERATION, {"_from_model_config": True, **special})
        for file in along:
            shutil.copyfile(file, beside / file.name)
        beside.replace(folder)
    except (OSError, SafetensorError) as error:
        text = (
            f"{folder}: the export cannot be written: {getattr(error, 'strerror', None) or error}"
        )
        raise WriteError(text, file=str(folder)) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return done


def _write_tensors(
    folder: Path,
    spec: ModelSpec,
    get: Callable[[str], Tensor],
    dtype: torch.dtype,
    shard_bytes: int,
) -> Exported:
    stored: defaultdict[str, list[Source]] = defaultdict(list)
    for source in names(spec):
        stored[source.file_name].append(source)
    sizes = {n: prod(s[0].file_shape) * dtype.itemsize for n, s in stored.items()}
    shards = _shards(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: _join(stored[n], get).to(dtype).contiguous() for n in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors leaves it to the owner alone
        weight_map |= dict.fromkeys(shard, file)
    total = sum(sizes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX, index)
    return Exported(len(sizes), total, tuple(dict.fromkeys(weight_map.values())))


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Tensors in order, as many a file as the limit allows, at least one."""
    found: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if found[-1] and held + size > limit:
            found.append([])
            held = 0
        found[-1].append(name)
        held += size
    return found


def _join(sources: list[Source], get: Callable[[str], Tensor]) -> Tensor:
    """The file tensor of those that share it, in the order of their rows."""
    parts = []
    for source in sorted(sources, key=lambda s: s.offset):
        value = get(source.name).detach()
        value = value[source.part]
        value = value - source.plus if source.plus else value
        heads = source.dims[0] if source.step else 1
        parts.append(value.reshape(heads, source.num_rows // heads, -1))
    whole = torch.cat(parts, 1).flatten(0, 1)
    whole = whole.t() if sources[0].transposed else whole
    # A copy: safetensors refuses tensors that share memory, and get may hand out views of one buffer.
    return whole.reshape(sources[0].file_shape).clone()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

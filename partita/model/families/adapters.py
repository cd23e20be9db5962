"""LoRA's A and B beside their base: merged into it, and as a folder in the format of peft.

    ours                               adapter_model.safetensors, behind base_model.model.
    attention.wq_lora_a [rank, hidden] model.layers.0.self_attn.q_proj.lora_A.weight
    mlp.gate_up_lora_b [2, ffn, rank]  model.layers.0.mlp.gate_proj.lora_B.weight, ... up_proj ...

adapter_config.json says rank, alpha and the modules (spec/lora.py reads it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from partita.base.errors import CheckpointError, UsageError, WriteError
from partita.model.families.names import Source, names
from partita.spec.lora import ADAPTER_CONFIG, A, B, peft_config
from partita.spec.model import ModelSpec

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def merged(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + (alpha / rank) B A of logical tensors: `a` [groups, rank, ...], `b` [groups, ..., rank], groups of
    no, one or more dims; W has the groups, b's dims but the rank, then a's."""
    rank = b.shape[-1]
    groups = prod(base.shape[: a.dim() + b.dim() - 2 - base.dim()])
    low = b.reshape(groups, -1, rank) @ a.reshape(groups, rank, -1)
    return base + scale * low.reshape(base.shape)


def _places(spec: ModelSpec) -> Iterator[tuple[Source, str]]:
    """Every adapted matrix of a Hugging Face folder, and the module that it is."""
    for source in names(spec):
        segment, _, last = source.name.rpartition(".")
        dense = segment.endswith((".attention", ".mlp"))
        if dense and last in spec.lora_targets:
            yield source, PREFIX + source.file_name.removesuffix(".weight")


def write_adapter(
    folder: Path, spec: ModelSpec, get: Callable[[str], Tensor], base: str = ""
) -> dict[str, Tensor]:
    """Writes the two files into a new or empty folder; `get` are logical tensors by name, `base` names the
    model they belong to. Returns what was written. Raises UsageError, WriteError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something already: name a new folder", file=str(folder))
    config = peft_config(spec, base)
    tensors = {}
    for source, module in _places(spec):
        a, b = (get(f"{source.name}{kind}")[source.part] for kind in (A, B))
        tensors[f"{module}.lora_A.weight"] = a.reshape(spec.lora_rank, -1).contiguous().clone()
        tensors[f"{module}.lora_B.weight"] = b.reshape(-1, spec.lora_rank).contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise WriteError(
            f"{folder}: the adapter cannot be written: {error}", file=str(folder)
        ) from error
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    return tensors


def read_adapter(
    folder: Path, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """A and B by our names, in their logical `shapes`, fp32. Raises CheckpointError for what is missing, left
    over or of another shape."""
    path = folder / TENSORS
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no readable adapter: {error}", file=str(path)) from error
    found: dict[str, Tensor] = {}
    for source, module in _places(spec):
        for kind, theirs in ((A, "lora_A"), (B, "lora_B")):
            name, key = f"{source.name}{kind}", f"{module}.{theirs}.weight"
            whole = found.setdefault(name, torch.empty(shapes[name]))
            part = whole[source.part]
            rows = spec.lora_rank if kind == A else part.numel() // spec.lora_rank
            want, value = (rows, part.numel() // rows), stored.pop(key, None)
            if value is None or tuple(value.shape) != want:
                there = "is missing" if value is None else f"has shape {list(value.shape)}"
                text = f"{path}: {key} of shape {list(want)} {there}"
                raise CheckpointError(text, file=str(path), key=key)
            part.copy_(value.reshape(part.shape))
    if stored:
        left = sorted(stored)[0]
        raise CheckpointError(f"{path}: {left} belongs to no target", file=str(path), key=left)
    return found

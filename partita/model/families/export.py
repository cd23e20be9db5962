"""Writes a Hugging Face folder that transformers loads: config.json, generation_config.json, safetensors.

The folder appears whole or not at all: it is written beside its place and renamed. One file up to 5 GB,
above that several and an index; one file's tensors are in memory at a time.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from partita.base.errors import UsageError, WriteError
from partita.model.families.names import Source, names
from partita.model.families.read import INDEX, SINGLE
from partita.spec.model import ModelSpec

SHARD_BYTES = 5_000_000_000


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
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Writes the model whose logical tensor `name` is get(name), rounded to `dtype`.

    `folder` is new or empty; `tokenizer` a tokenizer.json that is copied along. Raises UsageError for a
    folder that holds something, WriteError where the disk cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something already: name a new folder", file=str(folder))
    beside = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    try:
        beside.mkdir(parents=True)
        done = _write_tensors(beside, spec, get, dtype, shard_bytes)
        _write_json(beside / "config.json", hf_config(spec, dtype))
        generation = {"_from_model_config": True, **_NO_SPECIAL_TOKENS}
        _write_json(beside / "generation_config.json", generation)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, beside / "tokenizer.json")
        beside.replace(folder)
    except OSError as error:
        text = f"{folder}: the export cannot be written: {error.strerror or error}"
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
        parts.append(value.reshape(source.num_rows, -1))
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    whole = whole.t() if sources[0].transposed else whole
    # A copy: safetensors refuses tensors that share memory, and get may hand out views of one buffer.
    return whole.reshape(sources[0].file_shape).clone()


# The defaults of transformers name ids of Meta's and OpenAI's tokenizers, which this model may use as
# words, or not have at all.
_NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def hf_config(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """config.json of the model: what transformers 4 and 5 both read."""
    if spec.sliding_window:
        raise UsageError(
            f"a sliding window of {spec.sliding_window} keys has no export yet: Llama's and GPT-2's "
            "config.json cannot say it",
            key="sliding_window",
        )
    shared = {
        **_NO_SPECIAL_TOKENS,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": spec.vocab,
    }
    return shared | (_llama_config(spec) if spec.family == "llama" else _gpt2_config(spec))


def _llama_config(spec: ModelSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn_hidden,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_seq_len,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
    }
    if spec.experts:
        config |= _mixtral_config(spec)
    if spec.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_max_seq_len,
        }
    return config


def _mixtral_config(spec: ModelSpec) -> dict[str, Any]:
    """What a Mixtral adds. Raises UsageError for a router or experts that it has not."""
    others = {
        "router": "softmax", "normalise_top_k": True, "router_scale": 1.0, "router_groups": 1,
        "router_bias": False, "shared_experts": 0, "dense_layers": 0, "capacity_factor": None,
    }  # fmt: skip
    for name, only in others.items():
        if getattr(spec, name) != only:
            text = f"{name} = {getattr(spec, name)} has no place in a Mixtral, which has {only}"
            raise UsageError(f"{text}: this model has no Hugging Face layout yet", key=name)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "intermediate_size": spec.expert_ffn_hidden,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": spec.top_k,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def _gpt2_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": spec.layers,
        "n_embd": spec.hidden,
        "n_head": spec.heads,
        "n_inner": spec.ffn_hidden,
        "n_positions": spec.max_seq_len,
        "layer_norm_epsilon": spec.norm_eps,
        "embd_pdrop": spec.dropout,
        "attn_pdrop": spec.dropout,
        "resid_pdrop": spec.dropout,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

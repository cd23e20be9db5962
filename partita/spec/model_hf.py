"""A Hugging Face config.json as a ModelSpec. Reads what transformers 4 and 5 write.

What ModelSpec cannot say is refused, never dropped: biases in a Llama, other activations, other RoPE
scalings, dropouts that differ, quantized weights. So is a key that is not known and is on: it may
change the model. Keys of `_NEUTRAL` do not: they are about generation, storage and training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partita.base.config import decode, load_json
from partita.base.errors import UsageError
from partita.spec.model import ModelSpec

_LLAMA = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden": "intermediate_size",
    "tied": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}
_GPT2 = {
    "layers": "n_layer",
    "hidden": "n_embd",
    "heads": "n_head",
    "vocab": "vocab_size",
    "max_seq_len": "n_positions",
    "ffn_hidden": "n_inner",
    "tied": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
}
_MIXTRAL = _LLAMA | {"experts": "num_local_experts", "top_k": "num_experts_per_tok"}
_NAMES = {"llama": _LLAMA, "gpt2": _GPT2, "mixtral": _MIXTRAL}
# key -> the values under which ModelSpec describes the same model
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0,),
        "partial_rotary_factor": (1.0,),
        "sliding_window": (),
    },
    "mixtral": {
        "hidden_act": ("silu", "swish"),
        "attention_dropout": (0.0,),
        "router_jitter_noise": (0.0,),
        "output_router_logits": (False,),
        "sliding_window": (),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "reorder_and_upcast_attn": (False,),
    },
}
# what transformers fills in where a config.json is silent
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_seq_len": 2048, "norm_eps": 1e-6, "tied": False},
    "mixtral": {"max_seq_len": 131072, "norm_eps": 1e-5, "tied": False, "rope_theta": 1e6},
}
_READ = {"model_type", "rope_theta", "rope_scaling", "rope_parameters"}
_READ |= {"resid_pdrop", "embd_pdrop", "attn_pdrop"}
_NEUTRAL_WORDS = """
architectures auto_map transformers_version _name_or_path name_or_path torch_dtype dtype
_attn_implementation attn_implementation _attn_implementation_autoset use_cache initializer_range
pretraining_tp n_ctx base_model_tp_plan base_model_pp_plan keys_to_ignore_at_inference return_dict
return_dict_in_generate output_attentions output_hidden_states output_scores router_aux_loss_coef
id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class
prefix bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids
max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values
exponential_decay_length_penalty is_decoder summary_type summary_use_proj summary_activation
summary_proj_to_labels summary_first_dropout gradient_checkpointing use_bfloat16 torchscript
tf_legacy_loss
"""
_NEUTRAL = frozenset(_NEUTRAL_WORDS.split())


def read_hf_config(path: str | Path) -> ModelSpec:
    """The model of a Hugging Face folder or config.json. Raises UsageError with file and key."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    config = load_json(file)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _ONLY:
        raise UsageError(
            f"{file}: model_type: {kind!r} is not supported; {', '.join(_ONLY)} are",
            file=str(file),
            key="model_type",
        )
    for key, accepted in _ONLY[kind].items():
        if config.get(key) is not None and config[key] not in accepted:
            raise _refuse(file, key, config[key], accepted)
    names = _NAMES[kind]
    _all_known(config, {*names.values(), *_ONLY[kind]}, file)
    table = {
        ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None
    }
    family = "gpt2" if kind == "gpt2" else "llama"
    table |= {"family": family, "name": file.parent.name if path.is_dir() else ""}
    if family == "llama":
        table = _DEFAULTS[kind] | table | _rope(config, file)
    else:
        table = {"max_seq_len": 1024} | table | _dropout(config, file)
    try:
        return decode(ModelSpec, table)
    except UsageError as error:
        theirs = names.get(error.key or "", error.key)
        text = "\n".join(f"{file}: {line}" for line in error.message.splitlines())
        raise UsageError(f"{text} (config: {theirs})", file=str(file), key=theirs) from None


def _all_known(config: Mapping[str, Any], read: set[str], file: Path) -> None:
    """Raises UsageError for keys that nothing reads and that are on."""
    known = read | _READ | _NEUTRAL
    strange = sorted(
        k for k, v in config.items() if k not in known and v not in (None, False, 0, "", [], {})
    )
    if strange:
        text = "\n".join(
            f"{file}: {k}: {config[k]!r} is not known and may change the model; remove the key if it does not"
            for k in strange
        )
        raise UsageError(text, file=str(file), key=strange[0])


def _refuse(file: Path, key: str, value: Any, accepted: tuple[Any, ...]) -> UsageError:
    known = ", ".join(map(repr, accepted)) or "null"
    text = f"{file}: {key}: {value!r} is not supported; accepted: {known}"
    return UsageError(text, file=str(file), key=key)


def _rope(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UsageError(
            f"{file}: rope_scaling: an object is wanted", file=str(file), key="rope_scaling"
        )
    table: dict[str, Any] = {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        table["rope_theta"] = theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise _refuse(file, "rope_scaling.rope_type", kind, ("default", "llama3"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse(
            file, "rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], (1.0,)
        )
    if kind == "llama3":
        names = {
            "factor": "factor",
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_seq_len": "original_max_position_embeddings",
        }
        table["rope_scaling"] = {
            ours: rope[theirs] for ours, theirs in names.items() if theirs in rope
        }
    return table


def _dropout(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """One rate for embeddings, residuals and attention probabilities."""
    residual = config.get("resid_pdrop", 0.1)
    for key in ("embd_pdrop", "attn_pdrop"):
        if config.get(key, 0.1) != residual:
            text = (
                f"{file}: {key}: {config.get(key, 0.1)!r} differs from resid_pdrop ({residual!r}), and "
                "dropout is one rate here: make them equal (0 for evaluation)"
            )
            raise UsageError(text, file=str(file), key=key)
    return {"dropout": residual}

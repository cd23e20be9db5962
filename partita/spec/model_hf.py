"""A Hugging Face config.json as a ModelSpec. Reads what transformers 4 and 5 write.

What ModelSpec cannot say is refused, never dropped: biases in a Llama, other activations, other RoPE
scalings, dropouts that differ, quantized weights. So is a key that is not known and is on: it may
change the model. Keys of `_NEUTRAL` do not: they are about generation, storage and training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partita.base.config import decode, load_json
from partita.base.errors import UsageError
from partita.spec.hf_kinds import BERT_DROPS, GELUS, GEMMAS, KINDS, SCALINGS, Kind
from partita.spec.hf_layers import of_type, read_layers, refuse
from partita.spec.model import ModelSpec

_READ = {"model_type", "rope_theta", "rope_scaling", "rope_parameters"}
_READ |= {"resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_types", "mlp_only_layers"}
_READ |= {"num_local_experts", "shared_expert_intermediate_size"}
_OF_LAYERS = {
    "use_sliding_window",
    "max_window_layers",
    "sliding_window_pattern",
    "_sliding_window_pattern",
}
_OF_LAYERS |= {"no_rope_layers", "no_rope_layer_interval"}
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
tf_legacy_loss _num_labels is_llama_config max_sequence_length _model_name_or_path _commit_hash
transformers.js_config unsloth_version unsloth_fixed trust_remote_code _flash_attn_2_enabled
"""
_NEUTRAL = frozenset(_NEUTRAL_WORDS.split())
# of RoPE's table; finetuned says how its factor was chosen
_ROPE = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "attention_factor", "truncate"}
_ROPE |= {"finetuned"}
_ADVICE = {
    "quantization_config": "says that its weights are quantized: save them dequantized first"
}
_LATENT = {"kv": "kv_lora_rank", "q": "q_lora_rank", "rope": "qk_rope_head_dim", "v": "v_head_dim"}
_FIELDS = {theirs: ours for kind in KINDS.values() for ours, theirs in kind.names.items()}


def read_hf_config(path: str | Path) -> ModelSpec:
    """The model of a Hugging Face folder or config.json. Raises UsageError with file and key."""
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    return model_of(load_json(file), file, file.parent.name if path.is_dir() else "")


def model_of(config: Mapping[str, Any], file: Path, name: str = "") -> ModelSpec:
    """The model that a config.json describes; errors name `file`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in KINDS:
        lead = "missing" if model_type is None else f"{model_type!r} is not supported"
        text = f"{file}: model_type: {lead}; {', '.join(KINDS)} are supported"
        raise UsageError(text, file=str(file), key="model_type")
    kind = KINDS[model_type]
    other = {kind.aliases[k]: v for k, v in config.items() if k in kind.aliases}
    config = {k: v for k, v in config.items() if k not in kind.aliases} | other
    for key, accepted in kind.only.items():
        if config.get(key) is not None and config[key] not in accepted:
            raise refuse(file, key, config[key], accepted)
    _all_known(config, kind, file)
    table: dict[str, Any] = {
        ours: config[theirs]
        for ours, theirs in kind.names.items()
        if config.get(theirs) is not None
    }
    silent = {n: v for n, v in kind.defaults.items() if kind.names.get(n) not in config}
    table = silent | table | dict(kind.fixed) | {"family": kind.family, "name": name}
    table |= _dropout(config, file) if kind.family == "gpt2" else _rope(config, file)
    table |= _gemma(config, table) if model_type in GEMMAS else {}
    table |= {"qkv_bias": table["wo_bias"]} if model_type == "llama" and "wo_bias" in table else {}
    table |= _neox(config, file) if kind.family == "gpt_neox" else {}
    table |= _bert(config, file) if kind.family == "bert" else {}
    table |= read_layers(config, table, kind, file) | _dense(config, file)
    if not table.get("sliding_window"):
        table.pop("local_rope_theta", None)
    table |= _experts(config, table, file) | _latent(config, file)
    try:
        return decode(ModelSpec, table)
    except UsageError as error:
        raise _in_its_words(error, kind, table, file) from None


def _in_its_words(
    error: UsageError, kind: Kind, table: Mapping[str, Any], file: Path
) -> UsageError:
    """What is wrong with the fields, told of the keys that they are read from."""
    scaling = SCALINGS.get(table.get("rope_scaling", {}).get("kind"), {})
    groups = {"router_groups": "n_group", "router_top_groups": "topk_group"}
    names = {
        **(groups if "latent" in table else {}),
        **kind.names,
        **{f"latent.{ours}": theirs for ours, theirs in _LATENT.items()},
        **{f"rope_scaling.{ours}": f"rope_scaling.{theirs}" for ours, theirs in scaling.items()},
    }
    keys = error.keys or (error.key or "",)
    lines = []
    for ours, line in zip(keys, error.message.splitlines(), strict=False):
        theirs, text = names.get(ours, ours), line.removeprefix(f"{ours}: ")
        for own, key in kind.names.items():
            text = re.sub(rf"(?<![\w.]){own} (?=-?\d)", f"{key} ", text)
        lines.append(f"{file}: {theirs}: {text}")
    found = UsageError("\n".join(lines), file=str(file), key=names.get(keys[0], keys[0]))
    found.keys = tuple(names.get(key, key) for key in keys)
    return found


def _dense(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Layers without experts come first."""
    dense = of_type(config, "mlp_only_layers", list, file) or []
    if dense != list(range(len(dense))):
        raise refuse(file, "mlp_only_layers", dense, ([], [0], [0, 1], "..."))
    return {"dense_layers": len(dense)} if dense else {}


def _latent(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What keys and values are made of, and DeepSeek-V2's groups, which its other method has not."""
    if not str(config["model_type"]).startswith("deepseek"):
        return {}
    published = {"kv": 512, "rope": 64, "v": 128} | ({} if "q_lora_rank" in config else {"q": 1536})
    made = published | {n: config[k] for n, k in _LATENT.items() if config.get(k) is not None}
    found: dict[str, Any] = {"latent": made}
    if isinstance(made["rope"], int):
        plain = of_type(config, "qk_nope_head_dim", int, file)
        found["head_dim"] = (128 if plain is None else plain) + made["rope"]
    if config.get("topk_method") == "group_limited_greedy":
        found |= {
            "router_groups": config.get("n_group"),
            "router_top_groups": config.get("topk_group"),
        }
    return found


def _gemma(config: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the token table times the root of their length; a scalar that is head_dim says nothing."""
    found: dict[str, Any] = {}
    if isinstance(table.get("hidden"), int):
        found["embedding_scale"] = max(table["hidden"], 1) ** 0.5
    if table.get("query_scalar") == table.get("head_dim"):
        found["query_scalar"] = 0
    return found


def _of_kinds(config: Mapping[str, Any], file: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """A config.json whose RoPE is that of layers which see all, and the base of the others (Gemma 3):
    transformers 4 writes rope_local_base_freq, transformers 5 a table for each kind of layer."""
    if config["model_type"] != "gemma3_text":
        return config, {}
    rope = config.get("rope_parameters") or {}
    local: Any = {"rope_theta": config.get("rope_local_base_freq") or 10_000.0}
    if isinstance(rope, Mapping) and {"sliding_attention", "full_attention"} & rope.keys():
        config = {**config, "rope_parameters": rope.get("full_attention")}
        local |= rope.get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise refuse(file, "rope_parameters.sliding_attention", local["rope_type"], ("default",))
    return config, {"local_rope_theta": local["rope_theta"]}


def _neox(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Which GELU, and how much of a head is rotated: transformers 4 writes rotary_pct and rotary_emb_base."""
    rope = config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config.get("rotary_emb_base") or 10_000.0)
    turned = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return {"gelu": _gelu(config, file), "rope_theta": theta, "rotary_pct": turned}


def _gelu(config: Mapping[str, Any], file: Path) -> str:
    """Which of the two."""
    act = config.get("hidden_act", "gelu")
    for kind, theirs in GELUS.items():
        if act in theirs:
            return kind
    known = tuple(a for theirs in GELUS.values() for a in theirs)
    raise refuse(file, "hidden_act", act, known)


def _bert(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Which GELU; dropout is one rate."""
    rates = [config.get(key, 0.1) for key in BERT_DROPS]
    if rates[0] != rates[1]:
        text = (
            f"{file}: {BERT_DROPS[1]}: {rates[1]!r} differs from {BERT_DROPS[0]} ({rates[0]!r}), and dropout "
            "is one rate here: make them equal (0 for evaluation)"
        )
        raise UsageError(text, file=str(file), key=BERT_DROPS[1])
    return {"gelu": _gelu(config, file), "dropout": rates[0]}


def _experts(config: Mapping[str, Any], table: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """What no field names alone: how many experts, by whichever name, and shared ones by their width."""
    found: dict[str, Any] = {}
    stated = any(config.get(k) is not None for k in ("num_experts", "n_routed_experts"))
    if config.get("num_local_experts") is not None and not stated:
        found["experts"] = config["num_local_experts"]
    width = of_type(config, "shared_expert_intermediate_size", int, file)
    each = table.get("expert_ffn_hidden")
    if width and isinstance(each, int) and each > 0:
        if width % each:
            raise refuse(file, "shared_expert_intermediate_size", width, (f"a multiple of {each}",))
        found["shared_experts"] = width // each
    return found


def _all_known(config: Mapping[str, Any], kind: Kind, file: Path) -> None:
    """Raises UsageError for keys that nothing reads and that are on."""
    known = {*kind.names.values(), *kind.only, *kind.neutral} | _READ | _NEUTRAL
    known |= _OF_LAYERS if kind.windows else set()
    strange = sorted(
        k for k, v in config.items() if k not in known and v not in (None, False, 0, "", [], {})
    )
    if strange:
        lines = [f"{file}: {k}: {config[k]!r} {_strange(config, k, kind)}" for k in strange]
        error = UsageError("\n".join(lines), file=str(file), key=strange[0])
        error.keys = tuple(strange)
        raise error


def _strange(config: Mapping[str, Any], key: str, kind: Kind) -> str:
    """Why a key that nothing reads cannot stand."""
    theirs = kind.names.get(_FIELDS.get(key, ""))
    if theirs:
        return f"is not read: model_type {config['model_type']} has it as {theirs}"
    plain = "is not known and may change the model; remove the key if it does not"
    return _ADVICE.get(key, plain)


def _rope(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    config, local = _of_kinds(config, file)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UsageError(
            f"{file}: rope_scaling: an object is wanted", file=str(file), key="rope_scaling"
        )
    table: dict[str, Any] = dict(local)
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is not None:
        table["rope_theta"] = theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or (kind != "default" and kind not in SCALINGS):
        raise refuse(file, "rope_scaling.rope_type", kind, ("default", *SCALINGS))
    if config["model_type"] == "phi3":
        given = config.get("partial_rotary_factor") or 1.0
        table["rotary_pct"] = rope.get("partial_rotary_factor", given)
    elif config["model_type"] != "gpt_neox" and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(
            file, "rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], (1.0,)
        )
    for key, only in (("attention_factor", None), ("truncate", True)):
        if rope.get(key) not in (None, only):
            raise refuse(file, f"rope_scaling.{key}", rope[key], (only,))
    names = SCALINGS.get(kind, {})
    for key in rope.keys() - _ROPE - set(names.values()):
        if rope[key] not in (None, False):
            raise refuse(file, f"rope_scaling.{key}", rope[key], ())
    if kind != "default":
        scaling = {ours: rope.get(theirs) for ours, theirs in names.items()}
        if scaling.get("original_max_seq_len", 0) is None:
            scaling["original_max_seq_len"] = config.get("max_position_embeddings")
        stated = {ours: value for ours, value in scaling.items() if value is not None}
        table["rope_scaling"] = {"kind": kind} | stated
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

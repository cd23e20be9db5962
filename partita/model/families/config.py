"""config.json of a model: what transformers 4 and 5 both read, and read_hf_config reads back as the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from partita.base.config import encode
from partita.base.errors import UsageError
from partita.spec.hf_kinds import BERT_DROPS, GELUS, GEMMAS, KINDS, SCALINGS, kind_of
from partita.spec.hf_layers import written_layers
from partita.spec.model import ModelSpec
from partita.spec.model_hf import model_of

# The defaults of transformers name ids of Meta's and OpenAI's tokenizers, which this model may use as
# words, or not have at all.
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# what training has and a model has not
_OF_TRAINING = ("name", "balance_loss", "balance_over", "z_loss", "router_bias_rate")


def hf_config(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Raises UsageError, naming the field, for a model that no model_type of transformers describes."""
    name = kind_of(spec)
    kind = KINDS[name]
    config: dict[str, Any] = {key: accepted[0] for key, accepted in kind.only.items() if accepted}
    config |= {theirs: getattr(spec, ours) for ours, theirs in kind.names.items()}
    config |= NO_SPECIAL_TOKENS | {
        "architectures": [kind.architecture],
        "model_type": name,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if spec.family == "gpt2":
        config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), spec.dropout)
    elif spec.family == "gpt_neox":
        config |= {"rotary_pct": spec.rotary_pct, "rotary_emb_base": spec.rope_theta}
        config["hidden_act"] = GELUS[spec.gelu][0]
    elif spec.family == "bert":
        config |= dict.fromkeys(BERT_DROPS, spec.dropout)
        config["hidden_act"] = GELUS[spec.gelu][0]
    elif spec.rotates:
        config |= {"rope_theta": spec.rope_theta, "rope_scaling": _rope(spec)}
    config |= written_layers(spec, kind)
    if name in GEMMAS:
        caps = {
            "attn_logit_softcapping": spec.attention_softcap,
            "final_logit_softcapping": spec.logit_softcap,
        }
        config |= {key: cap or None for key, cap in caps.items()}
        config["query_pre_attn_scalar"] = spec.query_scalar or spec.head_dim
    if name == "gemma3_text":
        config["rope_local_base_freq"] = spec.local_rope_theta or spec.rope_theta
    if name == "phi3":
        config["partial_rotary_factor"] = spec.rotary_pct
    if name == "mixtral":
        config["intermediate_size"] = spec.expert_ffn_hidden
    if "decoder_sparse_step" in config:
        config["mlp_only_layers"] = list(range(spec.dense_layers))
    if spec.shared_gate:
        config["shared_expert_intermediate_size"] = spec.shared_experts * spec.expert_ffn_hidden
    config |= _latent(spec)
    _check(spec, config, name)
    return config


def _rope(spec: ModelSpec) -> dict[str, Any] | None:
    scaling = spec.rope_scaling
    if scaling is None:
        return None
    names = SCALINGS[scaling.kind].items()
    return {"rope_type": scaling.kind} | {theirs: getattr(scaling, ours) for ours, theirs in names}


def _latent(spec: ModelSpec) -> dict[str, Any]:
    """Parts of a head, and DeepSeek-V2's groups."""
    made = spec.latent
    if made is None:
        return {}
    found: dict[str, Any] = {
        "kv_lora_rank": made.kv, "q_lora_rank": made.q or None, "qk_rope_head_dim": made.rope,
        "qk_nope_head_dim": spec.head_dim - made.rope, "v_head_dim": made.v,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip
    if spec.router == "softmax":
        method = "greedy" if spec.router_groups == 1 else "group_limited_greedy"
        groups = {"n_group": spec.router_groups, "topk_group": spec.router_top_groups}
        found |= {"topk_method": method, **groups}
    return found


def _check(spec: ModelSpec, config: dict[str, Any], kind: str) -> None:
    """The config read back is the model."""
    there = encode(model_of(config, Path("config.json")))
    unused = ("ffn_hidden",) if spec.expert_layers == spec.layers else ()
    for name, value in encode(spec).items():
        if name not in (*_OF_TRAINING, *unused) and there[name] != value:
            text = f"{name} = {value} has no place in a {kind}, which has {there[name]}"
            raise UsageError(f"{text}: this model has no Hugging Face layout yet", key=name)

"""What each model_type of transformers calls what ModelSpec has, and what of it ModelSpec can say.

A kind is read by spec/model_hf.py and written by model/families/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from partita.spec.model import ModelSpec


@dataclass(frozen=True)
class Kind:
    """One model_type.

    `names`: field -> key of its config.json; `only`: key -> the values under which ModelSpec describes
    the same model, the first of which is written; `defaults`: field -> what transformers fills in where a
    config.json is silent; `fixed`: field -> what every model of the kind has; `neutral`: keys that change
    nothing; `aliases`: other keys for those of `names`; `windows`: which layers have sliding_window where
    layer_types is silent (hf_layers.py): all, the late ones, all but every so many-th; or which have no RoPE.
    """

    architecture: str
    family: str
    names: Mapping[str, str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    windows: Literal["", "all", "late", "no_rope", "2", "6"] = ""


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
_GPT_NEOX = {n: k for n, k in _LLAMA.items() if n not in ("kv_heads", "head_dim")} | {
    "norm_eps": "layer_norm_eps",
    "parallel_residual": "use_parallel_residual",
}
_BLOOM = {
    "layers": "n_layer",
    "hidden": "hidden_size",
    "heads": "n_head",
    "vocab": "vocab_size",
    "max_seq_len": "seq_length",
    "tied": "tie_word_embeddings",
    "norm_eps": "layer_norm_epsilon",
}
GELUS = {"erf": ("gelu",), "tanh": ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")}  # of hidden_act
_NO_DROPOUT: dict[str, tuple[Any, ...]] = {"attention_dropout": (0.0,), "hidden_dropout": (0.0,)}
_BERT = {n: k for n, k in _GPT_NEOX.items() if n != "parallel_residual"} | {
    "token_types": "type_vocab_size"
}
BERT_DROPS = ("hidden_dropout_prob", "attention_probs_dropout_prob")  # one rate
_BERT_WORDS = """
hidden_act classifier_dropout directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
pooler_size_per_head pooler_type
"""  # read as one, or of what stands behind another head
# how kernels of its training and its tokenizer were set
_BLOOM_WORDS = """
slow_but_exact masked_softmax_fusion attention_softmax_in_fp32 skip_bias_add skip_bias_add_qkv offset_alibi
bias_dropout_fusion
"""
_MIXTRAL = {
    "experts": "num_local_experts",
    "top_k": "num_experts_per_tok",
    "sliding_window": "sliding_window",
}
_QWEN_MOE = {
    "experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn_hidden": "moe_intermediate_size",
    "normalise_top_k": "norm_topk_prob",
    "expert_every": "decoder_sparse_step",
}
_DEEPSEEK = {
    "experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_ffn_hidden": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "dense_layers": "first_k_dense_replace",
    "router_scale": "routed_scaling_factor",
}
_GROUPS = {"router_groups": "n_group", "router_top_groups": "topk_group"}
_SILU: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0.0,),
    "partial_rotary_factor": (1.0,),
}
_NO_LOGITS: dict[str, tuple[Any, ...]] = {"output_router_logits": (False,)}
_NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,)}
_LATENT: dict[str, tuple[Any, ...]] = {
    **_NO_BIAS, "moe_layer_freq": (1,), "output_router_logits": (False,),
}  # fmt: skip
# read as one, or of another way to train; num_nextn_predict_layers are layers that generation may add
_LATENT_WORDS = """
kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim qk_head_dim head_dim ep_size
seq_aux aux_loss_alpha num_nextn_predict_layers num_mtp_layers n_group topk_group
"""
_LATENT_KEYS = frozenset(_LATENT_WORDS.split())
_NO_HEAD_DIM = {k: v for k, v in _LLAMA.items() if k != "head_dim"}
_WINDOW = {"sliding_window": "sliding_window"}
GEMMAS = ("gemma2", "gemma3_text")  # whose norms multiply by 1 + weight
_GEMMA = {
    **_LLAMA, **_WINDOW, "query_scalar": "query_pre_attn_scalar",
    "attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping",
}  # fmt: skip
_GEMMA_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh",),
    "attention_bias": (False,), "attention_dropout": (0.0,), "use_bidirectional_attention": (False,),
}  # fmt: skip
_GEMMA_SILENT = {
    "norm_eps": 1e-6, "tied": True, "heads": 8, "kv_heads": 4, "head_dim": 256, "query_scalar": 256,
    "sliding_window": 4096,
}  # fmt: skip
_GEMMA_IS = {"norm_placement": "both", "gate": "gelu"}
_CACHE = frozenset({"cache_implementation"})
_QWEN = {"max_seq_len": 32768, "norm_eps": 1e-6, "tied": False, "sliding_window": 4096}


def _experts(count: int, each: int, width: int = 0) -> dict[str, int]:
    """Defaults: experts, those of a token, and their width where they have one of their own."""
    return {"experts": count, "top_k": each} | ({"expert_ffn_hidden": width} if width else {})


KINDS: dict[str, Kind] = {
    "llama": Kind(
        "LlamaForCausalLM", "llama", _LLAMA | {"mlp_bias": "mlp_bias", "wo_bias": "attention_bias"},
        _SILU | {"sliding_window": ()},
        {"max_seq_len": 2048, "norm_eps": 1e-6, "tied": False},
    ),
    "mistral": Kind(
        "MistralForCausalLM", "llama", _LLAMA | _WINDOW, _SILU,
        {"max_seq_len": 131072, "norm_eps": 1e-6, "tied": False, "kv_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "mixtral": Kind(
        "MixtralForCausalLM", "llama", _LLAMA | _MIXTRAL,
        _SILU | {"router_jitter_noise": (0.0,), "output_router_logits": (False,)},
        {"max_seq_len": 131072, "norm_eps": 1e-5, "tied": False, "rope_theta": 1e6} | _experts(8, 2),
        windows="all",
    ),
    "qwen2": Kind(
        "Qwen2ForCausalLM", "llama", _LLAMA | _WINDOW, _SILU, _QWEN, {"qkv_bias": True}, windows="late",
    ),
    "qwen3": Kind(
        "Qwen3ForCausalLM", "llama", _LLAMA | _WINDOW, _SILU | _NO_BIAS, _QWEN | {"head_dim": 128},
        {"qk_norm": True}, windows="late",
    ),
    "qwen2_moe": Kind(
        "Qwen2MoeForCausalLM", "llama", _LLAMA | _QWEN_MOE | _WINDOW | {"qkv_bias": "qkv_bias"},
        _SILU | _NO_LOGITS,
        _QWEN | {"normalise_top_k": False, "qkv_bias": True} | _experts(60, 4, 1408),
        {"shared_gate": True}, windows="late",
    ),
    "qwen3_moe": Kind(
        "Qwen3MoeForCausalLM", "llama", _LLAMA | _QWEN_MOE | _WINDOW,
        _SILU | _NO_LOGITS | _NO_BIAS,
        _QWEN | {"normalise_top_k": False} | _experts(128, 8, 768),
        {"qk_norm": True}, windows="late",
    ),
    "smollm3": Kind(
        "SmolLM3ForCausalLM", "llama", _LLAMA,
        _SILU | _NO_BIAS | {"mlp_bias": (False,), "use_sliding_window": (False,)},
        {"max_seq_len": 32768, "norm_eps": 1e-6, "tied": True, "kv_heads": 4, "rope_theta": 2e6},
        neutral=frozenset({"sliding_window", "max_window_layers"}), windows="no_rope",
    ),
    "gemma2": Kind(
        "Gemma2ForCausalLM", "llama", _GEMMA, _GEMMA_ONLY,
        _GEMMA_SILENT | {"max_seq_len": 8192, "attention_softcap": 50.0, "logit_softcap": 30.0},
        _GEMMA_IS, _CACHE, windows="2",
    ),
    "gemma3_text": Kind(
        "Gemma3ForCausalLM", "llama", _GEMMA, _GEMMA_ONLY,
        _GEMMA_SILENT | {"max_seq_len": 131072, "rope_theta": 1e6}, _GEMMA_IS | {"qk_norm": True},
        _CACHE | {"rope_local_base_freq"},
        windows="6",
    ),
    "phi3": Kind(
        "Phi3ForCausalLM", "llama", _LLAMA | _WINDOW,
        {k: v for k, v in _SILU.items() if k != "partial_rotary_factor"} | _NO_BIAS
        | {"resid_pdrop": (0.0,), "embd_pdrop": (0.0,)},
        {"max_seq_len": 4096, "tied": False}, {"layout": "phi3"},
        frozenset({"partial_rotary_factor", "original_max_position_embeddings"}), windows="all",
    ),
    "deepseek_v2": Kind(
        "DeepseekV2ForCausalLM", "llama", _NO_HEAD_DIM | _DEEPSEEK,
        _SILU | _LATENT | {
            "mlp_bias": (False,), "scoring_func": ("softmax",), "norm_topk_prob": (False,),
            "topk_method": ("greedy", "group_limited_greedy"),
        },
        {"max_seq_len": 2048, "norm_eps": 1e-6, "tied": False, "experts": 64, "shared_experts": 2},
        {"normalise_top_k": False}, _LATENT_KEYS,
    ),
    "deepseek_v3": Kind(
        "DeepseekV3ForCausalLM", "llama",
        _NO_HEAD_DIM | _DEEPSEEK | _GROUPS | {"normalise_top_k": "norm_topk_prob"},
        _SILU | _LATENT | {
            "rope_interleave": (True,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",),
        },
        {
            "max_seq_len": 4096, "norm_eps": 1e-6, "tied": False, "experts": 256, "top_k": 8,
            "shared_experts": 1, "dense_layers": 3, "router_scale": 2.5, "router_groups": 8,
            "router_top_groups": 4,
        },
        {"router": "sigmoid", "router_bias": True}, _LATENT_KEYS,
    ),
    "gpt2": Kind(
        "GPT2LMHeadModel", "gpt2", _GPT2,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
            "reorder_and_upcast_attn": (False,),
        },
        {"max_seq_len": 1024},
    ),
    "gpt_neox": Kind(
        "GPTNeoXForCausalLM", "gpt_neox", _GPT_NEOX, _NO_DROPOUT | {"attention_bias": (True,)},
        {"max_seq_len": 2048, "tied": False, "parallel_residual": True},
        neutral=frozenset({"hidden_act", "rotary_pct", "rotary_emb_base", "classifier_dropout"}),
    ),
    "bloom": Kind(
        "BloomForCausalLM", "bloom", _BLOOM,
        _NO_DROPOUT | {"apply_residual_connection_post_layernorm": (False,), "n_inner": ()},
        {"max_seq_len": 2048}, neutral=frozenset(_BLOOM_WORDS.split()),
        aliases={"n_embed": "hidden_size", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    ),
    "bert": Kind(
        "BertForMaskedLM", "bert", _BERT,
        {"position_embedding_type": ("absolute",), "add_cross_attention": (False,), "is_decoder": (False,)},
        {"max_seq_len": 512, "norm_eps": 1e-12, "tied": True, "token_types": 2}, {"causal": False},
        frozenset({*_BERT_WORDS.split(), *BERT_DROPS}),
    ),
}  # fmt: skip


_LENGTH = {"factor": "factor", "original_max_seq_len": "original_max_position_embeddings"}
SCALINGS: dict[str, dict[str, str]] = {  # field of RopeScaling -> key
    "linear": {"factor": "factor"},
    "llama3": _LENGTH | {n: n for n in ("low_freq_factor", "high_freq_factor")},
    "yarn": _LENGTH | {n: n for n in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")},
}


def kind_of(spec: ModelSpec) -> str:
    """The model_type that has what this model has, if any has."""
    if spec.family != "llama":
        return spec.family
    if spec.latent is not None:
        return "deepseek_v3" if spec.router == "sigmoid" else "deepseek_v2"
    if spec.experts:
        qwen = "qwen3_moe" if spec.qk_norm else "qwen2_moe"
        return qwen if spec.qk_norm or spec.shared_gate else "mixtral"
    if spec.norm_placement == "both":
        return "gemma3_text" if spec.qk_norm else "gemma2"
    if spec.layout:
        return spec.layout
    if "n" in spec.attention_pattern:
        return "smollm3"
    if spec.wo_bias:
        return "llama"
    if spec.qk_norm or spec.qkv_bias:
        return "qwen3" if spec.qk_norm else "qwen2"
    return "mistral" if spec.sliding_window else "llama"

"""Tiny models of transformers to hold ours against, and its float32 islands made float64."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.loss import loss_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom import modeling_bloom as bloom
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe
from transformers.models.smollm3 import modeling_smollm3 as smollm3

SEQ = 24
BALANCE = "e_score_correction_bias"  # a buffer there; its gradient here are counts
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip

# owner, name in it, (text in its source, how often, what stands there in float64) ...
Island = tuple[Any, str, tuple[tuple[str, int, str], ...]]
WIDE = (("torch.float32", 1, "torch.float64"),)
FLOAT = (("dtype=torch.float)", 1, "dtype=torch.float64)"),)


def rotary_islands(module: Any, prefix: str) -> list[Island]:
    """Of a model whose positions are rotated."""
    rope = getattr(module, f"{prefix}RotaryEmbedding")
    return [
        (rope, "forward", ((".float()", 1, ".double()"), *FLOAT)),
        (rope, "compute_default_rope_parameters", FLOAT),
        (module, "eager_attention_forward", WIDE),
    ]


def llama_islands(module: Any, prefix: str) -> list[Island]:
    """Of a model written after Llama's."""
    norm = getattr(module, f"{prefix}RMSNorm")
    return [(norm, "forward", WIDE), *rotary_islands(module, prefix)]


def gemma_islands(module: Any, prefix: str) -> list[Island]:
    """Of a model written after Gemma's, whose norms multiply in float32."""
    norm = getattr(module, f"{prefix}RMSNorm")
    return [(norm, "forward", ((".float()", 2, ".double()"),)), *rotary_islands(module, prefix)]


GELU_BACK = (  # digits of sqrt(2 / pi), and 3 * 0.044715 of them
    ("0.79788456 *", 1, "0.7978845608028654 *"), ("(0.79788456 +", 1, "(0.7978845608028654 +"),
    ("0.1070322243 *", 1, "(0.134145 * 0.7978845608028654) *"),
)  # fmt: skip
QWEN_ROUTER = (("dtype=torch.float,", 1, "dtype=torch.float64,"),)
ISLANDS: list[Island] = [
    *llama_islands(llama, "Llama"),
    *llama_islands(mistral, "Mistral"),
    *llama_islands(mixtral, "Mixtral"),
    *llama_islands(qwen2, "Qwen2"),
    *llama_islands(qwen3, "Qwen3"),
    *llama_islands(qwen2_moe, "Qwen2Moe"),
    *llama_islands(qwen3_moe, "Qwen3Moe"),
    *llama_islands(smollm3, "SmolLM3"),
    *llama_islands(phi3, "Phi3"),
    *gemma_islands(gemma2, "Gemma2"),
    *gemma_islands(gemma3, "Gemma3"),
    (qwen2_moe.Qwen2MoeTopKRouter, "forward", QWEN_ROUTER),
    (qwen3_moe.Qwen3MoeTopKRouter, "forward", QWEN_ROUTER),
    (mixtral.MixtralTopKRouter, "forward", ((".float()", 1, ".double()"),)),
    *llama_islands(deepseek_v3, "DeepseekV3"),
    (deepseek_v3.DeepseekV3TopkRouter, "forward", (("torch.float32", 2, "torch.float64"),)),
    (deepseek_v2.DeepseekV2RMSNorm, "forward", WIDE),
    (deepseek_v2.DeepseekV2RotaryEmbedding, "forward", ((".float()", 1, ".double()"), *FLOAT)),
    (deepseek_v2.DeepseekV2RotaryEmbedding, "compute_default_rope_parameters", FLOAT),
    (deepseek_v2, "apply_rotary_emb", ((".float()", 2, ".double()"),)),
    (deepseek_v2, "eager_attention_forward", WIDE),
    (deepseek_v2.DeepseekV2TopkRouter, "forward", (("torch.float32", 3, "torch.float64"),)),
    *rotary_islands(gpt_neox, "GPTNeoX"),
    (bloom, "_get_alibi_slopes", (("torch.float32", 2, "torch.float64"),)),
    (bloom.BloomAttention, "forward", WIDE),
    (bloom, "bloom_gelu_forward", (("0.79788456", 1, "0.7978845608028654"),)),
    (bloom, "bloom_gelu_back", GELU_BACK),
    (ROPE_INIT_FUNCTIONS, "llama3", FLOAT),
    (ROPE_INIT_FUNCTIONS, "linear", FLOAT),
    (
        ROPE_INIT_FUNCTIONS,
        "yarn",
        (("dtype=torch.float)", 2, "dtype=torch.float64)"), ("torch.float32", 1, "torch.float64")),
    ),
    (loss_utils.LOSS_MAPPING, "ForCausalLM", (("logits.float()", 1, "logits.double()"),)),
]


def widen_islands(monkeypatch) -> None:
    """Rewrites each listed function with its casts to float64; fails where a cast is no longer there."""
    for owner, name, casts in ISLANDS:
        inside = isinstance(owner, dict)
        function = inspect.unwrap(owner[name] if inside else getattr(owner, name))
        source = textwrap.dedent(inspect.getsource(function))
        for text, count, wide in casts:
            found = source.count(text)
            assert found == count, f"{name} of transformers has {found} x {text!r}, not {count}"
            source = source.replace(text, wide)
        scope: dict[str, Any] = {}
        exec(compile(source, f"<{name} in float64>", "exec"), function.__globals__, scope)
        made = scope[function.__name__]
        (monkeypatch.setitem if inside else monkeypatch.setattr)(owner, name, made)


def llama_config(config=LlamaConfig, **changes):
    """Grouped queries; head_dim is not hidden / heads."""
    return config(
        **{
            "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
            "max_position_embeddings": SEQ, "tie_word_embeddings": False, "bos_token_id": None,
            "eos_token_id": None, "attn_implementation": "eager",
        }
        | changes
    )  # fmt: skip


def gpt2_config(**changes) -> GPT2Config:
    """No dropout, so that train and eval agree."""
    return GPT2Config(
        **{
            "vocab_size": 61, "n_embd": 32, "n_inner": 44, "n_layer": 3, "n_head": 4,
            "n_positions": SEQ, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
            "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager",
        }
        | changes
    )  # fmt: skip


def neox_config(**changes) -> GPTNeoXConfig:
    """Four of a head's eight numbers are rotated."""
    return GPTNeoXConfig(
        **{
            "vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3,
            "num_attention_heads": 4, "rotary_pct": 0.5, "max_position_embeddings": SEQ,
            "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager",
        }
        | changes
    )  # fmt: skip


def bloom_config() -> BloomConfig:
    """Six heads: slopes of four, and two between."""
    return BloomConfig(
        vocab_size=61, hidden_size=30, n_layer=3, n_head=6, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip


def moe_config(config=MixtralConfig, **changes):
    """Two of five experts."""
    own = {"num_experts": 5, "moe_intermediate_size": 12}
    own = {"num_local_experts": 5} if config is MixtralConfig else own
    own["num_experts_per_tok"] = 2
    return llama_config(config, experts_implementation="eager", **own | changes)


LONG = {  # as Qwen's model cards say
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "beta_fast": 2.0, "mscale": 0.7,
    "mscale_all_dim": 0.5, "original_max_position_embeddings": 16,
}  # fmt: skip


def deepseek_config(config, **changes):
    """Two of six experts, in groups; every width another."""
    own = {
        "num_key_value_heads": 4, "head_dim": 6, "kv_lora_rank": 10, "q_lora_rank": 14,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 5, "n_routed_experts": 6,
        "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "moe_intermediate_size": 12,
        "n_shared_experts": 2, "first_k_dense_replace": 1, "experts_implementation": "eager",
    }  # fmt: skip
    return llama_config(config, **own | changes)


GEMMA3 = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}


def gemma_config(config, **changes):
    """The root of its width is a whole number: transformers has it in float32."""
    own = {
        "hidden_size": 36, "sliding_window": 5, "query_pre_attn_scalar": 7, "tie_word_embeddings": True,
        "pad_token_id": None,
    }  # fmt: skip
    return llama_config(config, **own | changes)


CONFIGS = {
    "llama": llama_config,
    "llama-tied": lambda: llama_config(tie_word_embeddings=True),
    "llama-biased": lambda: llama_config(attention_bias=True, mlp_bias=True),
    "gemma2": lambda: gemma_config(
        Gemma2Config, attn_logit_softcapping=0.5, final_logit_softcapping=0.7
    ),
    "gemma3": lambda: gemma_config(
        Gemma3TextConfig, layer_types=GEMMA3, rope_parameters=GEMMA3_ROPE
    ),
    "phi3": lambda: llama_config(
        Phi3Config,
        head_dim=8,
        hidden_size=32,
        pad_token_id=None,
        sliding_window=7,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "llama3-rope": lambda: llama_config(rope_parameters=LLAMA3),
    "llama-linear": lambda: llama_config(
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": lambda: llama_config(MistralConfig, sliding_window=7),
    "mixtral": lambda: moe_config(intermediate_size=20, sliding_window=None),
    "qwen2": lambda: llama_config(
        Qwen2Config,
        head_dim=8,
        rope_parameters=LONG,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
    "smollm3": lambda: llama_config(
        SmolLM3Config, head_dim=8, no_rope_layer_interval=2, pad_token_id=None
    ),
    "qwen3": lambda: llama_config(Qwen3Config, tie_word_embeddings=True),
    "qwen2-moe": lambda: moe_config(
        Qwen2MoeConfig,
        head_dim=8,
        num_experts=3,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
    ),
    "qwen3-moe": lambda: moe_config(Qwen3MoeConfig, norm_topk_prob=True, mlp_only_layers=[0]),
    "deepseek-v2": lambda: deepseek_config(
        DeepseekV2Config, q_lora_rank=None, topk_method="group_limited_greedy"
    ),
    "deepseek-v3": lambda: deepseek_config(DeepseekV3Config, rope_parameters=YARN),
    "gpt2": gpt2_config,
    "gpt2-untied": lambda: gpt2_config(tie_word_embeddings=False),
    "gpt-neox": neox_config,
    "gpt-neox-serial": lambda: neox_config(
        use_parallel_residual=False, hidden_act="gelu_fast", rotary_pct=1.0, rotary_emb_base=1000
    ),
    "bloom": bloom_config,
}


def save_model(folder: Path, kind: str, dtype: torch.dtype = torch.float64, **options) -> Path:
    """A folder as transformers writes it, every weight random, norms and biases too: float32 numbers,
    since transformers loads routers as such."""
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(around + 0.1 * torch.randn(p.shape, generator=generator))
        for name, b in model.named_buffers():
            if name.endswith(BALANCE):
                b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    model.save_pretrained(folder, **options)
    return folder


def load_model(folder: Path, dtype: torch.dtype = torch.float64):
    """What transformers makes of a folder; fails if it met a name it did not know, or missed one."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.to(dtype).eval()


def by_file_name(parameters: dict[str, Any], mixtral: bool) -> dict[str, Any]:
    """Tensors by the names of the files: transformers stacks the experts that a file holds one by one."""
    found, own = {}, ("block_sparse_moe", "w1", "w3", "w2")
    own = own if mixtral else ("mlp", "gate_proj", "up_proj", "down_proj")
    if any(name.startswith("gpt_neox.") for name in parameters):
        return {n.replace("lm_head", "embed_out"): x for n, x in parameters.items()}
    for name, x in parameters.items():
        head, _, tail = name.partition(".mlp.")
        experts = f"{head}.{own[0]}.experts"
        if tail == "experts.gate_up_proj":
            for e, gate_up in enumerate(x):
                for w, part in zip(own[1:3], gate_up.chunk(2), strict=True):
                    found[f"{experts}.{e}.{w}.weight"] = part
        elif tail == "experts.down_proj":
            found |= {f"{experts}.{e}.{own[3]}.weight": w for e, w in enumerate(x)}
        elif tail == "gate.weight":
            found[f"{head}.{own[0]}.gate.weight"] = x
        else:
            found[name] = x
    return found

"""The sizes of a model, and what follows from them at once: what checks of a model and adapters look at.

model.py checks them, counts with them and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from partita.spec.image import ImageSpec
from partita.spec.model_parts import Latent, RopeScaling

BIASED = ("gpt2", "gpt_neox", "bloom", "bert")  # families with LayerNorm, GELU, biases everywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Sizes of a model as they were stated, unchecked: ModelSpec checks them and fills in what follows."""

    family: Literal["llama", "gpt2", "gpt_neox", "bloom", "bert", "alexnet"]
    layers: int
    hidden: int
    heads: int
    vocab: int
    max_seq_len: int
    kv_heads: int = 0  # 0: heads
    head_dim: int = 0  # 0: hidden / heads
    ffn_hidden: int = 0  # 0: 4 * hidden, not in llama
    tied: bool = None  # type: ignore[assignment]  # None: gpt2, bloom, bert
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # llama, gpt_neox
    rotary_pct: float = 1.0  # gpt_neox: RoPE turns the first so much of each head
    parallel_residual: bool = False  # gpt_neox: x + attention(norm(x)) + mlp(norm'(x))
    gelu: Literal["tanh", "erf"] = "tanh"  # gpt_neox, bert may have the exact one, erf
    rope_scaling: RopeScaling | None = None  # llama
    qkv_bias: bool = False  # llama: q, k, v have biases (gpt2 always has)
    wo_bias: bool = False  # llama: the output projection has a bias
    mlp_bias: bool = False  # llama: gate, up and down have biases
    gate: Literal["silu", "gelu"] = (
        "silu"  # llama: what the mlp's gate goes through; gelu is tanh's
    )
    norm_placement: Literal["pre", "post", "both"] = (
        "pre"  # llama: before a segment, behind it, both
    )
    query_scalar: int = 0  # llama: products of q and k are divided by its root; 0: head_dim
    attention_softcap: float = 0.0  # llama: scores s become c tanh(s / c); 0: as they are
    logit_softcap: float = 0.0  # llama: logits too
    embedding_scale: float = 1.0  # llama: what rows of the token table are multiplied by
    qk_norm: bool = False  # llama: each head of q and k is normalised before RoPE
    latent: Latent | None = None  # llama: what keys and values are made of
    causal: bool = None  # type: ignore[assignment]  # a token sees no later one; None: but of bert
    sliding_window: int = 0  # keys a query sees, itself among them (Mistral), to each side; 0: all
    attention_pattern: str = (
        ""  # a letter a layer, over and over: s window, f all keys, n all, no RoPE
    )
    local_rope_theta: float = 0.0  # RoPE's base, unscaled, in layers with the window; 0: rope_theta
    token_types: int = 0  # bert: rows of a table of which all tokens have the first; 0: 2
    dropout: float = 0.0  # on embeddings and on the output of each sub-block; gpt2, bert
    experts: int = 0  # 0: dense; llama
    top_k: int = 0  # experts a token is sent to
    expert_ffn_hidden: int = 0  # 0: ffn_hidden
    shared_experts: int = 0  # of expert_ffn_hidden each, seen by every token
    shared_gate: bool = False  # what they make is weighed by a sigmoid of the token (Qwen2-MoE)
    dense_layers: int = 0  # leading layers without experts
    expert_every: int = 1  # behind them every so many-th layer of the model has experts (Switch: 2)
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise_top_k: bool = True  # a token's gates add up to router_scale
    router_scale: float = 1.0
    router_groups: int = 1  # experts lie in so many groups, a token's in router_top_groups of them
    router_top_groups: int = 1
    router_bias: bool = False  # balances the choice without a loss (DeepSeek-V3)
    router_bias_rate: float = 1e-3  # what the bias moves in an update
    balance_loss: float = 0.0  # coefficient, of each sequence
    balance_over: Literal["sequence", "batch"] = (
        "sequence"  # batch: of each microbatch, on all ranks
    )
    z_loss: float = 0.0  # coefficient, of each token
    capacity_factor: float | None = None  # None: no token is dropped
    image: ImageSpec | None = None  # alexnet; hidden units and vocab classes, layers as it has them
    lora_rank: int = 0  # 0: no adapters
    lora_alpha: float = 0.0  # 0: lora_rank
    lora_targets: tuple[str, ...] = ()  # linears of a layer by name; empty: wq, wv
    lora_dropout: float = 0.0  # on what an adapter reads
    layout: Literal["", "phi3"] = ""  # of Hugging Face, where nothing else tells it: fused weights
    name: str = ""

    @property
    def has_biases(self) -> bool:
        """Whether linear layers and norms have biases."""
        return self.family in BIASED

    def bias_of(self, linear: str) -> bool:
        """Whether a linear of a layer, 'attention.wo' or one of its mlp, has a bias."""
        own = self.wo_bias if linear == "attention.wo" else self.mlp_bias
        return self.has_biases or own

    @property
    def norms_of_segments(self) -> int:
        """Norms on the residual stream of a layer."""
        return 4 if self.norm_placement == "both" else 2

    @property
    def has_positions(self) -> bool:
        """Whether positions are learned (max_seq_len rows)."""
        return self.family in ("gpt2", "bert")

    @property
    def rotates(self) -> bool:
        """Whether positions are rotated in."""
        return self.family in ("llama", "gpt_neox")

    @property
    def alibi(self) -> bool:
        """Whether positions are what attention's scores fall off by."""
        return self.family == "bloom"

    @property
    def embedding_norm(self) -> bool:
        """Whether a norm stands behind what the first block looks up."""
        return self.family in ("bloom", "bert")

    @property
    def post_norm(self) -> bool:
        """Whether norms stand behind the sums of layers, and the head transforms what it reads."""
        return self.family == "bert"

    @property
    def v_dim(self) -> int:
        """Numbers of a head's value."""
        return self.latent.v if self.latent else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Numbers of a head that RoPE turns."""
        return self.latent.rope if self.latent else int(self.head_dim * self.rotary_pct)

    def sees(self, layer: int) -> str:
        """What a layer (from 0) attends to: the letter of attention_pattern, or what all layers do."""
        pattern = self.attention_pattern or ("s" if self.sliding_window else "f")
        return pattern[layer % len(pattern)]

    def window_of(self, layer: int) -> int:
        """Keys that a query of a layer sees; 0: all before it."""
        return self.sliding_window if self.sees(layer) == "s" else 0

    @property
    def windows(self) -> tuple[int, ...]:
        """Those of all layers, each once."""
        return tuple(dict.fromkeys(map(self.window_of, range(self.layers))))

    def rotates_at(self, layer: int) -> bool:
        """Whether a layer rotates positions in."""
        return self.rotates and self.sees(layer) != "n"

    def local_rope(self, layer: int) -> bool:
        """Whether a layer's RoPE is that of local_rope_theta."""
        return self.local_rope_theta > 0 and self.sees(layer) == "s"

    def has_experts(self, layer: int) -> bool:
        """Whether a layer (from 0) has experts in place of its mlp."""
        due = (layer + 1) % self.expert_every == 0
        return self.experts > 0 and layer >= self.dense_layers and due

    @property
    def expert_layers(self) -> int:
        """Layers with experts."""
        return self.experts_before(self.layers)

    def experts_before(self, layer: int) -> int:
        """Layers with experts before a layer."""
        every = self.expert_every
        return max(layer // every - self.dense_layers // every, 0) if self.experts else 0

"""A model as numbers: sizes, exact parameters, FLOPs. The families:

    llama    RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases, tied or not
    gpt2     LayerNorm, learned positions, GELU (tanh), biases everywhere, dropout, tied or not
    gpt_neox gpt2 with RoPE of a part of each head, attention and mlp on one input or not, GELU of both kinds
    bloom    gpt2 with ALiBi (attention's scores fall off with distance) and a norm behind the token table
    bert     gpt2 with norms behind the sums, token types, and a head that transforms what it reads; attends
             both ways
    alexnet  convolutions in groups and fully connected layers over images (image.py); seq_len is 1

Llama, GPT-2 and GPT-NeoX attend both ways where `causal` is false. A llama may have biases on q, k, v
(Qwen2) and elsewhere, norms of each head of q and k (Qwen3), norms behind its segments, soft caps and another
gate (Gemma), layers that see a window, or have no RoPE, beside others that do not (`attention_pattern`), keys
and values made of a latent (DeepSeek), and experts in place of its mlps (Mixtral, Qwen3-MoE, DeepSeek-V3):
`experts` and what follows.

FLOPs count matrix products only, two for each multiply-add, under one of three conventions:

    model_causal    attention's two products count half, as causal attention needs only half of them, and
                    whole where tokens see those that follow too (`causal = false`)
    model_full      attention's two products count whole (PaLM appendix B, Megatron)
    hw              model_full, and what recompute runs a second time
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from partita.base.config import decode, encode, load_toml
from partita.base.errors import UsageError
from partita.base.text import did_you_mean
from partita.spec.image import ImageSpec
from partita.spec.lora import DEFAULT, DENSE, widths
from partita.spec.model_check import check_relations, check_stated
from partita.spec.model_parts import Latent, RopeScaling
from partita.spec.model_sizes import ModelSizes

__all__ = ["Latent", "ModelSpec", "RopeScaling"]

PRESETS = Path(__file__).parent / "presets" / "models"
Convention = Literal["model_causal", "model_full", "hw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(ModelSizes):
    """Sizes of a model. kv_heads, head_dim, ffn_hidden (4 * hidden; llama has no default) and tied (gpt2,
    bloom: yes) follow from the others where they are left out. Raises UsageError for sizes that cannot be."""

    def __post_init__(self) -> None:
        check_stated(self)
        derived = {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.hidden // self.heads,
            "ffn_hidden": self.ffn_hidden
            or {"llama": 0, "alexnet": 1}.get(self.family, 4) * self.hidden,
            "tied": self.family in ("gpt2", "bloom", "bert") if self.tied is None else self.tied,
            "causal": self.family != "bert" if self.causal is None else self.causal,
            "token_types": self.token_types or 2 * (self.family == "bert"),
        }
        if self.experts:
            derived["expert_ffn_hidden"] = self.expert_ffn_hidden or derived["ffn_hidden"]
        if self.lora_rank:
            derived["lora_alpha"] = self.lora_alpha or float(self.lora_rank)
            usual = DEFAULT if self.image is None else DENSE
            derived["lora_targets"] = self.lora_targets or usual
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        check_relations(self)

    @property
    def softmax_scale(self) -> float:
        """What the product of a query and a key is multiplied by."""
        scaling = self.rope_scaling
        wide = scaling is not None and self.latent is not None and scaling.mscale_all_dim
        grown = scaling.magnitude(scaling.mscale_all_dim) if scaling is not None and wide else 1.0
        return (self.query_scalar or self.head_dim) ** -0.5 * grown * grown

    @property
    def _attention_weights(self) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.latent is None:
            return self.hidden * (2 * q + 2 * kv)
        made = self.latent
        queries = (self.hidden + q) * made.q if made.q else self.hidden * q
        heads = self.heads * (self.head_dim - made.rope + made.v)
        keys = self.hidden * (made.kv + made.rope) + made.kv * heads
        return queries + keys + self.hidden * self.heads * made.v

    def _mlp_weights(self, width: int) -> int:
        return self.hidden * width * (3 if self.family == "llama" else 2)

    def matmul_weights(self, active: bool = True) -> int:
        """Elements of all layers' weight matrices; `active`: those that one token meets."""
        routed = self.top_k if active else self.experts
        moe = self._mlp_weights(self.expert_ffn_hidden * (routed + self.shared_experts))
        moe += (self.experts + self.shared_gate) * self.hidden
        dense = self.layers - self.expert_layers
        mlps = dense * self._mlp_weights(self.ffn_hidden) + self.expert_layers * moe
        return self.layers * self._attention_weights + mlps

    def parameters(self) -> int:
        """Exact number of parameters; a tied table counts once, padding not at all."""
        low = self.lora_rank * sum(widths(self)[target] for target in self.lora_targets)
        if self.image is not None:
            return self.image.parameters(self.hidden, self.vocab) + low
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        found = tables + self.matmul_weights(active=False) + self.hidden
        found += self.norms_of_segments * self.layers * self.hidden
        if self.wo_bias:
            found += self.layers * self.hidden
        if self.mlp_bias:
            found += (self.layers - self.expert_layers) * (2 * self.ffn_hidden + self.hidden)
        if self.router_bias:
            found += self.expert_layers * self.experts
        if self.qk_norm:
            found += self.layers * 2 * self.head_dim
        if self.latent:
            found += self.layers * (self.latent.q + self.latent.kv)
        if self.qkv_bias:
            found += self.layers * (self.heads + 2 * self.kv_heads) * self.head_dim
        if self.has_positions:
            found += self.max_seq_len * self.hidden
        if self.has_biases:
            q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
            linears = q + 2 * kv + self.hidden + self.ffn_hidden + self.hidden
            found += self.layers * (linears + 2 * self.hidden) + self.hidden
        if self.embedding_norm:
            found += 2 * self.hidden
        if self.post_norm:
            found += (self.token_types + self.hidden + 1) * self.hidden + self.vocab
        return found + low

    @property
    def lora_scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.lora_alpha / self.lora_rank

    def attention_flops_per_token(
        self, seq_len: int, convention: Convention = "model_causal"
    ) -> float:
        """FLOPs of the two products QK' and PV, a token, forward: of a layer in the mean of all."""
        per_key = 2.0 * self.heads * (self.head_dim + self.v_dim)
        if convention != "model_causal":
            return per_key * seq_len
        windows = Counter(map(self.window_of, range(self.layers)))
        each = ((min(w or seq_len, seq_len), n / self.layers) for w, n in windows.items())
        seen = sum(n * (w - w * w / (2.0 * seq_len)) for w, n in each)
        return per_key * (seen if self.causal else 2.0 * seen)

    def forward_flops_per_token(
        self, seq_len: int, convention: Convention = "model_causal"
    ) -> float:
        """FLOPs of one forward pass, a token of a sequence of `seq_len` (an image); lookups cost nothing."""
        if self.image is not None:
            return float(sum(self.image.forward_flops(self.hidden, self.vocab)))
        attention = self.attention_flops_per_token(seq_len, convention)
        layers = 2.0 * self.matmul_weights() + self.layers * attention
        head = self.vocab + (self.hidden if self.post_norm else 0)
        return layers + 2.0 * head * self.hidden

    def train_flops_per_token(
        self, seq_len: int, convention: Convention = "model_causal", recompute: str = "none"
    ) -> float:
        """FLOPs of forward and backward, a token: three times forward. Under `hw` recompute 'full'
        adds the layers' forward, 'selective' their attention products."""
        flops = 3.0 * self.forward_flops_per_token(seq_len, convention)
        if convention != "hw" or recompute == "none":
            return flops
        if self.image is not None:
            layers = self.image.forward_flops(self.hidden, self.vocab)[1:-1]
            return flops + (sum(layers) if recompute == "full" else 0.0)
        attention = self.layers * self.attention_flops_per_token(seq_len, convention)
        return flops + attention + (2.0 * self.matmul_weights() if recompute == "full" else 0.0)

    @staticmethod
    def preset_names() -> list[str]:
        """Names that from_preset knows."""
        return sorted(p.stem for p in PRESETS.glob("*.toml"))

    @staticmethod
    def from_preset(name: str) -> ModelSpec:
        """A published model by name, e.g. 'llama3-405b'. Raises UsageError with the nearest name."""
        return ModelSpec.from_toml({"preset": name})

    @staticmethod
    def from_hf_config(path: str | Path) -> ModelSpec:
        """A Hugging Face folder or its config.json of a model_type that is known."""
        from partita.spec.model_hf import read_hf_config

        return read_hf_config(path)

    @staticmethod
    def from_toml(
        table: Mapping[str, Any],
        *,
        file: str | None = None,
        prefix: str = "model",
        folder: str | Path = ".",
    ) -> ModelSpec:
        """A [model] table: `preset` or `path` (relative to `folder`), which the other fields override,
        or all fields. Raises UsageError."""
        base, rest = _base(table, file, prefix, Path(folder))
        if rest.get("family") == "alexnet":
            rest = {**image_defaults(rest), **rest}
        if base is not None:
            # what follows from other fields follows anew when those are overridden
            kept = encode(base)
            if rest.keys() & {"hidden", "heads", "family"}:
                kept.pop("head_dim", None)
            if "heads" in rest and base.kv_heads == base.heads:
                kept.pop("kv_heads", None)
            if "ffn_hidden" in rest and base.expert_ffn_hidden == base.ffn_hidden:
                kept.pop("expert_ffn_hidden", None)
            if rest:
                kept["name"] = f"{base.name} changed" if base.name else ""
            if isinstance(rest.get("image"), Mapping):
                rest["image"] = {**kept.get("image", {}), **rest["image"]}
            rest = {**kept, **rest}
        return decode(ModelSpec, rest, file=file, prefix=prefix)

    @staticmethod
    def load(what: str | Path | Mapping[str, Any]) -> ModelSpec:
        """A model from a preset's name, a Hugging Face folder, a config.json, a TOML file or a table."""
        if isinstance(what, Mapping):
            return ModelSpec.from_toml(what)
        path = Path(what)
        if str(what) in ModelSpec.preset_names():
            return ModelSpec.from_preset(str(what))
        if path.suffix == ".toml":
            table = load_toml(path)
            inner = table.get("model")
            nested = isinstance(inner, Mapping)
            return ModelSpec.from_toml(
                inner if nested else table,  # type: ignore[arg-type]
                file=str(path),
                prefix="model" if nested else "",
                folder=path.parent,
            )
        if path.suffix == ".json" or path.exists() or "/" in str(what):
            return ModelSpec.from_hf_config(path)
        return ModelSpec.from_preset(str(what))

    def to_toml(self) -> dict[str, Any]:
        """The [model] table with every field stated."""
        return {k: v for k, v in encode(self).items() if v != ""}


def image_defaults(table: Mapping[str, Any]) -> dict[str, int]:
    """What an [image] table says of a model's layers; an image is one place of a sequence."""
    image = table.get("image")
    found = {"heads": 1, "max_seq_len": 1}
    if isinstance(image, Mapping):
        found["layers"] = decode(ImageSpec, image, prefix="model.image").layers
    return found


def _base(
    table: Mapping[str, Any], file: str | None, prefix: str, folder: Path
) -> tuple[ModelSpec | None, dict[str, Any]]:
    """The model that `preset` or `path` names, and the fields that remain."""
    rest = {k: v for k, v in table.items() if k not in ("preset", "path")}
    where = f"{file}: " if file else ""
    if "preset" in table and "path" in table:
        raise UsageError(
            f"{where}{prefix}.path: preset or path, not both", file=file, key=f"{prefix}.path"
        )
    for key in ("preset", "path"):
        if key in table and not isinstance(table[key], str):
            raise UsageError(
                f"{where}{prefix}.{key}: a string is wanted", file=file, key=f"{prefix}.{key}"
            )
    if "preset" in table:
        names, name = ModelSpec.preset_names(), table["preset"].lower()
        if name not in names:
            text = f"no model preset '{name}'{did_you_mean(name, names)}"
            raise UsageError(f"{where}{prefix}.preset: {text}", file=file, key=f"{prefix}.preset")
        path = PRESETS / f"{name}.toml"
        return decode(ModelSpec, {"name": name, **load_toml(path)}, file=str(path)), rest
    if "path" in table:
        path = folder / table["path"]
        return ModelSpec.load(path) if path.suffix == ".toml" else ModelSpec.from_hf_config(
            path
        ), rest
    return None, rest

"""A model as numbers: sizes, exact parameters, FLOPs. Two families:

    llama    RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases, tied or not
    gpt2     LayerNorm, learned positions, GELU (tanh), biases everywhere, dropout, tied or not

FLOPs count matrix products only, two for each multiply-add, under one of three conventions:

    model_causal    attention's two products count half, as causal attention needs only half of them
    model_full      attention's two products count whole (PaLM appendix B, Megatron)
    hw              model_full, and what recompute runs a second time
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from partita.base.config import decode, encode, load_toml
from partita.base.errors import UsageError
from partita.base.text import did_you_mean

PRESETS = Path(__file__).parent / "presets" / "models"
Convention = Literal["model_causal", "model_full", "hw"]
_LIMITS = {
    "layers": 100_000,
    "hidden": 10_000_000,
    "heads": 1_000_000,
    "kv_heads": 1_000_000,
    "head_dim": 1_000_000,
    "ffn_hidden": 100_000_000,
    "vocab": 1_000_000_000,
    "max_seq_len": 1_000_000_000,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's scaling of RoPE's frequencies for sequences longer than it was trained with."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        if min(self.factor, self.low_freq_factor, self.high_freq_factor) <= 0:
            raise UsageError("factors of rope_scaling are larger than 0", key="factor")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UsageError(
                f"{self.low_freq_factor} must be less than high_freq_factor {self.high_freq_factor}",
                key="low_freq_factor",
            )
        if not 1 <= self.original_max_seq_len <= _LIMITS["max_seq_len"]:
            raise UsageError(f"{self.original_max_seq_len} is absurd", key="original_max_seq_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Sizes of a model. kv_heads, head_dim, ffn_hidden (gpt2: 4 * hidden) and tied (gpt2: yes) follow
    from the others where they are left out. Raises UsageError for sizes that cannot be."""

    family: Literal["llama", "gpt2"]
    layers: int
    hidden: int
    heads: int
    vocab: int
    max_seq_len: int
    kv_heads: int = 0  # 0: heads
    head_dim: int = 0  # 0: hidden / heads
    ffn_hidden: int = 0  # 0: 4 * hidden, gpt2 only
    tied: bool = None  # type: ignore[assignment]  # None: gpt2
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # llama
    rope_scaling: RopeScaling | None = None  # llama
    sliding_window: int = 0  # keys a query sees, itself among them (Mistral); 0: all before it
    dropout: float = 0.0  # on embeddings and on the output of each sub-block; gpt2
    name: str = ""

    def __post_init__(self) -> None:
        _check_range(self, "layers", "hidden", "heads", "vocab", "max_seq_len")
        if not self.head_dim and self.hidden % self.heads:
            raise UsageError(
                f"hidden {self.hidden} is not divisible by heads {self.heads} (or state head_dim)",
                key="heads",
            )
        derived = {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.hidden // self.heads,
            "ffn_hidden": self.ffn_hidden or (4 * self.hidden if self.family == "gpt2" else 0),
            "tied": self.family == "gpt2" if self.tied is None else self.tied,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        _check_range(self, "kv_heads", "head_dim", "ffn_hidden")
        _check_relations(self)

    @property
    def has_biases(self) -> bool:
        """Whether linear layers and norms have biases."""
        return self.family == "gpt2"

    @property
    def has_positions(self) -> bool:
        """Whether positions are learned (max_seq_len rows), not rotated in."""
        return self.family == "gpt2"

    @property
    def matmul_weights_per_layer(self) -> int:
        """Elements of a layer's weight matrices."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = 3 if self.family == "llama" else 2
        return self.hidden * (2 * q + 2 * kv + matrices * self.ffn_hidden)

    @property
    def parameters_per_layer(self) -> int:
        """Exact number of parameters of one layer."""
        if not self.has_biases:
            return self.matmul_weights_per_layer + 2 * self.hidden
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = q + 2 * kv + self.hidden + self.ffn_hidden + self.hidden
        return self.matmul_weights_per_layer + biases + 4 * self.hidden

    def parameters(self) -> int:
        """Exact number of parameters; a tied table counts once, padding not at all."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        positions = self.max_seq_len * self.hidden if self.has_positions else 0
        final_norm = self.hidden * (2 if self.has_biases else 1)
        return tables + positions + self.layers * self.parameters_per_layer + final_norm

    def attention_flops_per_token(
        self, seq_len: int, convention: Convention = "model_causal"
    ) -> float:
        """FLOPs of the two products QK' and PV of one layer, a token, forward."""
        per_key = 4.0 * self.heads * self.head_dim
        if convention != "model_causal":
            return per_key * seq_len
        w = min(self.sliding_window or seq_len, seq_len)
        return per_key * (w - w * w / (2.0 * seq_len))

    def forward_flops_per_token(
        self, seq_len: int, convention: Convention = "model_causal"
    ) -> float:
        """FLOPs of one forward pass, a token of a sequence of `seq_len`; lookups cost nothing."""
        attention = self.attention_flops_per_token(seq_len, convention)
        layer = 2.0 * self.matmul_weights_per_layer + attention
        return self.layers * layer + 2.0 * self.vocab * self.hidden

    def train_flops_per_token(
        self, seq_len: int, convention: Convention = "model_causal", recompute: str = "none"
    ) -> float:
        """FLOPs of forward and backward, a token: three times forward. Under `hw` recompute 'full'
        adds the layers' forward, 'selective' their attention products."""
        flops = 3.0 * self.forward_flops_per_token(seq_len, convention)
        if convention != "hw" or recompute == "none":
            return flops
        attention = self.attention_flops_per_token(seq_len, convention)
        again = attention + (2.0 * self.matmul_weights_per_layer if recompute == "full" else 0.0)
        return flops + self.layers * again

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
        """A Hugging Face folder or its config.json (model_type llama or gpt2)."""
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
        if base is not None:
            # what follows from other fields follows anew when those are overridden
            kept = encode(base)
            if rest.keys() & {"hidden", "heads", "family"}:
                kept.pop("head_dim", None)
            if "heads" in rest and base.kv_heads == base.heads:
                kept.pop("kv_heads", None)
            if rest:
                kept["name"] = f"{base.name} changed" if base.name else ""
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


def _check_range(spec: ModelSpec, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if name == "ffn_hidden" and value == 0:
            raise UsageError("missing, and family llama has no default for it", key=name)
        if not 1 <= value <= _LIMITS[name]:
            raise UsageError(f"{value} is not within 1..{_LIMITS[name]}", key=name)


def _check_relations(spec: ModelSpec) -> None:
    if spec.heads % spec.kv_heads:
        text = f"heads {spec.heads} is not divisible by kv_heads {spec.kv_heads}"
        raise UsageError(text, key="kv_heads")
    if not 0.0 <= spec.dropout < 1.0:
        raise UsageError(f"{spec.dropout} is not within 0 <= dropout < 1", key="dropout")
    if not 0 <= spec.sliding_window <= _LIMITS["max_seq_len"]:
        raise UsageError(f"{spec.sliding_window} is absurd", key="sliding_window")
    if not 0.0 < spec.norm_eps < 1.0:
        raise UsageError(f"{spec.norm_eps} is not within 0 < norm_eps < 1", key="norm_eps")
    if spec.family == "llama":
        if spec.head_dim % 2:
            raise UsageError(f"RoPE turns pairs: {spec.head_dim} is odd", key="head_dim")
        if spec.rope_theta < 1.0:
            raise UsageError(f"{spec.rope_theta} is less than 1", key="rope_theta")
        if spec.dropout:
            raise UsageError("family llama has no dropout", key="dropout")
    elif spec.kv_heads != spec.heads or spec.heads * spec.head_dim != spec.hidden:
        text = f"family gpt2 has kv_heads = heads = {spec.heads} and head_dim = hidden / heads"
        raise UsageError(text, key="kv_heads" if spec.kv_heads != spec.heads else "head_dim")
    elif spec.rope_scaling is not None:
        raise UsageError("family gpt2 has learned positions", key="rope_scaling")

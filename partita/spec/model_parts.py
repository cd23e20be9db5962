"""Parts of a model that have sizes of their own: RoPE for long sequences, latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

from partita.base.errors import UsageError

LIMITS = {
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
    """RoPE for sequences longer than it was trained with: Llama 3's scaling of its frequencies, all of them
    divided (linear: position interpolation, Chen et al. 2023, 2306.15595), or YaRN (Peng et al. 2023,
    2309.00071), which scales what is attended to too: `mscale` of the rotated part, `mscale_all_dim` of all
    (DeepSeek-V2)."""

    factor: float
    kind: Literal["llama3", "linear", "yarn"] = "llama3"
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    beta_fast: float = 32.0  # yarn: turns within original_max_seq_len above which nothing is scaled
    beta_slow: float = 1.0  # yarn: and below which all is
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def magnitude(self, mscale: float = 1.0) -> float:
        """What yarn multiplies by for its factor; 1 under the others."""
        grows = self.kind == "yarn" and self.factor > 1
        return 0.1 * mscale * log(self.factor) + 1.0 if grows else 1.0

    @property
    def rotation(self) -> float:
        """What a rotation multiplies by."""
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude()

    def __post_init__(self) -> None:
        if min(self.factor, self.low_freq_factor, self.high_freq_factor) <= 0:
            raise UsageError("factors of rope_scaling are larger than 0", key="factor")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UsageError(
                f"{self.low_freq_factor} must be less than high_freq_factor {self.high_freq_factor}",
                key="low_freq_factor",
            )
        if not 1 <= self.original_max_seq_len <= LIMITS["max_seq_len"]:
            raise UsageError(f"{self.original_max_seq_len} is absurd", key="original_max_seq_len")


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2405.04434): keys without positions and values of every
    head are made of `kv` numbers a token, normalised. RoPE turns the last `rope` numbers of a query's head,
    and one key of `rope` numbers that all heads share; head_dim counts both parts, `v` is a value's.
    `q`: queries too are made of so many numbers (0: of the token)."""

    kv: int
    rope: int
    v: int
    q: int = 0
    norm_eps: float = 1e-6

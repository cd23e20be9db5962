"""Multi-head latent attention (DeepSeek-V2, 2405.04434): heads see what a small latent of each token makes.

    n1 ─► q_a ─► norm ─► wq ─────────────────► q   [heads, nope + rope], its last part rotated
    n1 ─► kv_a ─► norm ─► wk ─► k  ┐
                        └► wv      ├─ rope_k ─► kr [heads, nope + rope]      v [heads, v]
    n1 ─► k_pe ────────────────────┘ one rotated key for all heads

Latents and k_pe are whole on tp, heads are not: copy_to (under sp gather_from) stands behind the two norms
and behind k_pe, whose gradient every head adds to. q_a, kv_a and k_pe read one tensor and lie side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from partita.spec.families.writer import Writer

if TYPE_CHECKING:
    from partita.spec.model import ModelSpec

Q, KV = "batch seq heads head_dim", "batch seq kv_heads head_dim"
V = "batch seq kv_heads v_dim"


def latent_sizes(spec: ModelSpec) -> dict[str, int]:
    """Sizes of the dims that a latent adds. Both products of attention are over the rows of `qk_v`."""
    made = spec.latent
    assert made is not None
    return {
        "q_latent": made.q,
        "kv_latent": made.kv,
        "rope_dim": made.rope,
        "nope_dim": spec.head_dim - made.rope,
        "v_dim": made.v,
        "qk_v": spec.head_dim + made.v,
    }


def latent_heads(spec: ModelSpec, w: Writer, x: str) -> tuple[str, str, str]:
    """Reads the normalised x; returns q, k and v, positions in."""
    assert spec.latent is not None
    read, dims = x, "hidden"
    if spec.latent.q:
        out = ("qa", "batch seq q_latent")
        w.linear("attention.q_a", x, out, "q_latent hidden", "hidden")
    w.linear("attention.kv_a", x, ("kva", "batch seq kv_latent"), "kv_latent hidden", "hidden")
    w.linear("attention.k_pe", x, ("kpe", "batch seq rope_dim"), "rope_dim hidden", "hidden")
    if spec.latent.q:
        read, dims = _norm(w, "attention.q_norm", "qa", "qn", "q_latent"), "q_latent"
    kvn = _norm(w, "attention.kv_norm", "kva", "kvn", "kv_latent")
    q = w.linear("attention.wq", read, ("q", Q), f"heads head_dim {dims}", dims)
    out = ("k", "batch seq kv_heads nope_dim")
    k = w.linear("attention.wk", kvn, out, "kv_heads nope_dim kv_latent", "kv_latent")
    v = w.linear("attention.wv", kvn, ("v", V), "kv_heads v_dim kv_latent", "kv_latent")
    qr = w.op("attention.rope_q", "map", q, ("qr", Q))
    return qr, w.op("attention.rope_k", "append", f"{k} kpe", ("kr", KV)), v


def _norm(w: Writer, name: str, x: str, out: str, dim: str) -> str:
    whole, dims = ((x, dim),), f"batch seq {dim}"
    return w.op(name, "norm", x, (out, dims), weights={name: dim}, whole=whole, saves=x)

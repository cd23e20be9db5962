"""Experts in place of a layer's mlp (Shazeer et al. 2017; DeepSeek-V3, 2412.19437): segments shared, router,
dispatch, experts, combine.

    x ─► router: scores of each expert ─► the top_k of each token, with their gates
    x ─► dispatch: a row for each (token, chosen expert), sorted by expert ─► experts: SwiGLU each on its rows
      ─► combine: each token's rows, weighed by its gates, added up (and to the shared experts' output)

`slots` are those rows: pairs (expert, token), so the dim is folded from experts, batch and seq. Their number
is top_k a token; where they lie after the exchange (`arrivals`) is data. `choices` are the router's columns,
never cut; `experts` are the weights' and belong to ep.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from partita.spec.families.writer import Writer

if TYPE_CHECKING:
    from partita.spec.model import ModelSpec

X = "batch seq hidden"
CHOICES, PICKS = "batch seq choices", "batch seq picks"


def expert_sizes(spec: ModelSpec, batch: int, seq: int) -> dict[str, int]:
    """Sizes of the dims that experts add; ffn is the shared experts'."""
    return {
        "one": 1,
        "experts": spec.experts,
        "choices": spec.experts,
        "picks": spec.top_k,
        "slots": batch * seq * spec.top_k,
        "expert_ffn": spec.expert_ffn_hidden,
        "capacity": capacity(spec, seq),
        "ffn": spec.shared_experts * spec.expert_ffn_hidden,
    }


def capacity(spec: ModelSpec, seq: int) -> int:
    """Rows that an expert takes of a sequence."""
    return ceil((spec.capacity_factor or 0) * seq * spec.top_k / spec.experts)


def moe(spec: ModelSpec, w: Writer, x: str) -> str:
    """Reads the normalised x; returns the names of what is added to the residual stream."""
    shared = _shared(spec, w, x) if spec.shared_experts else ""
    gates = _router(spec, w, x)
    rows = "chosen" if spec.capacity_factor is None else _limit(w)
    w.tensor("order", PICKS, "route")
    w.op("dispatch.count", "load", rows, ("loads", "choices"), role="route")
    w.op("dispatch.send", "dispatch", f"{x} {rows}", ("sent", "slots hidden"), saves="order")
    w.op(
        "experts.gate_up",
        "linear",
        "sent",
        ("e_gu", "slots pair expert_ffn"),
        weights={"experts.gate_up": "experts pair expert_ffn hidden"},
        sums=("hidden",),
        space="slots pair expert_ffn hidden",
        saves="sent",
    )
    w.op("experts.act", "map", "e_gu", ("e_act", "slots expert_ffn"), saves="e_gu")
    w.op(
        "experts.down",
        "linear",
        "e_act",
        ("back", "slots hidden"),
        weights={"experts.down": "experts hidden expert_ffn"},
        sums=("expert_ffn",),
        space="slots hidden expert_ffn",
        saves="e_act",
    )
    saves = f"back {gates} order"
    y = w.op("combine.sum", "combine", f"back {gates} order", ("moe", X), saves=saves)
    return f"{y} {shared}".strip()


def _limit(w: Writer) -> str:
    """Of each sequence an expert takes its capacity; rows of later positions are dropped: what all positions
    chose must be known, wherever the sequence is cut (the room of ep brings it)."""
    w.tensor("capacity", "capacity", "buffer")
    return w.op("dispatch.limit", "limit", "chosen", ("admitted", PICKS), role="route")


def _shared(spec: ModelSpec, w: Writer, x: str) -> str:
    """Shared experts are one dense SwiGLU of their widths together: tp cuts it. With a gate a token's
    sigmoid weighs what they make (Qwen2-MoE)."""
    gu = w.linear("shared.gate_up", x, ("s_gu", "batch seq pair ffn"), "pair ffn hidden", "hidden")
    act = w.op("shared.act", "map", gu, ("s_act", "batch seq ffn"), saves=gu)
    so = w.linear("shared.down", act, ("so", X), "hidden ffn", "ffn")
    if not spec.shared_gate:
        return so
    gate = w.linear("shared.gate", x, ("s_gate", "batch seq one"), "one hidden", "hidden")
    return w.op("shared.weigh", "gated", f"{so} {gate}", ("sg", X), saves=f"{so} {gate}")


def _router(spec: ModelSpec, w: Writer, x: str) -> str:
    """Scores in fp32, the choice, and the auxiliary losses: outputs of the block with seeds of their own."""
    w.op(
        "router.gate",
        "linear",
        x,
        ("r_logits", CHOICES),
        role="stat",
        weights={"router.gate": "choices hidden"},
        sums=("hidden",),
        space=f"{CHOICES} hidden",
        saves=x,
    )
    w.op(
        "router.scores", "scores", "r_logits", ("r_scores", CHOICES), role="stat", saves="r_scores"
    )
    w.tensor("chosen", PICKS, "route")
    bias = {"router.balance_bias": "choices"} if spec.router_bias else {}
    saves = "r_scores chosen"
    gates = w.op(
        "router.choose",
        "choose",
        "r_scores",
        ("gates", PICKS),
        role="stat",
        weights=bias,
        saves=saves,
    )
    if spec.balance_loss:
        w.op(
            "router.count",
            "count",
            "chosen",
            ("r_counts", "batch choices" if spec.balance_over == "sequence" else "choices"),
            role="constant",
            sums=("seq",) if spec.balance_over == "sequence" else ("batch", "seq"),
        )
        w.op(
            "router.balance",
            "balance",
            "r_counts r_scores",
            ("balance", ""),
            role="aux",
            sums=("batch", "seq", "choices"),
            saves="r_counts r_scores",
        )
    if spec.z_loss:
        w.op(
            "router.z",
            "z",
            "r_logits",
            ("z", ""),
            role="aux",
            sums=("batch", "seq", "choices"),
            saves="r_logits",
        )
    return gates

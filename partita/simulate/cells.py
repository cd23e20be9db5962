"""What the cells of a row of published runs may say: a word that nobody knows is no default."""

from __future__ import annotations

import re
from collections.abc import Mapping

PRECISIONS = r"((fp32|fp16|bf16|mxfp8|fp8|fp8-cs|nvfp4)\??)?"
# column -> what it may say, as a pattern of the whole cell and as words
KNOWN = {
    "precision": (PRECISIONS, "fp32, fp16, bf16, fp8, fp8-cs, mxfp8, nvfp4"),
    "recompute": (r"(none|minimal|(full|selective)(\(.*\))?)?", "none, minimal, full, selective(MODULES)"),
    "seqpar": (r"(yes|no)?", "yes, no"),
    "zero_or_fsdp": (
        r"(none|(zero[123]?|[fh]sdp2?(64)?)(\(.*\))?)?",
        "none, zero1, zero2, zero3, fsdp, fsdp2, fsdp(HOW), hsdp",
    ),
    "flops_conv": (r"(hw|model|model_full|model_causal)?", "hw, model, model_full, model_causal"),
    "quality": (r"[ABC]?", "A, B, C"),
}  # fmt: skip

PLAIN, GATED = ("gelu", "relu2"), ("swiglu", "geglu")  # feed-forwards of two matrices, of three


def is_gpt(row: Mapping[str, str]) -> bool:
    """Whether GPT-2's family has the row's layers: GELU without a gate, and as many keys as queries."""
    return row["mlp"] == "gelu" and row.get("kv_heads", "") in ("", row.get("heads", ""))


def is_eager(row: Mapping[str, str]) -> bool:
    """Whether a row's notes say that each op of a layer is a kernel: no compiler, no kernels of its own."""
    return re.search(r"\beager\b", row.get("notes", "")) is not None


def not_understood(row: Mapping[str, str]) -> list[str]:
    """A sentence for each cell that says none of the words of its column, and where two contradict."""
    told = [
        f"{column} = {row[column]}: known are {words}"
        for column, (pattern, words) in KNOWN.items()
        if not re.fullmatch(pattern, row.get(column, ""))
    ]
    vpp, pp = (row.get(c, "").strip() for c in ("vpp", "pp"))
    if vpp not in ("", "1") and pp in ("", "1"):
        told.append(f"a contradiction: vpp {vpp} without a pipeline (pp {pp or 'empty'})")
    return told

"""What the cells of a row of published runs may say: a word that nobody knows is no default."""

from __future__ import annotations

import re
from collections.abc import Mapping

from partita.base.errors import PartitaError

PRECISIONS = r"((fp32|fp16|bf16|mxfp8|fp8|fp8-cs|nvfp4)\??)?"
# column -> what it may say, as a pattern of the whole cell and as words
KNOWN = {
    "precision": (PRECISIONS, "fp32, fp16, bf16, fp8, fp8-cs, mxfp8, nvfp4"),
    "recompute": (
        r"(none|minimal|(full|selective)(\(.*\))?)?",
        "none, minimal, full, full(but OPS), selective(MODULES)",
    ),
    "seqpar": (r"(yes|no)?", "yes, no"),
    "zero_or_fsdp": (
        r"(none|(zero[123]?|[fh]sdp2?(64)?)(\(.*\))?)?",
        "none, zero1, zero2, zero3, fsdp, fsdp2, fsdp(HOW), hsdp; in brackets over how many ranks",
    ),
    "flops_conv": (r"(hw|model|model_full|model_causal)?", "hw, model, model_full, model_causal"),
    "quality": (r"[ABC]?", "A, B, C"),
}  # fmt: skip

Row = Mapping[str, str]
# what selective(MODULES) may name, and the ops that full(but OPS) may
MODULES = (
    "core_attn", "layernorm", "layers", "mla_up_proj", "mlp", "moe", "moe_act", "op", "rmsnorm", "swiglu",
)  # fmt: skip
OP = r"(attention|mlp|experts|shared)\.\w+"
PLAIN, GATED = ("gelu", "relu2"), ("swiglu", "geglu")  # feed-forwards of two matrices, of three


class UnpredictableError(PartitaError):
    """Why a row cannot be predicted."""


def is_gpt(row: Row) -> bool:
    """Whether GPT-2's family has the row's layers: GELU without a gate, and as many keys as queries."""
    return row["mlp"] == "gelu" and row.get("kv_heads", "") in ("", row.get("heads", ""))


def is_eager(row: Row) -> bool:
    """Whether a row's notes say that each op of a layer is a kernel: no compiler, no kernels of its own."""
    return re.search(r"\beager\b", row.get("notes", "")) is not None


def named(recompute: str) -> list[tuple[str, str]]:
    """What 'selective(a,b)' and 'full(but a,b)' name, each with its mode; of 'a or b' the first."""
    found = re.match(r"(selective)\((.*)\)|(full)\(but (.*)\)", recompute)
    if not found:
        return []
    mode, words = (found[1], found[2]) if found[1] else (found[3], found[4])
    return [(mode, w.split(" or ")[0].strip()) for w in words.split(",")]


def not_understood(row: Row) -> list[str]:
    """A sentence for each cell that says none of the words of its column, and where two contradict."""
    told = [
        f"{column} = {row[column]}: known are {words}"
        for column, (pattern, words) in KNOWN.items()
        if not re.fullmatch(pattern, row.get(column, ""))
    ]
    text = row.get("recompute", "")
    for mode, word in named(text):
        if (mode == "selective" and word not in MODULES) or (
            mode == "full" and not re.fullmatch(OP, word)
        ):
            names = "an op as attention.wq" if mode == "full" else f"one of {', '.join(MODULES)}"
            told.append(f"recompute = {text}: {word} is not {names}")
    vpp, pp = (row.get(c, "").strip() for c in ("vpp", "pp"))
    if vpp not in ("", "1") and pp in ("", "1"):
        told.append(f"a contradiction: vpp {vpp} without a pipeline (pp {pp or 'empty'})")
    return told


def number(row: Row, column: str, default: int | None = None) -> int:
    """A whole number above zero of a row. Raises UnpredictableError where there is none, nor a default."""
    text = row.get(column, "").strip()
    if not text:
        if default is None:
            raise UnpredictableError(f"missing column: {column}")
        return default
    try:
        found = float(text)
    except ValueError:
        raise UnpredictableError(f"not a number: {column} = {text}") from None
    if not 1 <= found < float("inf") or found % 1:
        raise UnpredictableError(f"not a whole number above zero: {column} = {text}")
    return int(found)


def value_of(row: Row) -> float:
    """What was measured. Raises UnpredictableError where it is no number above zero."""
    try:
        value = float(row["value"])
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UnpredictableError(f"not a number above zero: value = {row['value']}")
    return value


def method(row: Row) -> str:
    """The variant that a row's notes name ('method redis ...'); '' where they name none."""
    found = re.match(r"method ([\w-]+)", row.get("notes", ""))
    return found[1] if found else ""

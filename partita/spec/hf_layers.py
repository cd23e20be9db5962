"""Layers that attend in several ways, as a config.json says it: by a list, or by a number that it follows
from; and how a value that cannot be read is told.

    layer_types            a word a layer: sliding_attention, full_attention
    max_window_layers      qwen: so many layers see all, those behind them have the window
    sliding_window_pattern gemma: every so many-th layer sees all
    no_rope_layers         smollm3: 0 where a layer has no RoPE
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partita.base.errors import UsageError
from partita.spec.hf_kinds import Kind
from partita.spec.model_sizes import ModelSizes

TYPES = {"sliding_attention": "s", "full_attention": "f"}
WORDS = {"s": "sliding_attention", "f": "full_attention", "n": "full_attention"}
LATE = 28  # max_window_layers of qwen where a config.json is silent
NO_ROPE = 4  # no_rope_layer_interval of smollm3


def refuse(file: Path, key: str, value: Any, accepted: tuple[Any, ...]) -> UsageError:
    """The error of a value that this model cannot have."""
    known = ", ".join(map(repr, accepted)) or "null"
    text = f"{file}: {key}: {value!r} is not supported; accepted: {known}"
    return UsageError(text, file=str(file), key=key)


def of_type(config: Mapping[str, Any], key: str, kind: type, file: Path) -> Any:
    """The value of a key; None where there is none. Raises UsageError for one of another type."""
    value = config.get(key)
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    what = {list: "a list", int: "a whole number"}[kind]
    raise UsageError(f"{file}: {key}: {what} is wanted, not {value!r}", file=str(file), key=key)


def read_layers(
    config: Mapping[str, Any], table: Mapping[str, Any], kind: Kind, file: Path
) -> dict[str, Any]:
    """sliding_window and attention_pattern of the model. Raises UsageError for layers that it cannot have."""
    count, stated = table.get("layers"), of_type(config, "layer_types", list, file)
    window = of_type(table, "sliding_window", int, file)
    if kind.windows == "late" and not config.get("use_sliding_window"):
        window = None
    words = tuple(TYPES) if window and kind.windows else ("full_attention",)
    if stated is not None and any(w not in words for w in stated):
        raise refuse(file, "layer_types", stated, words)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < 100_000:
        return {}  # told by its own key
    letters = "".join(TYPES[w] for w in stated) if stated is not None else ""
    if stated is None:
        letters = _silent(config, count, kind.windows if window else "", file)
    if kind.windows == "no_rope":
        letters = _no_rope(config, letters, file)
    if len(letters) != count:
        raise refuse(file, "layer_types", stated, (f"a word for each of {count} layers",))
    found: dict[str, Any] = {"attention_pattern": _shortest(letters)} if kind.windows else {}
    return found | ({} if "s" in letters else {"sliding_window": 0})


def _silent(config: Mapping[str, Any], count: int, windows: str, file: Path) -> str:
    """A letter a layer, where layer_types is left out."""
    if windows == "late":
        full = of_type(config, "max_window_layers", int, file)
        full = min(LATE if full is None else full, count)
        return "f" * full + "s" * (count - full)
    if windows.isdigit():
        every = of_type(config, "sliding_window_pattern", int, file) or int(windows)
        return "".join("s" if (i + 1) % every else "f" for i in range(count))
    return ("s" if windows == "all" else "f") * count


def _no_rope(config: Mapping[str, Any], letters: str, file: Path) -> str:
    """n in the place of f where a layer has no RoPE."""
    each = of_type(config, "no_rope_layers", list, file)
    every = of_type(config, "no_rope_layer_interval", int, file) or NO_ROPE
    if each is None:
        each = [int((i + 1) % every != 0) for i in range(len(letters))]
    if len(each) != len(letters) or any(x not in (0, 1) for x in each):
        raise refuse(file, "no_rope_layers", each, (f"0 or 1 for each of {len(letters)} layers",))
    return "".join(a if x else "n" for a, x in zip(letters, each, strict=True))


def _shortest(letters: str) -> str:
    """The fewest letters that make these, over and over; none where all layers are s, or all f."""
    if set(letters) in ({"s"}, {"f"}):
        return ""
    sizes = range(1, len(letters) + 1)
    return next(
        letters[:n] for n in sizes if (letters[:n] * len(letters))[: len(letters)] == letters
    )


def written_layers(spec: ModelSizes, kind: Kind) -> dict[str, Any]:
    """What a config.json of a kind says of a model's layers."""
    if not kind.windows:
        return {}
    letters = [spec.sees(i) for i in range(spec.layers)]
    found: dict[str, Any] = {"sliding_window": spec.sliding_window or None}
    if kind.windows != "all":
        found["layer_types"] = [WORDS[x] for x in letters]
    if kind.windows == "late":
        first = letters.index("s") if "s" in letters else spec.layers
        found |= {"use_sliding_window": spec.sliding_window > 0, "max_window_layers": first}
    if kind.windows == "no_rope":
        found = {
            "layer_types": found["layer_types"],
            "no_rope_layers": [int(x != "n") for x in letters],
        }
    return found

"""What sizes of a model can be: ranges, relations, and what experts need. Raises UsageError with every key
that is wrong: first of the fields as they were stated, then of what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from partita.base.errors import raise_all
from partita.spec.image import ImageSpec
from partita.spec.lora import wrong_lora
from partita.spec.model_parts import LIMITS
from partita.spec.model_sizes import ModelSizes

Wrong = Iterator[tuple[str, str]]  # key and text of what is wrong
FOLLOW = ("kv_heads", "head_dim", "ffn_hidden")  # from others, where they are left out
STATED = ("layers", "hidden", "heads", "vocab", "max_seq_len", *FOLLOW)


def check_stated(spec: ModelSizes) -> None:
    """What can be said of the fields as they were stated, each by itself, told at once; and of heads, where
    all that they are made of can be."""
    wrong = [*chain.from_iterable(_range(spec, name) for name in STATED), *_alone(spec)]
    keys = {key for key, _ in wrong}
    if not spec.head_dim and not keys & {"hidden", "heads"} and spec.hidden % spec.heads:
        text = f"hidden {spec.hidden} is not divisible by heads {spec.heads} (or state head_dim)"
        wrong.append(("heads", text))
    if spec.kv_heads and not keys & {"heads", "kv_heads"} and spec.heads % spec.kv_heads:
        text = f"heads {spec.heads} is not divisible by kv_heads {spec.kv_heads}"
        wrong.append(("kv_heads", text))
    raise_all(wrong)


def check_relations(spec: ModelSizes) -> None:
    """Sizes, those that follow from others too, fit each other and the family: all told at once."""
    derived = [*chain.from_iterable(_range(spec, name) for name in FOLLOW)]
    raise_all([*derived, *_sizes(spec), *_latent(spec), *_experts(spec), *wrong_lora(spec)])


def _range(spec: ModelSizes, name: str) -> Wrong:
    """A size is at least 1 and not absurd; some may be left out, as 0, and follow from others."""
    value = getattr(spec, name)
    if name == "ffn_hidden" and value == 0 and spec.family == "llama":
        yield name, "missing, and family llama has no default for it"
    elif not (name in FOLLOW and value == 0) and not 1 <= value <= LIMITS[name]:
        yield name, f"{value} is not within 1..{LIMITS[name]}"


def _alone(spec: ModelSizes) -> Wrong:
    """What each field may be, whatever the sizes are."""
    if not 0.0 <= spec.dropout < 1.0:
        yield "dropout", f"{spec.dropout} is not within 0 <= dropout < 1"
    if not 0 <= spec.sliding_window <= LIMITS["max_seq_len"]:
        yield "sliding_window", f"{spec.sliding_window} is absurd"
    yield from _pattern(spec)
    for name in ("query_scalar", "attention_softcap", "logit_softcap"):
        if not 0.0 <= getattr(spec, name) < 1e9:
            yield name, f"{getattr(spec, name)} is not 0 or more"
    if not 0.0 < spec.embedding_scale < 1e9:
        yield "embedding_scale", f"{spec.embedding_scale} is not larger than 0"
    if not 0.0 < spec.norm_eps < 1.0:
        yield "norm_eps", f"{spec.norm_eps} is not within 0 < norm_eps < 1"
    if (spec.image is not None) != (spec.family == "alexnet"):
        yield "image", f"family {spec.family} has {'no' if spec.image else 'an'} [model.image]"
    for name, (nothing, families) in OF_FAMILIES.items():
        value = getattr(spec, name)
        if value != nothing and spec.family not in families:
            yield name, f"family {spec.family} has no {name}"
    if spec.causal is False and spec.family not in ENCODE:
        yield "causal", f"family {spec.family} has no causal = false"
    if spec.causal and spec.family == "bert":
        yield "causal", "family bert has no causal = true"
    if spec.token_types < 0:
        yield "token_types", f"{spec.token_types} is less than 0"


def _pattern(spec: ModelSizes) -> Wrong:
    """Layers that attend in several ways: letters, and what they need."""
    pattern, window = spec.attention_pattern, spec.sliding_window
    if pattern.strip("sfn"):
        yield "attention_pattern", f"'{pattern}' has letters beside s, f and n"
    elif len(pattern) > max(spec.layers, 1):
        yield "attention_pattern", f"{len(pattern)} letters for {spec.layers} layers"
    elif pattern and ("s" in pattern) != (window > 0):
        text = f"'{pattern}' with sliding_window {window}: s stands for layers that have the window"
        yield "attention_pattern", text
    if "n" in pattern and (not spec.rotates or spec.latent is not None):
        yield (
            "attention_pattern",
            "n leaves RoPE out: a family that has it, and no latent, is wanted",
        )
    if spec.local_rope_theta and not (spec.rotates and window):
        text = f"{spec.local_rope_theta}: RoPE's base in layers with a window, which this model has not"
        yield "local_rope_theta", text
    elif spec.local_rope_theta and spec.local_rope_theta < 1.0:
        yield "local_rope_theta", f"{spec.local_rope_theta} is less than 1"


def _sizes(spec: ModelSizes) -> Wrong:
    if spec.image is not None:
        yield from _image(spec, spec.image)
        return
    yield from _positions(spec)
    square = spec.kv_heads == spec.heads and spec.heads * spec.head_dim == spec.hidden
    if spec.has_biases and not square:
        text = f"family {spec.family} has kv_heads = heads = {spec.heads} and head_dim = hidden / heads"
        yield "kv_heads" if spec.kv_heads != spec.heads else "head_dim", text


ENCODE = ("llama", "gpt2", "gpt_neox", "bert")  # families whose tokens may see later ones
OF_FAMILIES = {  # field -> what says nothing, and the families that may say more
    "dropout": (0.0, ("gpt2", "bert", "alexnet")), "qkv_bias": (False, ("llama",)),
    "qk_norm": (False, ("llama",)),
    "latent": (None, ("llama",)), "rope_scaling": (None, ("llama",)),
    "rotary_pct": (1.0, ("gpt_neox", "llama")),
    "parallel_residual": (False, ("gpt_neox",)), "gelu": ("tanh", ("gpt_neox", "bert")),
    "token_types": (0, ("bert",)),
    "wo_bias": (False, ("llama",)), "mlp_bias": (False, ("llama",)), "gate": ("silu", ("llama",)),
    "norm_placement": ("pre", ("llama",)), "query_scalar": (0, ("llama",)),
    "attention_softcap": (0.0, ("llama",)), "logit_softcap": (0.0, ("llama",)),
    "embedding_scale": (1.0, ("llama",)), "layout": ("", ("llama",)),
}  # fmt: skip


def _positions(spec: ModelSizes) -> Wrong:
    """What RoPE turns is whole pairs."""
    if not spec.rotates:
        return
    if not 0.0 < spec.rotary_pct <= 1.0:
        yield "rotary_pct", f"{spec.rotary_pct} is not within 0 < rotary_pct <= 1"
    elif spec.latent is None and (spec.rope_dim % 2 or not spec.rope_dim):
        whole = spec.rotary_pct == 1.0
        text = f"RoPE turns pairs: {spec.rope_dim} of a head is no even number of 2 or more"
        yield "head_dim" if whole else "rotary_pct", text
    if spec.rope_theta < 1.0:
        yield "rope_theta", f"{spec.rope_theta} is less than 1"


def _image(spec: ModelSizes, image: ImageSpec) -> Wrong:
    """Layers are those of the image's; hidden units lie in its groups; nothing of a transformer's."""
    rules = (
        ("layers", spec.layers == image.layers, f"convolutions and dense make {image.layers}"),
        ("hidden", spec.hidden % image.groups == 0, f"a multiple of groups {image.groups}"),
        ("heads", spec.heads == 1, "an image model has no heads: 1"),
        ("max_seq_len", spec.max_seq_len == 1, "an image is one place of a sequence: 1"),
        ("tied", not spec.tied, "an image model ties nothing"),
        ("rope_scaling", spec.rope_scaling is None, "an image model has no positions"),
        ("sliding_window", not spec.sliding_window, "an image model has no attention"),
        ("attention_pattern", not spec.attention_pattern, "an image model has no attention"),
    )
    yield from (
        (name, f"{getattr(spec, name)}: {text}") for name, holds, text in rules if not holds
    )


def _latent(spec: ModelSizes) -> Wrong:
    """What keys and values are made of, and the parts of a head."""
    made = spec.latent
    if made is None:
        return
    rules = (
        ("kv", 1 <= made.kv <= LIMITS["hidden"], "1 or more"),
        ("q", 0 <= made.q <= LIMITS["hidden"], "0 or more"),
        ("rope", made.rope % 2 == 0 and 0 < made.rope < spec.head_dim,
         f"even, less than head_dim {spec.head_dim}, which counts what has no position too"),
        ("v", 1 <= made.v <= spec.head_dim, f"1 to head_dim {spec.head_dim}"),
    )  # fmt: skip
    for name, holds, wanted in rules:
        if not holds:
            yield f"latent.{name}", f"{getattr(made, name)}: {wanted}"
    if spec.kv_heads != spec.heads:
        text = f"{spec.kv_heads} differs from heads {spec.heads}: a latent makes keys of every head"
        yield "kv_heads", text
    for name in ("qkv_bias", "wo_bias", "qk_norm", "query_scalar", "attention_softcap"):
        if getattr(spec, name):
            yield name, f"a latent has no {name}"
    if spec.rotary_pct != 1.0:
        yield "rotary_pct", f"{spec.rotary_pct}: a latent says what RoPE turns"
    if spec.norm_placement != "pre":
        yield "norm_placement", f"{spec.norm_placement}: a latent's norms stand before it"


EXPERT_FIELDS = {
    "top_k": 0, "expert_ffn_hidden": 0, "shared_experts": 0, "dense_layers": 0, "router_bias": False,
    "balance_loss": 0.0, "balance_over": "sequence", "z_loss": 0.0, "capacity_factor": None,
    "router_groups": 1, "shared_gate": False, "expert_every": 1,
}  # fmt: skip


def _experts(spec: ModelSizes) -> Wrong:
    """A model with experts says which; one without says nothing of them."""
    if not spec.experts:
        for name, nothing in EXPERT_FIELDS.items():
            if getattr(spec, name) != nothing:
                yield name, f"{getattr(spec, name)} without experts"
        return
    if spec.family != "llama":
        yield "experts", f"family {spec.family} has no experts"
        return
    for name, usual in (("norm_placement", "pre"), ("gate", "silu"), ("mlp_bias", False)):
        if getattr(spec, name) != usual:
            yield name, f"{getattr(spec, name)}: experts have {usual}"
    groups, top = spec.router_groups, spec.router_top_groups
    inside = groups > 0 and spec.experts % groups == 0
    rules = (
        ("experts", 2 <= spec.experts <= 1_000_000, "at least 2 experts"),
        ("top_k", 1 <= spec.top_k <= spec.experts, f"1 to {spec.experts} experts a token"),
        ("shared_experts", 0 <= spec.shared_experts <= 1_000_000, "0 or more"),
        ("shared_gate", not spec.shared_gate or spec.shared_experts > 0, "shared experts"),
        ("dense_layers", 0 <= spec.dense_layers < spec.layers, f"less than {spec.layers} layers"),
        ("expert_every", spec.expert_every >= 1 and spec.expert_layers > 0, "a layer with experts"),
        ("router_groups", inside, f"a divisor of {spec.experts} experts"),
        ("router_top_groups", 1 <= top <= groups, f"1 to {groups} groups"),
        ("balance_loss", 0 <= spec.balance_loss < 1e6, "0 or more"),
        ("z_loss", 0 <= spec.z_loss < 1e6, "0 or more"),
        ("router_bias_rate", 0 <= spec.router_bias_rate < 1e6, "0 or more"),
        ("router_scale", 0 < spec.router_scale < 1e6, "more than 0"),
        (
            "capacity_factor",
            spec.capacity_factor is None or spec.capacity_factor > 0,
            "more than 0",
        ),
    )
    yield from (
        (name, f"{getattr(spec, name)}: {text}") for name, holds, text in rules if not holds
    )
    if inside and 1 <= top <= groups and spec.top_k > top * (spec.experts // groups):
        size = spec.experts // groups
        yield (
            "router_top_groups",
            f"{spec.top_k} experts a token do not lie in {top} groups of {size}",
        )

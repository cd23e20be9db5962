"""What sizes of a model can be: ranges, relations, and what experts need. Raises UsageError with the key."""

from __future__ import annotations

from partita.base.errors import UsageError, raise_all
from partita.spec.image import ImageSpec
from partita.spec.model_parts import LIMITS
from partita.spec.model_sizes import ModelSizes


def check_stated(spec: ModelSizes) -> None:
    """All sizes as they were stated, told at once; a relation, where both its sides can be."""
    sizes = (
        "layers",
        "hidden",
        "heads",
        "vocab",
        "max_seq_len",
        "kv_heads",
        "head_dim",
        "ffn_hidden",
    )
    wrong: list[tuple[str, str]] = []
    for name in sizes:
        value = getattr(spec, name)
        if not (name in sizes[5:] and value == 0) and not 1 <= value <= LIMITS[name]:
            wrong.append((name, f"{value} is not within 1..{LIMITS[name]}"))
    keys = {key for key, _ in wrong}
    if not spec.head_dim and not keys & {"hidden", "heads"} and spec.hidden % spec.heads:
        text = f"hidden {spec.hidden} is not divisible by heads {spec.heads} (or state head_dim)"
        wrong.append(("heads", text))
    if spec.kv_heads and not keys & {"heads", "kv_heads"} and spec.heads % spec.kv_heads:
        wrong.append(
            ("kv_heads", f"heads {spec.heads} is not divisible by kv_heads {spec.kv_heads}")
        )
    raise_all(wrong)


def check_range(spec: ModelSizes, *names: str) -> None:
    """Sizes are at least 1 and not absurd."""
    for name in names:
        value = getattr(spec, name)
        if name == "ffn_hidden" and value == 0:
            raise UsageError("missing, and family llama has no default for it", key=name)
        if not 1 <= value <= LIMITS[name]:
            raise UsageError(f"{value} is not within 1..{LIMITS[name]}", key=name)


def check_relations(spec: ModelSizes) -> None:
    """Sizes fit each other and the family."""
    if not 0.0 <= spec.dropout < 1.0:
        raise UsageError(f"{spec.dropout} is not within 0 <= dropout < 1", key="dropout")
    if not 0 <= spec.sliding_window <= LIMITS["max_seq_len"]:
        raise UsageError(f"{spec.sliding_window} is absurd", key="sliding_window")
    if not 0.0 < spec.norm_eps < 1.0:
        raise UsageError(f"{spec.norm_eps} is not within 0 < norm_eps < 1", key="norm_eps")
    if (spec.image is not None) != (spec.family == "alexnet"):
        text = f"family {spec.family} has {'no' if spec.image else 'an'} [model.image]"
        raise UsageError(text, key="image")
    if spec.image is not None:
        _check_image(spec, spec.image)
    else:
        _check_positions(spec)
        square = spec.kv_heads == spec.heads and spec.heads * spec.head_dim == spec.hidden
        if spec.has_biases and not square:
            text = f"family {spec.family} has kv_heads = heads = {spec.heads} and head_dim = hidden / heads"
            raise UsageError(text, key="kv_heads" if spec.kv_heads != spec.heads else "head_dim")
    for name, (nothing, families) in OF_FAMILIES.items():
        if getattr(spec, name) != nothing and spec.family not in families:
            raise UsageError(f"family {spec.family} has no {name}", key=name)


OF_FAMILIES = {  # field -> what says nothing, and the families that may say more
    "dropout": (0.0, ("gpt2", "alexnet")), "qkv_bias": (False, ("llama",)), "qk_norm": (False, ("llama",)),
    "latent": (None, ("llama",)), "rope_scaling": (None, ("llama",)), "rotary_pct": (1.0, ("gpt_neox",)),
    "parallel_residual": (False, ("gpt_neox",)), "gelu": ("tanh", ("gpt_neox",)),
}  # fmt: skip


def _check_positions(spec: ModelSizes) -> None:
    """What RoPE turns is whole pairs."""
    if not spec.rotates:
        return
    if not 0.0 < spec.rotary_pct <= 1.0:
        raise UsageError(f"{spec.rotary_pct} is not within 0 < rotary_pct <= 1", key="rotary_pct")
    if spec.latent is None and (spec.rope_dim % 2 or not spec.rope_dim):
        whole = spec.rotary_pct == 1.0
        text = f"RoPE turns pairs: {spec.rope_dim} of a head is no even number of 2 or more"
        raise UsageError(text, key="head_dim" if whole else "rotary_pct")
    if spec.rope_theta < 1.0:
        raise UsageError(f"{spec.rope_theta} is less than 1", key="rope_theta")


def _check_image(spec: ModelSizes, image: ImageSpec) -> None:
    """Layers are those of the image's; hidden units lie in its groups; nothing of a transformer's."""
    rules = (
        ("layers", spec.layers == image.layers, f"convolutions and dense make {image.layers}"),
        ("hidden", spec.hidden % image.groups == 0, f"a multiple of groups {image.groups}"),
        ("heads", spec.heads == 1, "an image model has no heads: 1"),
        ("max_seq_len", spec.max_seq_len == 1, "an image is one place of a sequence: 1"),
        ("tied", not spec.tied, "an image model ties nothing"),
        ("rope_scaling", spec.rope_scaling is None, "an image model has no positions"),
        ("sliding_window", not spec.sliding_window, "an image model has no attention"),
    )
    for name, holds, wanted in rules:
        if not holds:
            raise UsageError(f"{getattr(spec, name)}: {wanted}", key=name)


def check_latent(spec: ModelSizes) -> None:
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
            raise UsageError(f"{getattr(made, name)}: {wanted}", key=f"latent.{name}")
    if spec.kv_heads != spec.heads:
        text = f"{spec.kv_heads} differs from heads {spec.heads}: a latent makes keys of every head"
        raise UsageError(text, key="kv_heads")
    for name in ("qkv_bias", "qk_norm"):
        if getattr(spec, name):
            raise UsageError(f"a latent has no {name}", key=name)


EXPERT_FIELDS = {
    "top_k": 0, "expert_ffn_hidden": 0, "shared_experts": 0, "dense_layers": 0, "router_bias": False,
    "balance_loss": 0.0, "balance_over": "sequence", "z_loss": 0.0, "capacity_factor": None,
    "router_groups": 1, "shared_gate": False, "expert_every": 1,
}  # fmt: skip


def check_experts(spec: ModelSizes) -> None:
    """A model with experts says which; one without says nothing of them."""
    if not spec.experts:
        for name, nothing in EXPERT_FIELDS.items():
            if getattr(spec, name) != nothing:
                raise UsageError(f"{getattr(spec, name)} without experts", key=name)
        return
    if spec.family != "llama":
        raise UsageError(f"family {spec.family} has no experts", key="experts")
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
    for name, holds, wanted in rules:
        if not holds:
            raise UsageError(f"{getattr(spec, name)}: {wanted}", key=name)
    if inside and spec.top_k > top * (spec.experts // groups):
        text = (
            f"{spec.top_k} experts a token do not lie in {top} groups of {spec.experts // groups}"
        )
        raise UsageError(text, key="router_top_groups")

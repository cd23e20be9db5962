"""LoRA (Hu et al. 2021, arXiv 2106.09685): a linear y = W x becomes y = W x + (alpha / rank) B A x.

A and B are weights of the linear's own op, so that the rules of room.py lay them as they lay W:

                A                                B
    column      [rank, in], whole on tp; its     [out, rank], cut as W's rows
                gradient is partial over tp
    row         [rank, in], cut as W's columns   [out, rank], whole on tp; its gradient is partial over tp

A convolution's A is one of its kernel, stride and padding to `rank` maps, its B one of 1 x 1 (as peft's);
groups that see their own channels alone have an A each.

No region is added: what a row-parallel linear sends is W x + B A x, one partial sum. gate and up have an A
and a B each ([pair, ...]), and so has every expert ([experts, pair, ...]), where its W lies. Backward makes
h = A x again, so that nothing more is kept than x.

Dropout on what A reads draws masks by sample, position and element, again wherever they are wanted. Rows of
experts come from other ranks: there each row's `mark`, sample * seq + position, goes before it and is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

from partita.base.config import load_json
from partita.base.errors import UsageError
from partita.spec.model_sizes import ModelSizes
from partita.spec.program import Block, Dim, Op, Program, Tensor, rewrite

ADAPTER_CONFIG = "adapter_config.json"
GROUPS = ("experts", "pair")  # dims of a weight whose entries have an A and a B each
PREFIX = {
    "attention": "",
    "mlp": "",
    "experts": "expert_",
    "shared": "shared_",
    "dense": "",
    "conv": "",
    "embedding": "",  # an image model's first convolution
}  # segment -> of its targets
DEFAULT, DENSE = ("wq", "wv"), ("linear",)
A, B = "_lora_a", "_lora_b"
STAYS = "_lora_stays"  # a mask: of what A reads
BACKWARD = (3.0, 2.0)  # of A: h again, dA, its part of dx; of B: dB, dh


def wrong_lora(spec: ModelSizes) -> Iterator[tuple[str, str]]:
    """Key and text of rank, alpha, dropout and targets that cannot be."""
    if not spec.lora_rank:
        for key in ("lora_alpha", "lora_targets", "lora_dropout"):
            if getattr(spec, key):
                yield key, "has no meaning without lora_rank"
        return
    if not 1 <= spec.lora_rank <= spec.hidden:
        yield "lora_rank", f"{spec.lora_rank} is not within 1..{spec.hidden}"
    if not spec.lora_alpha > 0:
        yield "lora_alpha", f"{spec.lora_alpha} is not larger than 0"
    if not 0.0 <= spec.lora_dropout < 1.0:
        yield "lora_dropout", f"{spec.lora_dropout} is not within 0 <= p < 1"
    known = list(widths(spec))
    for target in (t for t in spec.lora_targets if t not in known):
        text = (
            f"'{target}' is no linear that LoRA adapts here; accepted: {', '.join(known) or 'none'}"
        )
        yield "lora_targets", text


def widths(spec: ModelSizes) -> dict[str, int]:
    """Every linear that LoRA adapts, by the name of its target -> rows and columns of all of them, in all
    layers, added up: what a rank of one costs."""
    if spec.image is not None:
        inputs = spec.image.dense_inputs(spec.hidden)[:-1]
        groups, maps = spec.image.groups, 0
        for i, c in enumerate(spec.image.convs):
            own = groups if i > 0 and not c.sources else 1
            maps += own * max(c.sources, 1) * c.channels * c.kernel**2 + groups * c.filters
        return {"linear": sum(n + spec.hidden for n in inputs), "kernel": maps}
    h, q, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    found = {"wq": h + q, "wk": h + kv, "wv": h + kv, "wo": h + q}
    if spec.latent is not None:
        made, heads = spec.latent, spec.heads
        found = {"q_a": h + made.q} if made.q else {}
        found |= {"kv_a": h + made.kv, "k_pe": h + made.rope, "wq": (made.q or h) + q}
        found |= {
            "wk": made.kv + heads * (spec.head_dim - made.rope),
            "wv": made.kv + heads * made.v,
        }
        found["wo"] = heads * made.v + h
    found = {name: spec.layers * n for name, n in found.items()}
    up, times = ("fc1", 1) if spec.has_biases else ("gate_up", 2)
    down, shared = "fc2" if spec.has_biases else "down", spec.shared_experts
    for before, number, width in (
        ("", spec.layers - spec.expert_layers, spec.ffn_hidden),
        ("shared_", spec.expert_layers * (shared > 0), shared * spec.expert_ffn_hidden),
        ("expert_", spec.expert_layers * spec.experts, spec.expert_ffn_hidden),
    ):
        if number:
            found[f"{before}{up}"] = number * times * (h + width)
            found[f"{before}{down}"] = number * (h + width)
    return found


def target_of(weight: str) -> str:
    """The target that a weight of a block is ('experts.down': expert_down); '' where it is none."""
    segment, _, last = weight.rpartition(".")
    return f"{PREFIX[segment]}{last}" if segment in PREFIX else ""


def adapt(program: Program, spec: ModelSizes) -> Program:
    """The program with A and B beside every target's weight."""
    if not spec.lora_rank:
        return program
    return program.map(lambda block: _adapt(block, spec))


def _adapt(block: Block, spec: ModelSizes) -> Block:
    rank = Dim("rank", spec.lora_rank)
    new: dict[str, Tensor] = {}
    marked = drops_rows(spec) and "sent" in block.tensors

    def change(op: Op) -> Iterable[Op]:
        if marked and op.name == "dispatch.send":
            rows = block.tensors[op.writes].dims[:1]
            new["marks"] = Tensor("marks", rows, "route")
            return (Op("dispatch.mark", "mark", op.reads[1:], "marks"), op)
        target = target_of(op.weights[0]) if op.weights else ""
        if op.kind not in ("linear", "conv") or target not in spec.lora_targets:
            return (op,)
        w = block.tensors[op.weights[0]]
        seen = {d.name for d in block.tensors[op.reads[0]].dims}  # groups that see themselves alone
        out = tuple(d for d in w.dims if d.name not in op.sums)
        groups = tuple(d for d in out if d.name in GROUPS or d.name in seen)
        inputs = tuple(d for d in w.dims if d.name in op.sums)
        free = tuple(d for d in op.space if d not in w.dims)
        a = Tensor(f"{w.name}{A}", (*groups, rank, *inputs), "weight")
        b = Tensor(f"{w.name}{B}", (*out, rank), "weight")
        new.update({a.name: a, b.name: b})
        folded = {name for d in free for name in d.of}  # rows of experts are their experts' too
        extra = tuple(
            ((*free, *(d for d in t.dims if d.name not in folded)), factor)
            for t, factor in zip((a, b), BACKWARD, strict=True)
        )
        op = replace(op, weights=(w.name, a.name, b.name), extra=extra)
        if spec.lora_dropout:
            drawn = f"{w.name}{STAYS}"
            new[drawn] = Tensor(drawn, block.tensors[op.reads[0]].dims, "mask")
            op = replace(op, scratch=(*op.scratch, drawn))
        if marked and folded:
            op = replace(op, reads=(*op.reads, "marks"), saves=(*op.saves, "marks"))
        return (op,)

    block = rewrite(block, change, new)
    return replace(block, kept=block.kept | {"marks"}) if marked else block


def drops_rows(spec: ModelSizes) -> bool:
    """Whether adapters of experts drop elements of the rows they read."""
    return spec.lora_dropout > 0 and any(t.startswith("expert_") for t in spec.lora_targets)


_FUSED = {"fc1": ("dense_h_to_4h",), "fc2": ("dense_4h_to_h",)}
PEFT = {  # the modules of transformers that a target is
    "llama": {
        "wq": ("q_proj",), "wk": ("k_proj",), "wv": ("v_proj",), "wo": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",),
    },
    "latent": {
        "q_a": ("q_a_proj",), "wq": ("q_b_proj",), "wo": ("o_proj",), "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
    },
    "gpt2": {"wo": ("attn.c_proj",), "fc1": ("mlp.c_fc",), "fc2": ("mlp.c_proj",)},
    "gpt_neox": {"wo": ("attention.dense",), **_FUSED},
    "bloom": {"wo": ("self_attention.dense",), **_FUSED},
    "bert": {  # fc2 has the end of wo's name, by which peft knows it
        "wq": ("query",), "wk": ("key",), "wv": ("value",), "wo": ("attention.output.dense",),
        "fc1": ("intermediate.dense",),
    },
}  # fmt: skip


def _modules(spec: ModelSizes) -> dict[str, tuple[str, ...]]:
    """Modules of this model that peft adapts by themselves; of a layer with experts not its mlps, which have
    the experts' names."""
    if spec.latent is None:
        found = PEFT[spec.family]
    else:
        found = PEFT["latent"] | ({} if spec.latent.q else {"wq": ("q_proj",)})
    held = ("gate_up", "down") if spec.experts else ()
    if spec.layout:  # where they share one matrix
        held = (*held, "wq", "wk", "wv", "gate_up")
    return {target: modules for target, modules in found.items() if target not in held}


NEUTRAL = {  # fields of peft that must say that nothing else is there
    "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "bias": "none",
    "lora_bias": False, "layers_to_transform": None, "layer_replication": None, "exclude_modules": None,
}  # fmt: skip


def peft_config(spec: ModelSizes, base: str) -> dict[str, Any]:
    """adapter_config.json. Raises UsageError for targets that peft has not as modules of their own."""
    modules: list[str] = []
    known = _modules(spec)
    for target in spec.lora_targets:
        if target not in known:
            text = (
                f"{target} is no module of transformers by itself that peft could adapt alone; "
                f"{', '.join(known)} are: the merged folder has it"
            )
            raise UsageError(text, key="lora_targets")
        modules += known[target]
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM" if spec.causal else None,
        "base_model_name_or_path": base, "r": spec.lora_rank,
        "lora_alpha": spec.lora_alpha, "target_modules": modules, "fan_in_fan_out": spec.family == "gpt2",
        "use_rslora": False, "inference_mode": True, "init_lora_weights": True, **NEUTRAL,
        "lora_dropout": spec.lora_dropout,
    }  # fmt: skip


def adapter_fields(folder: Path) -> dict[str, Any]:
    """lora_rank, lora_alpha and lora_targets of an adapter_config.json. Raises UsageError, naming the field,
    for what is not plain LoRA."""
    path = folder / ADAPTER_CONFIG
    try:
        config = load_json(path)
    except UsageError as error:
        error.key = "model.adapter"
        raise
    if config.get("peft_type") != "LORA":
        raise _unlike(path, "peft_type", config.get("peft_type"), "LORA")
    for key, only in NEUTRAL.items():
        value = config.get(key, only)
        if value != only and (value or only):
            raise _unlike(path, key, value, only)
    modules, rank = config.get("target_modules"), config.get("r")
    if not isinstance(modules, list) or not isinstance(rank, int):
        raise _unlike(path, "target_modules", modules, "a list of modules, with r a whole number")
    left, targets = set(modules), []
    for family in PEFT.values():
        for target, theirs in family.items():
            if left.issuperset(theirs):
                targets.append(target)
                left -= set(theirs)
    if left:
        raise _unlike(path, "target_modules", sorted(left)[0], "linears of a layer, gate with up")
    scale = sqrt(rank) if config.get("use_rslora") else 1.0
    alpha = float(config.get("lora_alpha", rank)) * scale
    found = {"lora_rank": rank, "lora_alpha": alpha, "lora_targets": targets}
    drops = float(config.get("lora_dropout") or 0.0)
    return found | ({"lora_dropout": drops} if drops else {})


def _unlike(path: Path, key: str, value: object, only: object) -> UsageError:
    return UsageError(f"{path}: {key} is {value!r}; read is {only!r}", file=str(path), key=key)


def is_adapter(name: str) -> bool:
    """Whether a weight is an A or a B."""
    return name.endswith((A, B))

"""What pages hold of a token: keys and values of a rank's heads, or latents; and what a page takes."""

from __future__ import annotations

from partita.parallel.laid import Laid
from partita.parallel.read import BYTES
from partita.spec.model import ModelSpec


def keeps_latents(spec: ModelSpec) -> bool:
    """Whether pages hold latents: else, where adapters stand beside what makes keys, every head's."""
    return spec.latent is not None and not spec.lora_rank


def kept_shapes(spec: ModelSpec, laid: Laid) -> tuple[tuple[int, int], tuple[int, int]]:
    """(kv heads here, dim) of a token's keys and of its values in one layer."""
    if spec.latent is not None and keeps_latents(spec):
        return (1, spec.latent.kv + spec.latent.rope), (1, 0)  # values are a part of the keys
    block = next(
        b
        for s in laid.stages
        for n, b in zip(s.names, s.blocks, strict=True)
        if n.startswith("blocks.")
    )
    core = next(op for op in block.ops() if op.name == "attention.core")
    found = []
    for name in core.reads[1:3]:
        dims = {d.name: d.local(laid.sizes) for d in block.tensors[name].dims}
        found.append(dims)
    heads = found[0]["kv_heads"] if "kv_heads" in found[0] else found[0]["heads"]
    return (heads, spec.head_dim), (heads, spec.v_dim)


def token_bytes(laid: Laid) -> int:
    """Of a token's keys and values in one layer of a rank."""
    keys, values = kept_shapes(laid.request.model, laid)
    return keys[0] * (keys[1] + values[1]) * BYTES[laid.request.plan.precision.dtype]


def layers_at(laid: Laid, stage: int) -> int:
    """Layers of a stage."""
    return sum(n.startswith("blocks.") for n in laid.stages[stage].names)


def page_bytes(laid: Laid, page_size: int) -> int:
    """Of one page on the rank that has the most layers."""
    layers = max(layers_at(laid, i) for i in range(len(laid.stages)))
    return layers * page_size * token_bytes(laid)

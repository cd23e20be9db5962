"""Precision (Micikevicius et al. 2018): which dtype each role has.

    plan   compute, activations, working weights   gradients   masters   optimizer, loss, statistics
    fp32   fp32                                    fp32        -         fp32
    bf16   bf16                                    fp32        fp32      fp32
    fp16   fp16, the loss scaled (scaler.py)       fp32        fp32      fp32
    fp8    bf16, matmuls of fp8 inputs (fp8.py)    fp32        fp32      fp32
    fp64   fp64 everywhere (for proofs)

bf16 AdamW is 2 + 4 + 4 + 8 = 18 bytes a parameter: gradients are accumulated and reduced in fp32. Where
ZeRO 3 cuts the working weights they are made from the masters as they are gathered: 16. With
`precision.rounding=stochastic` (not of fp32) it is 14: weights are their own masters, an update is made in
fp32 and rounded up or down at random (train/optimizer/stochastic.py); under fp64 they are so too, in fp64.
"""

from __future__ import annotations

from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.room import Request, error
from partita.spec.program import Block, Dim, Program, Tensor

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "bool": 1, "int64": 8, "": 0}


def problems(job: Request) -> list[Problem]:
    """Rounding where there is nothing to round."""
    plan = job.plan
    if plan.precision.rounding == "nearest" or plan.precision.dtype != "fp32":
        return []
    nearest = str(plan.with_("precision", rounding="nearest"))
    asked, limit = "precision.rounding=stochastic", "bf16, fp16 or fp8 (fp64 for proofs)"
    message = "weights of fp32 are as wide as their update: nothing is left to round at random"
    return [error("precision", "rounding", message, asked=asked, limit=limit, nearest=nearest)]


def dtypes(dtype: str) -> dict[str, str]:
    """Role -> dtype. fp8 is of matmuls: what they read and write is stored in bf16."""
    dtype = "bf16" if dtype == "fp8" else dtype
    wide = "fp64" if dtype == "fp64" else "fp32"
    return {
        "value": dtype, "data": dtype, "weight": dtype, "parameter": dtype, "whole_parameter": dtype,
        "stat": wide, "constant": wide, "gradient": wide, "whole_gradient": wide, "optimizer": wide,
        "aux": wide, "route": "int64", "told": "",
        "mask": "bool", "label": "bool", "index": "int64", "buffer": "", "count": "int64", "sum": "fp64",
    }  # fmt: skip


def is_before(name: str) -> bool:
    """Whether a tensor is what an update leaves of before."""
    return name.endswith((".before", ".before_parameter"))


def _before(job: Request, block: Block) -> dict[str, Tensor]:
    """What is kept where an update may be undone, by name. Beside an optimizer's states: these again, the
    master, and under a loss scale, which an update on the device takes out of it, the gradient. Beside
    weights that are their own masters: these."""
    plan, found = job.plan, {}
    if not plan.pipeline.post_validation:
        return found
    alone = plan.precision.rounding == "stochastic"
    for name, t in block.tensors.items():
        if t.role != "optimizer":
            continue
        unit = name.removesuffix(".optimizer")
        here = {t.arena, block.tensors[f"{unit}.gradient"].arena} == {"device"}
        scaled = plan.precision.dtype == "fp16" and here
        count = Dim("words", job.state_words + (not alone) + scaled)
        before = replace(t, name=f"{unit}.before", dims=(count, t.dims[-1]))
        found |= {before.name: before} if count.size else {}
        if alone:
            like = block.tensors[f"{unit}.parameter"]
            kept = replace(t, name=f"{unit}.before_parameter", dims=t.dims[-1:])
            found[kept.name] = replace(kept, dtype=like.dtype, arena=like.arena)
    return found


def lay(job: Request, program: Program) -> Program:
    """Fills every tensor's dtype in; low precision adds a master word to the optimizer's (not where it
    rounds at random), and so does states or working weights that lie elsewhere. Then what is kept to undo an
    update. Cut working weights beside masters, both on the device, are not stored."""
    table = dtypes(job.plan.precision.dtype)
    p = job.plan.precision
    narrow = p.dtype not in ("fp64", "fp32") and p.rounding == "nearest"

    def words(block: Block, t: Tensor) -> Tensor:
        if t.role != "optimizer":
            return t.typed(table[t.role])
        working = block.tensors[f"{t.name.removesuffix('.optimizer')}.parameter"]
        apart = p.rounding == "nearest" and {t.arena, working.arena} != {"device"}
        masters = narrow or apart
        count = Dim("words", job.state_words + masters)
        return replace(t, dims=(count, *t.dims[-1:]), dtype=table[t.role])

    def stored(t: Tensor, block: Block) -> bool:
        states = block.tensors.get(f"{t.name.removesuffix('.parameter')}.optimizer")
        apart = t.role != "parameter" or not t.axes() or states is None
        return apart or not narrow or {states.arena, t.arena} != {"device"}

    def one(block: Block) -> Block:
        typed = replace(block, tensors={n: words(block, t) for n, t in block.tensors.items()})
        kept = {n: t for n, t in typed.tensors.items() if stored(block.tensors[n], block)}
        return replace(block, tensors={**kept, **_before(job, typed)})

    step = {n: replace(t, dtype=table[t.role]) for n, t in program.tensors.items()}
    return replace(program.map(one), tensors=step)

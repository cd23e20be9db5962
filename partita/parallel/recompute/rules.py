"""Recomputation (Chen et al. 2016; selective: Korthikanti et al. 2022): a layer keeps less, and backward
makes the rest again.

    full       keeps a layer's input alone
    selective  drops what the named modules make:  core  the softmax, its mask and dropout, whose output the
                                                         projection behind it keeps
                                                   norm  what a norm hands to the linears behind it
                                                   act   what the activation hands to the linear behind it
    every=k    only layers 0, k, 2k, ...

What that makes backward run again, regions too, is read off the program (read.replayed): what lies
between kept and saved tensors, so the last matmul of a block and its reduction are not replayed.
`collectives=keep` keeps what replayed regions brought: memory for traffic. Of what one op reads and nobody
saves it keeps what the op makes of it, where that is less:

    ring, all_gather   not the shares of all ranks, but attention's output and its log-sum-exp, which backward
                       wants; attention is not run again either. Probabilities made whole, with dropout, are
                       the larger: then the keys that came
    gather_picks       not what all ranks' tokens chose, but which rows of this rank's are admitted
    counts             numbers of rows: the host has them
"""

from __future__ import annotations

from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.read import replayed
from partita.parallel.room import Request, error
from partita.spec.plan import RecomputePlan
from partita.spec.program import Block, Op, Program

# regions whose results `keep` keeps, and those of which it keeps what is made of them
REMEMBERED = (
    "reduce_from", "gather_from", "scatter_to", "halo", "gather_map", "exchange", "all_to_all",
    "gather_rows", "scatter_rows",
)  # fmt: skip
USED = ("ring", "all_gather", "gather_picks")


def problems(job: Request) -> list[Problem]:
    """Any layer can be made again; a warning where nothing is: attention without dropout is one kernel, which
    keeps no number of a query and a key, and images have no attention."""
    r, model = job.plan.recompute, job.model
    if r.mode != "selective" or set(r.modules) - {"core"}:
        return []
    if model.dropout and model.image is None:
        return []
    text = (
        "recompute:selective changes nothing: the attention core keeps what would be made again only where "
        "the model has dropout; recompute.modules=norm,act, or recompute:full, drops more"
    )
    less = {"mode": "full"} if model.image is not None else {"modules": ("norm", "act")}
    near = job.plan.with_("recompute", **less)
    facts = {"asked": "recompute:selective", "limit": "dropout > 0", "nearest": str(near)}
    return [error("recompute", "core", text, severity="warning", **facts)]


def lay(job: Request, program: Program) -> Program:
    """Says what is kept, nothing else."""
    r = job.plan.recompute
    if r.mode == "none":
        return program
    done: dict[int, Block] = {}
    blocks, layer = [], 0
    for block in program.blocks:
        if block.name in ("embedding", "head"):
            blocks.append(block)
            continue
        if layer % r.every == 0:
            if id(block) not in done:
                done[id(block)] = _less(block, r)
            blocks.append(done[id(block)])
        else:
            blocks.append(block)
        layer += 1
    return replace(program, blocks=tuple(blocks))


def _less(block: Block, r: RecomputePlan) -> Block:
    kept = frozenset({block.input}) if r.mode == "full" else _selective(block, r.modules)
    block = block.keeping(kept)
    return _remember(block) if r.collectives == "keep" else block


def _selective(block: Block, modules: tuple[str, ...]) -> frozenset[str]:
    """Kept but for what a norm or an activation writes, and what of the core has a number for every pair
    of a query and a key. Flash attention makes no such thing, and what it begins with stays: norms of heads
    that no RoPE stands behind."""
    core = [op for op in block.ops() if op.cheap] if "core" in modules else []
    made = {t for op in core for t in (op.writes, *op.saves)}
    dropped = {t for t in made if any(d.name == "keys" for d in block.tensors[t].dims)}
    begun = {t for op in block.ops() if op.kind == "attention" for t in op.saves}
    dropped |= {op.writes for op in block.ops() if _module(op) in modules} - begun
    return block.kept - dropped


def _module(op: Op) -> str:
    return "norm" if op.kind == "norm" else "act" if op.name.endswith(".act") else ""


def _remember(block: Block) -> Block:
    """Adds the results of replayed regions, those that a shorter replay still wants."""
    again = [op for op in replayed(block) if op.events]
    brought = {op.writes for op in again if op.kind in REMEMBERED}
    for op in again:
        if op.kind in USED:
            brought |= _made_of(block, op.writes)
    told = {op.writes for op in again if op.kind == "counts"}
    shorter = block.keeping(block.kept | brought)
    wanted = {t for op in replayed(shorter) for t in op.reads}
    wanted |= {t for op in block.ops() for t in op.saves}
    return block.keeping(block.kept | (brought & wanted) | told)


def _made_of(block: Block, x: str) -> set[str]:
    """What the op that reads x makes of it; x itself, where it makes a number for every query and key."""
    reader = next(op for op in block.ops() if x in op.reads)
    written = {op.writes for op in block.ops()}
    made = {reader.writes, *(t for t in reader.saves if t not in written)}
    return {x} if any(d.name == "keys" for t in made for d in block.tensors[t].dims) else made

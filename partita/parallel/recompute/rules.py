"""Recomputation (Chen et al. 2016): a layer keeps less, and backward makes the rest again.

`full` keeps a layer's input alone. What that makes backward run again, regions too, is read off the
program (read.replayed): what lies between kept and saved tensors, so the last matmul of a block and
its reduction are not replayed.
"""

from __future__ import annotations

from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.room import Request, error
from partita.spec.program import Block, Program

MODES = ("none", "full")


def problems(job: Request) -> list[Problem]:
    """The modes that exist."""
    r = job.plan.recompute
    if r.mode in MODES and r.every == 1:
        return []
    asked = f"recompute:{r.mode}" + (f" recompute.every={r.every}" if r.every > 1 else "")
    message = (
        f"{asked} is not available in this version: recompute:none or recompute:full, every block"
    )
    nearest = str(job.plan.with_("recompute", mode="full", every=1))
    return [
        error("recompute", "mode", message, asked=asked, limit=", ".join(MODES), nearest=nearest)
    ]


def lay(job: Request, program: Program) -> Program:
    """Says what is kept, nothing else."""
    if job.plan.recompute.mode != "full":
        return program

    def full(block: Block) -> Block:
        layer = block.name not in ("embedding", "head")
        return replace(block, kept=frozenset({block.input})) if layer else block

    return program.map(full)

"""The split of a convolutional model's channels (Krizhevsky et al. 2012, fig. 2): groups lie on split.

    conv 1    every rank makes its groups' channels of the whole image
    conv 2    reads and makes its own groups: nothing moves
    conv 3    joins: each rank gathers all channels; backward sums and scatters their gradient
    dense     the same, of units
    classes   each rank's units add to every class: their partial sums are added up, the loss is whole

An op that must see a tensor whole along groups (`join`) hands on its rank's share, and a region behind it
gathers the others'. The whole is what backward keeps: nothing is gathered twice. The rest is the rule of
sums (room.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.room import (
    Request,
    cut_everywhere,
    cut_tensor,
    error,
    gather_from,
    sum_rule,
)
from partita.spec.program import Block, Op, Program, Tensor, rewrite

LACKS = {  # what an axis cuts, and no convolutional model has
    "ep": "no experts to lie on ep",
}


def problems(job: Request) -> list[Problem]:
    """split divides the groups of a model that has some; such a model has no sequence and no experts."""
    mesh, image = job.plan.mesh, job.model.image
    ways = mesh.split
    if image is None:
        if ways == 1:
            return []
        message = f"split{ways} cuts channels, and family {job.model.family} has none"
        nearest = str(job.plan.with_("mesh", split=1))
        return [
            error(
                "split", "channels", message, asked=f"split{ways}", limit="split1", nearest=nearest
            )
        ]
    found = []
    if image.groups % ways:
        fits = [n for n in range(1, image.groups + 1) if image.groups % n == 0]
        near = max(n for n in fits if n <= ways)
        message = (
            f"{image.groups} groups of channels cannot lie on {ways} ranks: split may be "
            + ", ".join(map(str, fits))
        )
        nearest = str(job.plan.with_("mesh", split=near))
        limit = f"split in {', '.join(map(str, fits))}"
        found.append(
            error("split", "groups", message, asked=f"split{ways}", limit=limit, nearest=nearest)
        )
    other = [a for a in LACKS if getattr(mesh, a) > 1]
    if other:
        asked = " ".join(f"{a}{getattr(mesh, a)}" for a in other)
        message = f"{asked}: a convolutional model has " + ", ".join(LACKS[a] for a in other)
        nearest = str(job.plan.with_("mesh", ep=1, etp=1))
        found.append(error("split", "axes", message, asked=asked, limit="no ep", nearest=nearest))
    return found


def lay(job: Request, program: Program) -> Program:
    """Cuts groups; nothing moves at split 1."""
    if job.plan.mesh.split == 1:
        return program
    return program.map(
        lambda b: sum_rule(_joined(cut_everywhere(b, ("groups",), "split")), "split")
    )


def _joined(block: Block) -> Block:
    """Behind what must be whole along groups, a region that gathers it."""
    new: dict[str, Tensor] = {}

    def change(op: Op) -> Iterable[Op]:
        must = [x for x, dim in op.whole if dim == "groups" and "split" in block.tensors[x].axes()]
        if not must:
            return (op,)
        y = op.writes
        share = f"{y}/split"
        new[share] = replace(cut_tensor(block.tensors[y], ("sources",), "split"), name=share)
        own = replace(op, writes=share, whole=())
        return own, gather_from(op.name, ("split",), share, y, again=False)

    return rewrite(block, change, new)

"""Which of a user's words leaves no plan at all, and what there is instead."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from partita.planner.search.uneven import FEW, UnevenSpace
from partita.planner.space import SCHEDULES, VIRTUAL, Space, Words
from partita.spec.mesh import divisors

NONE_LEGAL = "no plan is legal under these words"
SEARCHED = (*SCHEDULES, *VIRTUAL, "chimera", "v_<num>_<den>")
SIZES = ("pp", "dp", "cp", "tp")
SAID = {  # fields that a plan's line has under other words
    "groups": "split", "num_microbatches": "microbatches", "dtype": "precision", "zero": "ZeRO stage",
    "virtual": "stages a rank", "ulysses": "ranks of ulysses", "method": "way to cut sequences",
}  # fmt: skip


def which(space: Space) -> str:
    """Which of the words leaves no plan by itself, and what there is instead; or which two of them; or the
    stated size of a microbatch."""
    found, micro = [], space.job.train.micro_batch_size
    if micro is not None and not leaves(space, Words()):
        return f": micro_batch_size {micro} divides no replica's part of {space.batch:,} sequences"
    for name, value in space.words.fixed:
        if leaves(space, Words(((name, value),))):
            continue
        there = ", ".join(map(str, _known(space, name)))
        found.append(
            f"none has {_said(name)} {value}" + (f" (there may be {there})" if there else "")
        )
        if name in ("dp", "num_microbatches"):
            found[-1] += f": dp times microbatches divides {space.batch:,} sequences"
    words = [(f"{_said(n)} {v}", Words(((n, v),))) for n, v in space.words.fixed]
    words += [
        (f"no {_said(n)} {v or ''}".strip(), Words((), ((n, v),))) for n, v in space.words.forbidden
    ]
    for (one, a), (other, b) in combinations(() if found else words, 2):
        if not leaves(space, Words(a.fixed + b.fixed, a.forbidden + b.forbidden)):
            found.append(f"none has {one} and {other}")
    return ": " + "; ".join(found) if found else ""


def _said(name: str) -> str:
    return SAID.get(name, name)


def leaves(space: Space, words: Words) -> bool:
    """Whether plans are left under other words."""
    return any(there.leaves(mesh) for there in _spaces(space, words) for mesh in there.meshes())


def _spaces(space: Space, words: Words) -> list[Space]:
    """Those of the balanced split, and on few devices of the others."""
    there = Space(space.job, words, space.dtype)
    wanted = space.job.cluster.devices <= FEW and words.admit("split", "uneven")
    return [there, UnevenSpace(there)] if wanted else [there]


def _known(space: Space, name: str) -> Sequence[object]:
    """What a field may hold at all."""
    if name == "schedule":
        return SEARCHED
    meshes = _spaces(space, Words())[-1].meshes
    if name == "num_microbatches":
        return sorted({n for dp in {m.dp for m in meshes()} for n in divisors(space.batch // dp)})
    return sorted({getattr(m, name) for m in meshes()}) if name in SIZES else ()

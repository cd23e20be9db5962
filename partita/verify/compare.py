"""Holds what ranks saw against the judge, by a table of bounds.

    precision  loss, norm        tensor: max|a-b| / max|judge| (floor: share of the gradient norm)
    fp64       1e-11             1e-9    (1e-12)
    fp32       1e-5, 1e-4        1e-3    (1e-6)     sums of up to 1e5 terms in another order
    bf16       2e-2, 5e-2        0.2     (1e-2)     8 bits: every cast may fall the other way
    fp16       4e-3, 1e-2        0.04    (2e-3)     11 bits
    fp8        1e-2, 3e-2        0.6     (5e-2)     e5m2 gradients have 2 bits: neighbours are 25 % apart

Weights after AdamW steps are held in units of its learning rate at low precision: it divides by the
gradient's own size, so that a rounding of a tiny gradient may turn a whole step. A step that overflowed in
fp16 must have done so on both sides; its gradients are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from partita.spec.job import Job
from partita.verify.runs import RankSeen, StepSeen


@dataclass(frozen=True)
class Bound:
    """Relative bounds of one precision."""

    loss: float
    norm: float
    tensor: float
    floor: float


BOUNDS = {
    "fp64": Bound(1e-11, 1e-11, 1e-9, 1e-12),
    "fp32": Bound(1e-5, 1e-4, 1e-3, 1e-6),
    "bf16": Bound(2e-2, 5e-2, 0.2, 1e-2),
    "fp16": Bound(4e-3, 1e-2, 0.04, 2e-3),
    "fp8": Bound(1e-2, 3e-2, 0.6, 5e-2),
}
ADAM_STEPS = 4.2  # learning rates a weight may be off after two steps: one up here, one down there


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one kind, and where; `bad` where it exceeds its bound."""

    kind: str  # loss, auxiliary, grad_norm, gradients, weights
    name: str = ""
    rank: int = -1
    step: int = 0
    relative: float = 0.0
    bad: bool = False


def relative(a: float, b: float) -> float:
    """|a - b| / |b|; 0 where neither is finite."""
    if not math.isfinite(a) and not math.isfinite(b):
        return 0.0
    return abs(a - b) / abs(b) if b else abs(a)


def differences(judge: list[StepSeen], ranks: Iterable[RankSeen], job: Job) -> list[Difference]:
    """The worst of each kind; the first bad one, by step, where there is one."""
    bound = BOUNDS[job.plan.precision.dtype]
    found: list[Difference] = []
    for seen in ranks:
        for i, (mine, want) in enumerate(zip(seen.steps, judge, strict=True)):
            found += _scalars(mine, want, bound, seen.rank, i)
            finite = math.isfinite(want.norm)
            scale = bound.floor * want.norm if finite else 0.0
            if finite:
                found += _tensors(
                    "gradients", mine.gradients, want.gradients, (bound.tensor, scale), seen.rank, i
                )
            low = job.plan.precision.dtype != "fp64" and job.train.optimizer == "adamw"
            slack = ADAM_STEPS * job.train.lr if low else 0.0
            limits = (bound.tensor, max(scale * job.train.lr, slack))
            found += _tensors("weights", mine.weights, want.weights, limits, seen.rank, i)
    worst: dict[str, Difference] = {}
    for d in found:
        best = worst.get(d.kind)
        if best is None or (d.bad, -d.step, d.relative) > (best.bad, -best.step, best.relative):
            worst[d.kind] = d
    return list(worst.values())


def _scalars(
    mine: StepSeen, want: StepSeen, bound: Bound, rank: int, step: int
) -> list[Difference]:
    loss, norm = relative(mine.loss, want.loss), relative(mine.norm, want.norm)
    pairs = zip(mine.auxiliary, want.auxiliary, strict=True)
    aux = max((relative(a, b) for a, b in pairs), default=0.0)
    return [
        Difference("auxiliary", "auxiliary", rank, step, aux, not aux <= bound.loss),
        Difference("loss", "loss", rank, step, loss, not loss <= bound.loss),
        Difference("grad_norm", "grad_norm", rank, step, norm, not norm <= bound.norm),
    ]


def _tensors(
    kind: str,
    mine: dict,
    want: dict[str, Tensor],
    limits: tuple[float, float],
    rank: int,
    step: int,
) -> list[Difference]:
    """Every box against the judge's; a limit is relative to the tensor's largest element, or absolute."""
    found = []
    tolerance, floor = limits
    for name, boxes in mine.items():
        largest = float(want[name].abs().max())
        for box, values in boxes:
            part = want[name][tuple(slice(a, b) for a, b in box)]
            off = float((values - part).abs().max())
            bad = not off <= max(tolerance * largest, floor)
            found.append(Difference(kind, name, rank, step, off / largest if largest else off, bad))
    return found

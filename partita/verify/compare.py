"""Holds what ranks saw against the judge, by a table of bounds.

    precision  loss, norm        tensor: max|a-b| / max|judge| (floor: share of the gradient norm)
    fp64       1e-11             1e-9    (1e-12)
    fp32       1e-5, 1e-4        1e-3    (1e-6)
    bf16       1e-2, 3e-2        0.1     (1e-2)
    fp16       4e-3, 1e-2        0.04    (2e-3)
    fp8        1e-2, 4e-2        0.6     (5e-2)     e5m2 gradients have 2 bits: neighbours are 25 % apart

At low precision the judge starts each step from the plan's own weights: left to its own, AdamW's first
update, a step of lr whichever way a rounding turns a tiny gradient, put a bf16 gradient of the second step
off by 0.13 of its largest element (with experts 0.28, fp8 0.85); started alike, by 0.02 (0.02, 0.2), as in
the first. So what casts and orders of sums can do is known better in every step; not for fp8, nor with
images, where a rounding turns a ReLU or another pixel is the largest of its window (a tensor's bound is 0.2
there below fp32), nor under delayed updates. Where a rounding sends a token to another expert, the judge
sends it there too (routing.py): that is a step, not a slope, and put a gradient off by 0.69 of its largest.
A gradient has come through n roundings of relative size u (bf16 2^-9, fp16 2^-12, fp32 2^-24), 12 a
layer where matmuls are low and all else is fp32, four times as many where all is; they add up like a random
walk to s = u sqrt(n). The largest element may be off by 7 s, the tensor's 2-norm by 4 s, and its *scale*, the
projection of the difference on the judge's gradient, in which roundings average out, by
s (1 + 4 / sqrt(elements)): a gradient times 1.02 is seen in bf16. Over both families, 3 to 12 layers and
2 to 16 ranks 3.4 s, 2.7 s and 0.7 of the last were measured. Tensors that are only rounding (a key's bias)
have a floor of 0.003 s of the norm.
At some weights the walk is too short: a norm of heads divides by the size of a few numbers, and a token in
which those almost cancel weighs most and is rounded worst. A gradient beyond the walk is held to the judge
itself at neighbouring weights (runs.neighbours), SPREAD times the root mean square of how far it lies there.
So is whatever is beyond the table: losses and norms, gradients where the table alone holds, and weights under
delayed updates, where AdamW turned a rounding into a whole step of an update before, or a ReLU went the other
way for the one picture that a bias's gradient is of.

Weights at low precision are held to what the judge's optimizer makes of the plan's own gradients: exact up to
fp32, where the judge's gradients would leave AdamW a whole step of freedom; and what is computed with, to
its masters rounded to nearest, on the rank itself. Under delayed updates, where the
judge goes its own way from the first update on, the table holds for all. A step that overflowed in fp16 must
have done so on both sides; its gradients are not looked at. A product near fp16's largest number, or a rank's
part of it, may lie on either side: where all ranks say one thing and the judge the other, they are held to
the judge at half or twice the loss scale, if that says as they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from partita.spec.job import Job
from partita.spec.layout import Box
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
    "bf16": Bound(1e-2, 3e-2, 0.1, 1e-2),
    "fp16": Bound(4e-3, 1e-2, 0.04, 2e-3),
    "fp8": Bound(1e-2, 4e-2, 0.6, 5e-2),
}
ROUNDING = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-12}
ROUNDINGS_A_LAYER = {"fp32": 48, "bf16": 12, "fp16": 12}
DELAYED = {  # as above; of one microbatch, behind twelve updates: 0.11 of a norm was seen in fp8
    "bf16": Bound(2e-2, 0.1, 0.2, 1e-2), "fp8": Bound(1e-2, 0.2, 0.6, 5e-2),
}  # fmt: skip
TURNED = 0.2  # of a tensor's largest element: what one ReLU, or another largest pixel, changes
ENOUGH, FEW = 16, 0.5  # elements, and the share of them that bf16 holds: fp32's sums are told apart
NEAR_IN_FP8 = 0.1  # of a router's score, at most 1, where s is not known; 6e-4 was seen
SPREAD = 4.0  # times the judge's own at neighbouring weights; 3.1 is the most of 50 trials beyond the walk
NOTHING = 2.0**-50  # of the loss: what roundings leave in fp64 of gradients that are zero
UPDATE = 2e-6  # of a tensor's largest element: fp32, a handful of operations
NEIGHBOUR = 2.0**-7  # of a bf16 number: its neighbours lie as close, or closer
OTHERS = 1e-3  # of a tensor's elements: fp32 sees 2^-16 of the way between two neighbours
UPDATE_LR = 1e-4  # of the learning rate: AdamW's quotient of two fp32 numbers


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one kind, and where; `bad` where it exceeds its bound."""

    kind: str  # loss, auxiliary, grad_norm, gradients, weights
    name: str = ""
    rank: int = -1
    step: int = 0
    relative: float = 0.0
    bad: bool = False


def relative(a: float, b: float, least: float = 0.0) -> float:
    """|a - b| / |b|; 0 where neither is finite or they are `least` apart, inf where one is not."""
    if not math.isfinite(a) or not math.isfinite(b):
        return 0.0 if math.isfinite(a) == math.isfinite(b) else math.inf
    if abs(a - b) <= least:
        return 0.0
    return abs(a - b) / abs(b) if b else abs(a)


def differences(
    judge: list[StepSeen],
    ranks: Iterable[RankSeen],
    job: Job,
    delayed: bool = False,
    neighbours: Sequence[list[StepSeen]] = (),
    scaled: Sequence[list[StepSeen]] = (),
) -> list[Difference]:
    """The worst of each kind; the first bad one, by step, where there is one. `delayed`: a step has several
    updates, and the judge made its own. `neighbours`: the judge's runs at neighbouring weights, in which
    delayed updates go their own way as well. `scaled`: its runs at other loss scales."""
    ranks = list(ranks)
    judge = _overflowing_alike(judge, ranks, scaled)
    dtype = job.plan.precision.dtype
    bound, low = BOUNDS[dtype], dtype != "fp64"
    bound = DELAYED.get(dtype, bound) if delayed else bound
    first = walk_of(job, delayed)
    if _turns(job) and dtype not in ("fp64", "fp32"):
        bound = replace(bound, tensor=max(bound.tensor, TURNED))
    found: list[Difference] = []
    for seen in ranks:
        for i, (mine, want) in enumerate(zip(seen.steps, judge, strict=True)):
            tight, u = first > 0, ROUNDING.get(dtype, 0.0)
            near = [n[i] for n in neighbours if math.isfinite(n[i].norm)]
            scalars = (8 * u, 16 * u) if tight else (bound.loss, bound.norm)
            found += _scalars(mine, want, scalars, near, seen.rank, i)
            nothing = 0.0 if low else NOTHING * abs(want.loss)
            if not low:  # else a rounding may send a token elsewhere
                found.append(_loads(mine, want, seen.rank, i))
            others = [n.gradients for n in near]
            if math.isfinite(want.norm) and tight:
                found += _close_gradients(mine.gradients, want, others, first, seen.rank, i)
                if dtype == "bf16":
                    found += _coarse_gradients(mine.gradients, want, seen.rank, i)
            elif math.isfinite(want.norm):
                limits = (bound.tensor, max(bound.floor * want.norm, nothing))
                found += _tensors("gradients", mine, want, limits, others, seen.rank, i)
            if mine.misrounded:
                found.append(Difference("weights", mine.misrounded, seen.rank, i, u, bad=True))
            floor = bound.floor * want.norm if math.isfinite(want.norm) else 0.0
            limits = (
                (UPDATE, UPDATE_LR * job.train.lr)
                if low and not delayed
                else (bound.tensor, floor * job.train.lr)
            )
            if job.plan.precision.rounding == "stochastic" and low and not delayed:
                found += _rounded(mine.weights, want.weights, limits, seen.rank, i)
            else:
                others = [n.weights for n in near if delayed]
                found += _tensors("weights", mine, want, limits, others, seen.rank, i)
    worst: dict[str, Difference] = {}
    for d in found:
        best = worst.get(d.kind)
        if best is None or (d.bad, -d.step, d.relative) > (best.bad, -best.step, best.relative):
            worst[d.kind] = d
    return list(worst.values())


def _overflowing_alike(
    judge: list[StepSeen], ranks: Sequence[RankSeen], scaled: Sequence[list[StepSeen]]
) -> list[StepSeen]:
    """The judge's steps, each as another loss scale has it where that overflows as all ranks do."""
    found = []
    for i, want in enumerate(judge):
        finite = {math.isfinite(seen.steps[i].norm) for seen in ranks}
        others = (s[i] for s in scaled if {math.isfinite(s[i].norm)} == finite)
        if {math.isfinite(want.norm)} != finite and (other := next(others, None)) is not None:
            want = replace(other, weights=want.weights)
        found.append(want)
    return found


def _turns(job: Job) -> bool:
    """Whether a rounding may turn a ReLU, or a maximum, the other way."""
    return job.model.image is not None


def walk_of(job: Job, delayed: bool) -> float:
    """s of a job's gradients; 0 where the table alone holds."""
    precision = job.plan.precision
    return 0.0 if _turns(job) or delayed else walk(precision.dtype, job.model.layers)


def rounding(dtype: str) -> float:
    """Of what is computed with: what is handed to fp8 has been rounded to bf16."""
    return ROUNDING.get(dtype, ROUNDING["bf16"])


def walk(dtype: str, layers: int) -> float:
    """s of the module: the relative size that the roundings of a forward and backward add up to; 0 where
    the table alone holds."""
    if dtype not in ROUNDING:
        return 0.0
    return ROUNDING[dtype] * math.sqrt(ROUNDINGS_A_LAYER[dtype] * (layers + 1))


def near(job: Job) -> float:
    """How far a router's scores may lie from the judge's: s, as all that came through as many roundings (of
    0.016 in bf16 2e-4 was seen)."""
    return walk(job.plan.precision.dtype, job.model.layers) or NEAR_IN_FP8


def _close_gradients(
    mine: dict[str, list[tuple[Box, Tensor]]],
    want: StepSeen,
    near: Sequence[dict[str, Tensor]],
    s: float,
    rank: int,
    step: int,
) -> list[Difference]:
    """Largest element, 2-norm and scale of a rank's part of each gradient."""
    found = []
    for name, boxes in mine.items():
        largest = float(want.gradients[name].abs().max())
        judge = _part(want.gradients[name], boxes)
        off = _apart(torch.cat([v.reshape(-1) for _, v in boxes]).double(), judge)
        size, floor = float(judge.norm()), 0.003 * s * want.norm
        bounds = (
            max(7 * s * largest, floor),
            4 * s * size + floor,
            s * (1 + 4 / math.sqrt(judge.numel())) * size + floor,
        )
        limits = torch.tensor(bounds, dtype=torch.float64)
        if near:
            apart = torch.stack([_apart(_part(n[name], boxes), judge) for n in near])
            limits = limits.maximum(_spread(apart))
        most, bad = float(off[0]), not bool((off <= limits).all())
        found.append(
            Difference("gradients", name, rank, step, most / largest if largest else most, bad)
        )
    return found


def _part(whole: Tensor, boxes: list[tuple[Box, Tensor]]) -> Tensor:
    """What a rank holds of a tensor, fp64 [elements]."""
    parts = [whole[tuple(slice(a, b) for a, b in box)].reshape(-1) for box, _ in boxes]
    return torch.cat(parts).double()


def _apart(x: Tensor, judge: Tensor) -> Tensor:
    """Largest element, 2-norm, and projection on `judge` of the difference."""
    off, size = x - judge, judge.norm()
    scale = (off @ judge).abs() / size if size else torch.zeros_like(size)
    return torch.stack([off.abs().max(), off.norm(), scale])


def _coarse_gradients(
    mine: dict[str, list[tuple[Box, Tensor]]], want: StepSeen, rank: int, step: int
) -> list[Difference]:
    """Gradients that are bf16 numbers all through, where the judge's, added up in fp32, are not: they were
    added up, or rounded, in bf16. Values cannot show it: it is less than what the matmuls' casts do."""
    found = []
    for name, boxes in mine.items():
        judge = _part(want.gradients[name], boxes)
        if judge.numel() < ENOUGH or _share_of_bf16(judge) > FEW:
            continue
        bad = _share_of_bf16(torch.cat([v.reshape(-1) for _, v in boxes])) == 1
        found.append(Difference("gradients", name, rank, step, ROUNDING["bf16"] * bad, bad))
    return found


def _share_of_bf16(x: Tensor) -> float:
    """The share of elements that bf16 holds."""
    return float((x.bfloat16().to(x.dtype) == x).double().mean())


def _spread(apart: Tensor) -> Tensor:
    """How far a plan may lie where the judge's neighbours lie so far `apart` [neighbour, ...]."""
    return SPREAD * apart.square().mean(0).sqrt()


def _scalars(
    mine: StepSeen,
    want: StepSeen,
    bounds: tuple[float, float],
    near: Sequence[StepSeen],
    rank: int,
    step: int,
) -> list[Difference]:
    off = _scalars_apart(mine, want)
    limits = torch.tensor((*bounds, bounds[0]), dtype=torch.float64)
    if near:
        limits = limits.maximum(_spread(torch.stack([_scalars_apart(n, want) for n in near])))
    bad = (~(off <= limits)).tolist()
    names = ("loss", "grad_norm", "auxiliary")
    return [
        Difference(n, n, rank, step, d, b) for n, d, b in zip(names, off.tolist(), bad, strict=True)
    ]


def _scalars_apart(mine: StepSeen, want: StepSeen) -> Tensor:
    """Relative differences of loss, norm, and the worst of what experts add."""
    pairs = zip(mine.auxiliary, want.auxiliary, strict=True)
    aux = max((relative(a, b) for a, b in pairs), default=0.0)
    loss = relative(mine.loss, want.loss)
    norm = relative(mine.norm, want.norm, NOTHING * abs(want.loss))
    return torch.tensor((loss, norm, aux), dtype=torch.float64)


def _loads(mine: StepSeen, want: StepSeen, rank: int, step: int) -> Difference:
    """Rows of every layer's experts: numbers, that are equal."""
    pairs = zip(
        (n for layer in mine.loads for n in layer),
        (n for layer in want.loads for n in layer),
        strict=True,
    )
    off = max((relative(a, b) for a, b in pairs), default=0.0)
    return Difference("auxiliary", "loads", rank, step, off, off > 0)


def _rounded(
    mine: dict[str, list[tuple[Box, Tensor]]],
    want: dict[str, Tensor],
    limits: tuple[float, float],
    rank: int,
    step: int,
) -> list[Difference]:
    """Weights rounded at random: where fp32's last bits differ, a few fall on the other neighbour in bf16;
    where an update took almost all of a weight, these bits are what is left of it. Limits as in _tensors."""
    found = []
    for name, boxes in mine.items():
        largest = float(want[name].abs().max())
        left = max(limits[0] * largest, limits[1])
        for box, values in boxes:
            part = want[name][tuple(slice(a, b) for a, b in box)]
            off = (values - part).abs()
            far = bool((off > NEIGHBOUR * part.abs() + left).any())
            others = int((off > 0).sum())
            bad = far or others > 2 + OTHERS * off.numel()
            most = float(off.max())
            found.append(
                Difference("weights", name, rank, step, most / largest if largest else most, bad)
            )
    return found


def _tensors(
    kind: str,
    seen: StepSeen,
    judged: StepSeen,
    limits: tuple[float, float],
    near: Sequence[dict[str, Tensor]],
    rank: int,
    step: int,
) -> list[Difference]:
    """A rank's part of each of the `kind`'s tensors against the judge's; a limit is relative to the tensor's
    largest element, or absolute, or how far the judge's own lie apart in that part."""
    found = []
    tolerance, floor = limits
    want: dict[str, Tensor] = getattr(judged, kind)
    for name, boxes in getattr(seen, kind).items():
        largest = float(want[name].abs().max())
        judge = _part(want[name], boxes)
        mine = torch.cat([v.reshape(-1) for _, v in boxes]).to(judge.dtype)
        off, limit = float((mine - judge).abs().max()), max(tolerance * largest, floor)
        if near:
            apart = [(_part(n[name], boxes) - judge).abs().max() for n in near]
            limit = max(limit, float(_spread(torch.stack(apart))))
        bad = not off <= limit
        found.append(Difference(kind, name, rank, step, off / largest if largest else off, bad))
    return found

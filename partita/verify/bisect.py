"""Finds where a difference begins: data, forward, backward, gradient reduction, optimizer; and names the
collective that is missing or doubled, by what was recorded beside what is declared, or else by what the
laid program has at that place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from partita.parallel.laid import Laid
from partita.record.transfer import TrafficLine
from partita.spec.job import Job
from partita.verify.compare import BOUNDS, Difference, walk
from partita.verify.runs import RankSeen
from partita.verify.watch import Seen, Watch


@dataclass(frozen=True)
class Divergence:
    """Where it begins. `expected` is (op, axis) of the collective in question."""

    module: str
    phase: str  # data forward backward gradient optimizer
    rank: int
    message: str
    expected: tuple[str, str] | None = None


def first_divergence(
    job: Job, laid: Laid, judge: Watch, ranks: Sequence[RankSeen], found: Sequence[Difference]
) -> Divergence | None:
    """The first place, in the order data flows."""
    dtype = job.plan.precision.dtype
    tolerance = 7 * walk(dtype, job.model.layers) or 10 * BOUNDS[dtype].tensor
    at = _data(judge, ranks)
    at = at or _modules(
        judge.outputs, [(r.rank, r.watch.outputs) for r in ranks], "forward", tolerance, laid
    )
    order = "backward"
    at = at or _modules(
        judge.gradients, [(r.rank, r.watch.gradients) for r in ranks], order, tolerance, laid
    )
    at = at or _numbers(found)
    wrong = traffic_difference(ranks)
    if at is None and wrong is None:
        return None
    if wrong is not None:
        line, times = wrong
        how = "is missing" if times < 0 else "was not declared, or is done too often"
        text = f"{line.op} over {line.axis} at {line.site} ({line.phase}) {how}"
        expected = (line.op, line.axis)
        if at is None:
            return Divergence(line.site.partition(":")[0], "gradient", line.rank, text, expected)
        return Divergence(at.module, at.phase, at.rank, f"{at.message}; {text}", expected)
    assert at is not None
    return Divergence(at.module, at.phase, at.rank, at.message, _declared_at(laid, at))


def _data(judge: Watch, ranks: Sequence[RankSeen]) -> Divergence | None:
    for r in ranks:
        for sample, (at, ids) in r.watch.ids.items():
            if sample in judge.ids:
                whole = judge.ids[sample][1]
                at, ids = _tokens(whole, at, ids)
                if bool((whole[at] == ids).all()):
                    continue
            text = f"rank {r.rank} reads other tokens as sample {sample}"
            return Divergence("data", "data", r.rank, text)
    return None


def _tokens(whole: Tensor, at: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Places and what was seen there, without what fills a sequence up."""
    real = at < len(whole)
    return at[real], values[real]


def _modules(
    judge: Seen, ranks: Sequence[tuple[int, Seen]], phase: str, tolerance: float, laid: Laid
) -> Divergence | None:
    parts = ("",) if laid.request.model.image is not None else (".attention", ".mlp")
    layers = range(laid.request.model.layers)
    names = ["embedding", *(f"blocks.{i}{s}" for i in layers for s in parts)]
    for name in reversed(names) if phase == "backward" else names:
        for rank, seen in ranks:
            worst = 0.0
            for (module, sample), (at, values) in seen.items():
                if module != name or (module, sample) not in judge:
                    continue
                _, whole = judge[module, sample]
                at, values = _tokens(whole, at, values)
                if not len(at):
                    continue
                part = whole[at]
                largest = float(whole.abs().max())
                off = float((values - part).abs().max().nan_to_num(math.inf))
                worst = max(worst, off / largest if largest else off)
            if not worst <= tolerance:
                what = "output" if phase == "forward" else "gradient of the output"
                text = f"the {what} of {name} on rank {rank} is off by {worst:.1e} of its largest element"
                return Divergence(name, phase, rank, text)
    return None


def _numbers(found: Sequence[Difference]) -> Divergence | None:
    """What went wrong behind the modules, from the numbers alone."""
    first = min((d.step for d in found if d.bad), default=0)
    bad = {d.kind: d for d in found if d.bad and d.step == first}
    gradient = bad.get("gradients")
    weight = bad.get("weights")
    if "loss" in bad:
        d = bad["loss"]
        text = f"the loss of step {d.step + 1} is off by {d.relative:.1e}"
        return Divergence("head.loss", "forward", d.rank, text)
    if "auxiliary" in bad:
        d = bad["auxiliary"]
        what = "the number of an expert's rows" if d.name == "loads" else "an auxiliary loss"
        text = f"{what} is off by {d.relative:.1e}"
        return Divergence("step.routing", "forward", d.rank, text)
    if gradient is not None:
        text = f"the gradient of {gradient.name} on rank {gradient.rank} is off by {gradient.relative:.1e}"
        return Divergence(gradient.name, "gradient", gradient.rank, text)
    if "grad_norm" in bad:
        d = bad["grad_norm"]
        return Divergence(
            "step.norm", "gradient", d.rank, f"the gradient norm is off by {d.relative:.1e}"
        )
    if weight is not None:
        update = weight.step + 1
        text = (
            f"{weight.name} on rank {weight.rank} is off by {weight.relative:.1e} (update {update})"
        )
        return Divergence(weight.name, "optimizer", weight.rank, text)
    return None


def traffic_difference(ranks: Sequence[RankSeen]) -> tuple[TrafficLine, int] | None:
    """The first line that differs, and by how many calls recorded exceed declared. Of a step that a norm
    which is no number kept from its update, what else moves once a step is not missed."""
    for r in ranks:
        declared = {(t.axis, t.op, t.site, t.phase): t for t in r.declared}
        recorded = {(t.axis, t.op, t.site, t.phase): t for t in r.recorded}
        for key in sorted({*declared, *recorded}, key=lambda k: (k[3] == "step", k)):
            want, got = declared.get(key), recorded.get(key)
            if want != got and not (r.halted and got is None and key[3] == "step"):
                line = want or got
                assert line is not None
                calls = (got.count if got else 0) - (want.count if want else 0)
                return line, calls
    return None


def _declared_at(laid: Laid, at: Divergence) -> tuple[str, str] | None:
    """The collective the laid program has at a module, weight or sum."""
    rank = max(at.rank, 0)
    lines = laid.traffic(rank)
    if at.phase == "gradient":
        for unit in laid.units(laid.mesh.coords(rank)["pp"]):
            if any(name == at.module for name, *_ in unit.weights):
                sites = [f"{unit.name}:{kind}" for kind in ("scatter", "reduce", "tied")]
                sums = [(t.op, t.axis) for site in sites for t in lines if t.site == site]
                if sums:
                    return sums[0]
        return next(((t.op, t.axis) for t in lines if t.site.startswith(at.module)), None)
    phase = "F" if at.phase == "forward" else "B"
    return next(
        ((t.op, t.axis) for t in lines if t.site.startswith(at.module) and t.phase == phase), None
    )

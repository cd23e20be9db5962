"""The two runs that are compared: a plan on its ranks, and the judge on one device.

Both start from the same perturbed weights (biases and norm scales too, so that nothing hides behind a
zero or a one) and take the same steps on the same batches. What a rank saw is told as boxes of logical
tensors, so that every owner of every element is held against the judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from partita.base.errors import NonFiniteError
from partita.comm.context import Context
from partita.comm.protocol import Where, World
from partita.comm.random.seeds import uniform
from partita.model.reference import Reference, loss_and_gradients, times, weight_shapes
from partita.model.reference_fp8 import RoundedProduct
from partita.model.reference_moe import Auxiliary, Told
from partita.parallel.ep.counts import Routing
from partita.parallel.ep.log import Routed
from partita.parallel.laid import Laid, lay
from partita.parallel.pp.rules import in_force, schedule_of
from partita.parallel.precision.scaler import START, LossScaler
from partita.parallel.units import Unit
from partita.record.transfer import TrafficLine, joined, summarise
from partita.simulate.predict import request_of
from partita.spec.job import Job
from partita.spec.layout import Box
from partita.spec.plan import Plan
from partita.train.build import DTYPES, Built, fill_unit, make_context, make_model, new_values
from partita.train.data.dataset import Dataset
from partita.train.routing import logs
from partita.train.step import Model, Update
from partita.train.update import make_update
from partita.verify.batches import rank_batch, whole_batch
from partita.verify.judge import JudgeUpdate, noise, wide_dtype
from partita.verify.routing import Choices, choices, keep_choices
from partita.verify.watch import Watch, share_of, watch_blocks

NEIGHBOURS = 16  # runs of the judge that say how far roundings carry
Boxes = dict[str, list[tuple[Box, Tensor]]]
Weights = dict[str, Tensor]


@dataclass
class StepSeen:
    """One step: the loss, the norm before clipping, gradients before clipping and weights after."""

    loss: float
    norm: float
    gradients: Any  # Boxes of a rank, or name -> tensor of the judge
    weights: Any
    auxiliary: tuple[float, ...] = ()  # balance loss, z-loss, dropped rows, where experts are
    misrounded: str = ""  # a weight whose working values are not its masters, rounded to nearest
    loads: tuple[tuple[int, ...], ...] = ()  # rows of each expert, layer by layer


@dataclass
class RankSeen:
    """What one rank saw."""

    rank: int
    steps: list[StepSeen] = field(default_factory=list)
    recorded: list[TrafficLine] = field(default_factory=list)
    declared: list[TrafficLine] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    routed: dict[tuple[str, int], tuple[int, ...]] = field(
        default_factory=dict
    )  # of the first step
    choices: Choices = field(default_factory=dict)
    halted: bool = False  # a norm that is no number kept the step of `recorded` from its update


def steps_of(plan: Plan) -> int:
    """Two: of weights drawn and of weights updated. Three where one works on weights of before the last
    update, or has two updates to prove."""
    guesses = in_force(plan).pipeline.post_validation
    return 3 if guesses or schedule_of(plan).is_asynchronous else 2


def limited(job: Job, data: Dataset) -> Job:
    """Where updates are made before the norm is known: clipped by a limit between the largest norm of a
    step and what its first place knows of it, which therefore guesses wrong; no other step is clipped."""
    if not in_force(job.plan).pipeline.post_validation:
        return job
    free = replace(job, train=replace(job.train, clip_grad_norm=0.0))
    steps = [s for s in run_judge(free, data)[0][:-1] if math.isfinite(s.norm)]
    if not steps:
        return job
    step, laid = max(steps, key=lambda s: s.norm), lay(request_of(job))
    squares = {n: float(g.double().square().sum()) for n, g in step.gradients.items()}
    known = sum(x for n, x in squares.items() if laid.holders(n)[0] == 0) / sum(squares.values())
    others = max((s.norm for s in steps if s is not step), default=0.0)
    limit = math.sqrt((step.norm**2 + max(known * step.norm**2, others**2)) / 2)
    return replace(job, train=replace(job.train, clip_grad_norm=limit))


def run_rank(
    world: World, job: Job, data: Dataset, watched: int = -1, device: torch.device | None = None,
    laid: Laid | None = None,
) -> RankSeen:  # fmt: skip
    """A plan's steps on one rank, on the CPU or `device`; of step `watched` every segment is
    seen. `laid` is the job's, where somebody has laid it."""
    laid = laid or lay(request_of(job))
    where = getattr(world, "where", None) or Where()
    context = make_context(laid, job, world, where, device=device)

    model = make_model(job, laid, context, _perturbed(job, laid, context))
    update = make_update(model, job.train)
    built = Built(job, context, model, update, data)
    seen = RankSeen(context.rank, declared=_declared(laid, context.rank))
    if watched >= 0:
        watch_blocks(model, seen.watch)
    keep_choices(model)
    context.recorder.take()
    flows, steps = laid.schedule.runs_ahead, steps_of(job.plan)
    recorded = 0  # the step of `seen.recorded`
    undone = False  # the first step's update, whose traffic is then no step's that is declared: the last's is
    for step in range(steps):
        batch = replace(rank_batch(built, step), drains=step + 1 == steps)
        if flows and not batch.drains:
            batch = replace(batch, following=rank_batch(built, step + 1).microbatches)
        if step == watched:
            seen.watch.start(batch.microbatches, share_of(model))
        loss = _finite_or_nan(lambda batch=batch: model.forward_backward(batch))
        if step == 1 and model.guess is not None and model.guess.found is not None:
            undone = not model.guess.found.held
        if step:
            seen.steps[-1] = _proven(seen.steps[-1], model, step - 1)
        seen.choices |= choices(model, step, (*batch.microbatches, *batch.following))
        scale = 1.0 if model.scaler is None else model.scaler.scale
        gradients = boxes(model, lambda unit: unit.gradient, scale, trained=True)
        norm = _finite_or_nan(update.step)
        if flows or step == 0 or undone:
            seen.routed |= {(n, m): c for n, log in logs(model) for m, c in log.sent.items()}
        if step == (steps - 1 if flows else 0) or undone:
            seen.recorded, recorded = summarise(context.recorder.take()), step
        seen.watch.stop()
        after = boxes(model, lambda unit: unit.master)
        of_experts, wrong = _auxiliary(model.routed), _misrounded(model)
        loads = model.routed.counts
        seen.steps.append(StepSeen(loss, norm, gradients, after, of_experts, wrong, loads))
    seen.halted = math.isnan(seen.steps[recorded].norm)  # a pending one is known by now
    if undone and model.guess is not None and model.guess.found and not model.guess.found.held:
        _record_once_more(seen, built, model, update)
    return seen


def _record_once_more(seen: RankSeen, built: Built, model: Model, update: Update) -> None:
    """The last step undid an update as well: another is recorded, before which nothing waits."""
    batch = replace(rank_batch(built, len(seen.steps)), drains=True)
    _finite_or_nan(lambda: model.forward_backward(batch))
    seen.halted = math.isnan(_finite_or_nan(update.step))
    seen.routed |= {(n, m): c for n, log in logs(model) for m, c in log.sent.items()}
    seen.recorded = summarise(built.context.recorder.take())


def _misrounded(model: Model) -> str:
    """A weight of this rank that is computed with as something else than its masters, rounded to nearest:
    less than gradients show. Not where a version, or a guess, may stand in its place."""
    if model.flow is not None or model.guess is not None:
        return ""
    if model.laid.request.plan.precision.rounding == "stochastic":
        return ""
    for unit in model.units:
        held = _computed_with(model, unit)
        if held is None:
            continue
        wrong = held.cpu() != unit.master.to(held.dtype).cpu()
        if wrong.any():
            at = int(wrong.nonzero()[0]) + unit.part.start
            return [name for name, first, _ in unit.places if first <= at][-1]
    return ""


def _computed_with(model: Model, unit: Unit) -> Tensor | None:
    """A rank's part of a unit's working values, as it is stored or, at stage 3, made for a gather; None where
    it is brought from elsewhere."""
    if unit.casts:
        values = unit.values
        return unit.handed_in(torch.empty(values.size, dtype=values.dtype, device=values.device))
    away = unit.spec.stage == 3 and model.parameters.away is not None
    return None if away else unit.shard


def _perturbed(job: Job, laid: Laid, context: Context) -> Callable[[Unit], None]:
    """Fills a unit with what a new model starts from, and noise."""
    new = new_values(replace(job, init="random", adapter_path=None), laid)

    def fill(unit: Unit) -> None:
        off = noise(job, unit.gradient.dtype)

        def value(name: str, box: Box) -> Tensor:
            return new(name, box) + off[name][tuple(slice(a, b) for a, b in box)]

        fill_unit(unit, laid, context, value)

    return fill


def _auxiliary(routed: Routed) -> tuple[float, ...]:
    return routed.balance, routed.z, routed.dropped


def _proven(seen: StepSeen, model: Model, step: int) -> StepSeen:
    """What a step was in the end, where its update was made before that was known."""
    found = None if model.guess is None else model.guess.found
    if found is None or found.step != step:
        return seen
    after = boxes(model, lambda unit: unit.master)
    aux, loads = _auxiliary(found.routed), found.routed.counts
    return StepSeen(found.loss, found.norm, seen.gradients, after, aux, loads=loads)


def _finite_or_nan(made: Callable[[], float]) -> float:
    """Where a plan leaves the numbers is for the comparison to say."""
    try:
        return made()
    except NonFiniteError:
        return math.nan


def _declared(laid: Laid, rank: int) -> list[TrafficLine]:
    """Of one step; where steps flow into each other, of all."""
    times = steps_of(laid.request.plan) if laid.schedule.runs_ahead else 1
    return [replace(t, count=t.count * times, bytes=t.bytes * times) for t in laid.traffic(rank)]


def declare(job: Job, ranks: Sequence[RankSeen]) -> None:
    """Where experts are, what is declared follows from the rows that all ranks chose."""
    keys = {key for r in ranks for key in r.routed}
    if keys:
        laid = lay(request_of(job))
        counts = {k: {r.rank: r.routed[k] for r in ranks if k in r.routed} for k in keys}
        m = job.plan.num_microbatches
        steps = range(steps_of(job.plan) if laid.schedule.runs_ahead else 1)
        of_step = [
            {(n, i - s * m): c for (n, i), c in counts.items() if i // m == s} for s in steps
        ]
        for r in ranks:
            routings = [
                Routing(laid.mesh, laid.replicates_tokens, c, job.plan.expert.chunks)
                for c in of_step
            ]
            r.declared = joined(t for each in routings for t in laid.traffic(r.rank, each))


def boxes(
    model: Model, flat: Callable[[Unit], Tensor], scale: float = 1.0, trained: bool = False
) -> Boxes:
    """Every box this rank holds (of what is `trained`), cloned and divided by `scale`,
    on the CPU."""
    found: Boxes = {}
    for unit in model.units:
        if trained and unit.spec.frozen:
            continue
        for weight, *_ in unit.places:
            for piece in model.laid.pieces(weight, model.context.rank):
                shape = [b - a for a, b in piece.box]
                part = flat(unit)[piece.start : piece.start + piece.numel()]
                found.setdefault(weight, []).append((piece.box, part.div(scale).view(shape).cpu()))
    return found


def run_judge(
    job: Job, data: Dataset, watched: int = -1, starts: Sequence[Weights] = (),
    moved: Callable[[Weights], Weights] = lambda weights: weights, told: Told | None = None,
    scale: float = START,
) -> tuple[list[StepSeen], Watch]:  # fmt: skip
    """The same steps on one device. `starts[i]`: the weights that step i + 1 starts from, in place of those
    it has made itself. `moved` makes what it computes with of the weights it has. `told`: whom the plan's
    routers chose. `scale`: fp16's loss scale, to begin with."""
    dtype = DTYPES[job.plan.precision.dtype]
    optimizer = JudgeUpdate.of(job, wide_dtype(job))
    weights = optimizer.weights
    scaler = LossScaler(scale) if dtype == torch.float16 else None
    watch = Watch()
    found = []
    for step in range(steps_of(job.plan)):
        if step and starts:
            optimizer.restart(starts[step - 1])
        batches = whole_batch(data, job, step)
        judge = Reference(
            job.model, moved(weights), dtype, job.seed, linear=linear_of(job), told=told
        )
        judge.step = step
        if step == watched:
            watch.start(batches)
            judge.see = watch.see_whole
        scale = 1.0 if scaler is None else scaler.scale
        loss, gradients = loss_and_gradients(judge, batches, scale, frozen=optimizer.frozen)
        watch.stop()
        norm, samples = optimizer.norm(gradients), job.train.global_batch_size
        auxiliary, loads = judged_routing(judge.auxiliary, samples)
        kept = {n: g.clone() for n, g in gradients.items()}
        if scaler is None or scaler.step(norm):
            optimizer.step(gradients, norm, step)
        after = {n: w.clone() for n, w in weights.items()}
        found.append(StepSeen(loss, norm, kept, after, auxiliary, loads=loads))
    return found, watch


def judged_routing(
    seen: Auxiliary, samples: int
) -> tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]:
    """What the judge's experts say of a step, as `auxiliary` and `loads` of a StepSeen."""
    auxiliary = (seen.balance / samples, seen.z / samples, float(seen.dropped))
    return auxiliary, tuple(tuple(counts.tolist()) for counts in seen.counts.values())


def neighbours(job: Job, u: float) -> list[Callable[[Weights], Weights]]:
    """What each of NEIGHBOURS runs of the judge computes with of the weights it has: each moved at random by
    at most its rounding, 2 u of it. All that is computed of it is rounded anew, so that gradients lie as far
    apart as two right runs may."""

    def moved(weights: Weights, draw: int) -> Weights:
        found = {}
        for n, w in weights.items():
            dice = uniform(job.seed, f"verify/neighbour {draw}/{n}", torch.arange(w.numel()))
            found[n] = w * (1 + 2 * u * (2 * dice - 1)).view(w.shape).to(w.dtype)
        return found

    return [partial(moved, draw=draw) for draw in range(NEIGHBOURS)]


def linear_of(job: Job) -> Callable[[Tensor, Tensor], Tensor]:
    """How the judge multiplies in layers: under fp8 with scales of each tensor as it is."""
    precision = job.plan.precision
    return RoundedProduct(precision) if precision.dtype == "fp8" else times


def weights_after(job: Job, ranks: Sequence[RankSeen]) -> list[Weights]:
    """Every weight of the plan after each step but the last, put together from its ranks' boxes."""
    shapes = weight_shapes(job.model)
    steps = range(steps_of(job.plan) - 1)
    return [_joined(shapes, [seen.steps[step].weights for seen in ranks]) for step in steps]


def _joined(shapes: Mapping[str, Sequence[int]], parts: Sequence[Boxes]) -> Weights:
    whole = {n: torch.zeros(tuple(shape)) for n, shape in shapes.items()}
    for held in reversed(parts):
        for name, boxes in held.items():
            for box, values in boxes:
                whole[name][tuple(slice(a, b) for a, b in box)] = values.float()
    return whole


def with_own_updates(job: Job, judge: list[StepSeen], ranks: Sequence[RankSeen]) -> list[StepSeen]:
    """The judge's steps with the weights that its optimizer makes of the plan's own weights and gradients:
    at low precision a rounding of a tiny gradient turns a whole step of AdamW, and hides a wrong update."""
    update, found = JudgeUpdate.of(job, torch.float32), []
    starts = weights_after(job, ranks)
    for step, want in enumerate(judge):
        shapes = {n: w.shape for n, w in update.weights.items() if n not in update.frozen}
        own = _joined(shapes, [seen.steps[step].gradients for seen in ranks])
        norm = ranks[0].steps[step].norm
        if step:
            update.restart(starts[step - 1])
        if math.isfinite(norm):
            update.step(own, norm, step)
        found.append(replace(want, weights={n: w.clone() for n, w in update.weights.items()}))
    return found

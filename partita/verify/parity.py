"""`verify`: proves that a plan computes one device's numbers: loss, every gradient, the gradient norm, the
weights after the step, and the traffic to the byte.

    twice    in float64 with the precision set aside; at the plan's own precision against the same casts
    each     steps (steps_of) of SGD with momentum at a large rate, and of AdamW; decay and clipping active
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any

from partita.base.errors import NonFiniteError
from partita.base.text import table
from partita.comm.threads.local import local
from partita.model.reference_moe import Told
from partita.parallel.laid import Laid, lay
from partita.parallel.precision.scaler import START
from partita.record.transfer import TrafficLine
from partita.simulate.predict import request_of
from partita.spec.job import Job, require_job
from partita.spec.plan import Plan
from partita.train.data.dataset import Dataset
from partita.train.devices import computes_on_gpu, shared_device
from partita.verify.batches import open_data, whole_batch
from partita.verify.bisect import Divergence, first_divergence, traffic_difference
from partita.verify.compare import Difference, differences, near, rounding
from partita.verify.delayed import is_delayed, run_delayed
from partita.verify.judge import noise, optimizers, wide_dtype
from partita.verify.processes import run_processes
from partita.verify.routing import told
from partita.verify.runs import (
    RankSeen,
    StepSeen,
    Weights,
    declare,
    limited,
    neighbours,
    run_judge,
    run_rank,
    weights_after,
    with_own_updates,
)
from partita.verify.shrink import shrink
from partita.verify.watch import Watch


@dataclass
class Trial:
    """One optimizer at one precision."""

    job: Job
    judge: list[StepSeen]
    ranks: list[RankSeen]
    found: list[Difference]
    delayed: bool  # held to delayed updates

    @property
    def equal(self) -> bool:
        """No number out of bounds."""
        return not any(d.bad for d in self.found)

    def worst(self, kind: str) -> Difference:
        """The worst difference of a kind."""
        return next((d for d in self.found if d.kind == kind), Difference(kind))


@dataclass
class Verification:
    """The answer."""

    plan: str
    shrunk: str | None
    equal: bool
    precision: dict[str, bool]
    trials: list[Trial]
    declared: list[TrafficLine]
    recorded: list[TrafficLine]
    traffic_equal: bool
    divergence: Divergence | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        """The contract's document."""
        main = next((t for t in self.trials if not t.equal), self.trials[0])
        gradients, weights = main.worst("gradients"), main.worst("weights")
        at = self.divergence
        return {
            "plan": self.plan,
            "shrunk": self.shrunk,
            "equal": self.equal,
            "reference": "delayed" if self.trials[0].delayed else "single",
            "precision": self.precision,
            "loss": _series(main, "loss", "loss"),
            "grad_norm": _series(main, "norm", "grad_norm"),
            "gradients": {"worst": gradients.name, "max_relative_difference": gradients.relative},
            "weights": {"worst": weights.name, "max_relative_difference": weights.relative},
            "traffic": {
                "declared": [asdict(t) for t in self.declared],
                "recorded": [asdict(t) for t in self.recorded],
                "equal": self.traffic_equal,
            },
            "first_divergence": None if at is None else {
                "module": at.module, "phase": at.phase, "rank": at.rank,
                "expected_collective": _collective(at),
                "message": at.message,
            },
        }  # fmt: skip

    def __str__(self) -> str:
        head = f"{self.plan}: {'equal to one device' if self.equal else 'NOT equal to one device'}"
        lines = [head] + ([f"shrunk to {self.shrunk}"] if self.shrunk else [])
        rows = []
        for t in self.trials:
            cells = [
                f"{t.worst(k).relative:.1e}" for k in ("loss", "grad_norm", "gradients", "weights")
            ]
            rows.append(
                [
                    t.job.plan.precision.dtype,
                    t.job.train.optimizer,
                    *cells,
                    "ok" if t.equal else "DIFFERS",
                ]
            )
        header = ["precision", "optimizer", "loss", "norm", "gradients", "weights", ""]
        lines.append(table(rows, header))
        total = sum(t.bytes for t in self.declared)
        verdict = "equal to the byte" if self.traffic_equal else "NOT equal"
        if self.traffic_equal and any(r.halted for r in self.trials[0].ranks):
            verdict = "equal as far as the step came, whose norm is no number"
        lines.append(
            f"traffic of all ranks, declared and recorded: {verdict} ({total} bytes a step)"
        )
        if self.divergence is not None:
            d = self.divergence
            lines.append(f"first divergence: {d.module}, {d.phase}, rank {d.rank}: {d.message}")
            if d.expected is not None:
                lines.append(f"collective there: {d.expected[0]} over {d.expected[1]}")
        return "\n".join(lines)


def _collective(at: Divergence) -> dict[str, str] | None:
    return None if at.expected is None else {"op": at.expected[0], "axis": at.expected[1]}


def _series(trial: Trial, name: str, kind: str) -> dict[str, Any]:
    return {
        "reference": [getattr(s, name) for s in trial.judge],
        "parallel": [getattr(s, name) for s in trial.ranks[0].steps],
        "max_relative_difference": trial.worst(kind).relative,
    }


def verify(
    job: Job,
    *,
    plan: str | Plan | None = None,
    backend: str = "local",
    brief: bool = False,
    only: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Runs the plan on thread ranks (or processes) and the judge on one device, and compares. Thread ranks
    compute on the job's device, a GPU that they share where it is one; the judge on the CPU.

    `brief`: of a plan below float64, SGD in float64 and AdamW at its own precision alone, in half the time;
    `only`: of these "fp64" or "plan", its own. `tell` is called with what is compared next. Raises PlanError
    for an illegal plan, DataError for bad data.
    """
    require_job(job, "verify")
    computes_on_gpu(job)
    job = job if plan is None else job.with_plan(plan)
    job.require_legal()
    lay(request_of(job))  # raises what the rooms find
    small, note = shrink(job)
    data = open_data(small, job)
    own = job.plan.precision.dtype
    trials: list[Trial] = []
    sgd, adamw, *other = optimizers(small.train, is_delayed(small))
    both = {"fp64": [sgd, adamw, *other]}
    if own != "fp64":
        both = {"fp64": [sgd, *other], own: [adamw]} if brief else both | {own: [sgd, adamw]}
    chosen = {"": both, "fp64": ("fp64",), "plan": (own,)}[only]
    both = {dtype: both[dtype] for dtype in chosen}
    for dtype, each in both.items():
        for train in each:
            tell(f"{dtype} {train.optimizer}")
            at = replace(small, plan=small.plan.with_("precision", dtype=dtype), train=train)
            trials.append(_trial(limited(at, data), data, backend))
            if not trials[-1].equal:
                break
    first = trials[0].ranks
    same = traffic_difference(first) is None and all(
        traffic_difference(t.ranks) is None for t in trials
    )
    bad = next((t for t in trials if not t.equal), None)
    divergence = None
    if bad is not None or not same:
        tell("where the difference begins")
        divergence = _bisect(bad or trials[0], data)
    precision = {
        "fp64": all(t.equal for t in trials if t.job.plan.precision.dtype == "fp64"),
        "plan": all(t.equal for t in trials if t.job.plan.precision.dtype == own),
    }
    declared = [t for r in first for t in r.declared]
    recorded = [t for r in first for t in r.recorded]
    equal = bad is None and same
    return Verification(
        str(job.plan), note, equal, precision, trials, declared, recorded, same, divergence
    )


def _trial(job: Job, data: Dataset, backend: str) -> Trial:
    laid = lay(request_of(job))
    delayed, dtype = laid.schedule.is_asynchronous, job.plan.precision.dtype
    ranks = run_ranks(job, data, backend, laid)
    starts = [] if delayed or dtype == "fp64" else weights_after(job, ranks)
    chosen = _told(job, ranks)
    judge = _judged(job, data, delayed, starts, chosen)
    _one_device_is_finite(judge, dtype)
    if starts:
        judge = with_own_updates(job, judge, ranks)
    trial = Trial(job, judge, ranks, differences(judge, ranks, job, delayed), delayed)
    if dtype != "fp64" and not trial.equal:
        others = [
            _judged(job, data, delayed, starts, chosen, moved)
            for moved in neighbours(job, rounding(dtype))
        ]
        scaled = _scaled(job, data, starts, chosen) if dtype == "fp16" else ()
        trial.found = differences(judge, ranks, job, delayed, others, scaled)
    return trial


def _scaled(
    job: Job, data: Dataset, starts: Sequence[Weights], told: Told | None
) -> list[list[StepSeen]]:
    """The judge at half and at twice the loss scale."""
    scales = (START / 2, START * 2)
    return [run_judge(job, data, starts=starts, told=told, scale=s)[0] for s in scales]


def _judged(
    job: Job,
    data: Dataset,
    delayed: bool,
    starts: Sequence[Weights],
    told: Told | None,
    moved: Callable[[Weights], Weights] = lambda weights: weights,
) -> list[StepSeen]:
    """The judge's steps; the arguments as run_judge takes them."""
    if delayed:
        return run_delayed(job, data, told, moved)
    return run_judge(job, data, starts=starts, moved=moved, told=told)[0]


def _told(job: Job, ranks: Sequence[RankSeen]) -> Told | None:
    """Whom the judge's routers may choose as well."""
    return told(job, (r.choices for r in ranks), near(job))


def _one_device_is_finite(judge: Sequence[StepSeen], dtype: str) -> None:
    """Else there is nothing to compare with. A gradient that overflows in fp16 is a step that is skipped."""
    for i, step in enumerate(judge):
        norm = 0.0 if dtype == "fp16" else step.norm
        for what, value in (("loss", step.loss), ("gradient norm", norm)):
            if not isfinite(value):
                raise NonFiniteError(f"the {what} of step {i + 1} is {value}, on one device too")


def run_ranks(
    job: Job, data: Dataset, backend: str, laid: Laid, watched: int = -1
) -> list[RankSeen]:
    """What every rank saw; `laid` is the job's."""
    if backend == "local":
        noise(job, wide_dtype(job))  # by one thread, for all
        with local(job.plan.world_size, job.train.comm_timeout_s) as ranks:
            found = ranks.run(run_rank, job, data, watched, shared_device(job), laid)
    else:
        found = run_processes(job, data, backend)
    declare(job, found)
    return found


def _bisect(trial: Trial, data: Dataset) -> Divergence | None:
    """Runs the failing trial again on thread ranks, its first bad step watched."""
    step = min((d.step for d in trial.found if d.bad), default=0)
    judge = Watch()  # modules of delayed updates are not watched: their numbers are compared
    if trial.delayed:
        judge.start(whole_batch(data, trial.job, step))
    else:
        low = trial.job.plan.precision.dtype != "fp64"
        starts = weights_after(trial.job, trial.ranks) if low else ()
        chosen = _told(trial.job, trial.ranks)
        _, judge = run_judge(trial.job, data, step, starts, told=chosen)
    laid = lay(request_of(trial.job))
    ranks: Sequence[RankSeen] = run_ranks(trial.job, data, "local", laid, step)
    for watched, seen in zip(ranks, trial.ranks, strict=True):
        watched.recorded = seen.recorded
    return first_divergence(trial.job, laid, judge, ranks, trial.found)

"""Plans that were predicted, run for some steps on this machine: what they really take, and the best of them.

Each plan trains the job's model on random tokens over local ranks, in a folder that is thrown away. A step's
time is the median of those after WARM (the first steps warm up and are recorded) but the last, which is
watched for memory and takes longer by that; memory is the fullest rank's, from its allocator. What was
measured is kept, and the next prediction takes it into account. Before each run and behind the last it is
listened what other work the machine does (others.py).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import numpy as np

from partita.base.errors import UsageError
from partita.base.text import table
from partita.base.units import format_bytes, format_seconds
from partita.record.run import read_metrics, read_ranks
from partita.simulate.predict import Prediction
from partita.spec.calibrated import FOLDER
from partita.spec.corrected import PlanRun, learn
from partita.spec.job import Job
from partita.spec.plan import Plan
from partita.train.launch.launcher import Launcher, Stops
from partita.train.launch.rank import RunSpec
from partita.train.launch.start import prepare
from partita.tune.others import cores_taken

STEPS, WARM = 8, 3
A_CORE = 4  # ranks, at most
HEADER = ("", "plan", "predicted", "measured", "ratio", "memory predicted", "measured")


@dataclass(frozen=True)
class Measured:
    """One plan: what `simulate` said, median seconds of a step, bytes of the fullest rank; the most cores
    that other work took before or behind its run, None where nobody counts."""

    prediction: Prediction
    step_time_s: float
    peak_bytes: int
    others: float | None = None

    @property
    def predicted_bytes(self) -> int:
        """Of the fullest rank."""
        return max(x.peak_bytes for x in self.prediction.ledgers)

    @property
    def ratio(self) -> float:
        """Measured step over predicted."""
        return self.step_time_s / (self.prediction.step_time_s or 1.0)


def measure(
    job: Job, plans: Sequence[Prediction], steps: int = STEPS,
    listen: Callable[[], float | None] = cores_taken,
) -> list[Measured]:  # fmt: skip
    """Runs each plan for so many steps; fastest first. Raises UsageError where this machine cannot start so
    many ranks."""
    most = A_CORE * (os.cpu_count() or 1)
    for p in plans:
        if Plan.parse(p.plan).world_size > most:
            raise UsageError(
                f"{p.plan} needs {Plan.parse(p.plan).world_size} ranks: this machine measures {most} at most",
                key="measure",
            )
    with tempfile.TemporaryDirectory(prefix="partita-measure-") as scratch, Stops() as stops:
        found, heard = [], listen()
        for p in plans:
            ran = _run(job, p, steps, Path(scratch), stops)
            before, heard = heard, listen()
            taken = max((x for x in (before, heard) if x is not None), default=None)
            found.append(replace(ran, others=taken))
    return sorted(found, key=lambda m: m.step_time_s)


def others(found: Sequence[Measured]) -> float | None:
    """The most cores that other work took between the runs; None where nobody counts."""
    return max((m.others for m in found if m.others is not None), default=None)


def _run(job: Job, prediction: Prediction, steps: int, scratch: Path, stops: Stops) -> Measured:
    tokens, plan = scratch / "tokens.npy", Plan.parse(prediction.plan)
    if not tokens.exists():
        train, dice = job.train, np.random.default_rng(0)
        count = 4 * train.global_batch_size * train.seq_len + 1
        np.save(tokens, dice.integers(0, job.model.vocab, count))
    held = replace(job.data, source=f"tokens:{tokens}", eval_fraction=0.0, eval_source=None)
    short = replace(
        job.with_plan(plan),
        name="measure",
        auto=False,
        data=replace(held, mlm_token=held.mlm_token or 0),
        train=replace(job.train, steps=steps, eval_every=0, checkpoint_every=0),
    )
    folder = scratch / plan.slug
    (folder / "logs").mkdir(parents=True)
    prepare(short, prediction, folder, allow_fallback=False)
    Launcher(RunSpec(short, folder), stops).run()
    times = [line["step_time_s"] for line in read_metrics(folder / "metrics.jsonl")]
    peaks = [r.ledger.peak_bytes for r in read_ranks(folder) if r.ledger is not None]
    return Measured(prediction, median(times[WARM:-1] or times), max(peaks, default=0))


def feed(job: Job, found: Sequence[Measured], folder: Path = FOLDER) -> str:
    """Keeps what the plans took beside the calibration (spec/corrected.py), so that what is predicted next
    of this machine is nearer; says so, with the mean error of these plans before and after."""
    now, train = job.cluster.slower, job.train
    runs = [
        PlanRun(
            job.model.name, m.prediction.plan, train.seq_len, train.global_batch_size,
            (m.prediction.step_time_s or 0.0) / now, m.step_time_s,
        )
        for m in found
    ]  # fmt: skip
    path, slower = learn(replace(job.cluster, slower=1.0), runs, folder)
    before, after = (_error(found, by) for by in (1.0, slower / now))
    return (
        f"steps take {slower:.3f} times what the rates of {job.cluster.name} say (until now {now:.3f}): "
        f"mean error of these plans {before:.1%} as predicted, {after:.1%} from now on ({path})"
    )


def _error(found: Sequence[Measured], by: float) -> float:
    """Mean of |predicted / measured - 1|, predictions made longer."""
    return fmean(abs(by / m.ratio - 1) for m in found)


def compared(found: Sequence[Measured]) -> str:
    """Predicted beside measured, one line a plan."""
    rows = [
        [
            str(i + 1), m.prediction.plan, format_seconds(m.prediction.step_time_s or 0.0),
            format_seconds(m.step_time_s), f"{m.ratio:.2f}", format_bytes(m.predicted_bytes),
            format_bytes(m.peak_bytes),
        ]
        for i, m in enumerate(found)
    ]  # fmt: skip
    return table(rows, header=HEADER)

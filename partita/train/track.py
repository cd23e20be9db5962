"""A run's numbers to TensorBoard, W&B or MLflow, as the job's `train.track` names them.

A tracker can never fail or hold up a run: its library is imported and called in a thread of its own, what
it raises is one warning in the log and its end, and a run that is over waits for it `PATIENCE_S` at most.
Names carry units: `train/loss_nats_per_token`, `speed/tokens_per_s`, `memory/peak_memory_bytes`.
"""

from __future__ import annotations

import logging
import math
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import xxhash

from partita.spec.job import Job

PATIENCE_S = 10.0
HASTE_S = 1.0  # of a run that fails
WAITING = 1000  # lines that may wait for a slow tracker; later ones are dropped
PROJECT = "partita"
NAMES = {
    "loss": "train/loss_nats_per_token",
    "eval_loss": "eval/loss_nats_per_token",
    "tokens_per_s": "speed/tokens_per_s",
    "step_time_s": "speed/step_time_s",
    "wall_time_s": "speed/wall_time_s",
    "peak_memory_bytes": "memory/peak_memory_bytes",
}


class Tracker(Protocol):
    """Where numbers go; made in the thread that calls it."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a step, by name."""
        ...

    def close(self, ok: bool) -> None:
        """The run is over; `ok`: it came to its end."""
        ...


@dataclass(frozen=True)
class Run:
    """What a tracker is told of the run: its name and folder, the steps that were done before, the job as
    a table."""

    name: str
    folder: Path
    done: int
    job: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The same for a run that goes on."""
        return f"{self.name}-{xxhash.xxh3_64_hexdigest(str(self.folder).encode())}"


class TensorBoard:
    """Event files in `tensorboard` of the run folder, written by tensorboardX, else torch's writer."""

    def __init__(self, run: Run) -> None:
        try:
            writers = import_module("tensorboardX")
        except ImportError:
            writers = import_module("torch.utils.tensorboard")
        # what a resumed run does again is hidden
        folder = str(run.folder / "tensorboard")
        self._writer = writers.SummaryWriter(folder, purge_step=run.done + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """A scalar each."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, ok: bool) -> None:
        """Flushes."""
        self._writer.close()


class Wandb:
    """A run of project 'partita', gone on with when the run is."""

    def __init__(self, run: Run) -> None:
        self._run = import_module("wandb").init(
            project=PROJECT, name=run.name, id=run.id, resume="allow", dir=str(run.folder),
            config=dict(run.job),
        )  # fmt: skip

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """All of a step at once."""
        self._run.log(dict(numbers), step=step)

    def close(self, ok: bool) -> None:
        """Finished, or failed."""
        self._run.finish(exit_code=0 if ok else 1)


class MLflow:
    """A run of experiment 'partita', where MLflow's own settings say."""

    def __init__(self, run: Run) -> None:
        self._mlflow = import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        self._mlflow.start_run(run_name=run.name, tags={"partita.run": run.id})
        self._mlflow.log_dict(dict(run.job), "job.json")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """All of a step at once."""
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self, ok: bool) -> None:
        """Finished, or failed."""
        self._mlflow.end_run("FINISHED" if ok else "FAILED")


LIBRARIES = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def absent(names: Sequence[str]) -> list[str]:
    """What a start says of trackers whose library is not there: training goes on without them."""
    missing = [
        name
        for name in names
        if not any(x in sys.modules or find_spec(x) is not None for x in LIBRARIES[name])
    ]
    if not missing:
        return []
    return [
        f"train.track: {', '.join(missing)} not installed, nothing is sent there: "
        "pip install 'partita[track]'"
    ]


TRACKERS: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow,
}  # fmt: skip


class Tracking:
    """The trackers of one run, each with its thread. A context: left by an error, they are told so."""

    def __init__(self, names: Sequence[str], run: Run) -> None:
        self._names, self._run = names, run
        self._lines: list[_Thread] = []
        self._quiet = redirect_stdout(sys.stderr) if names else nullcontext()

    def __enter__(self) -> Tracking:
        self._quiet.__enter__()  # libraries greet on stdout, where --json has one document
        self._lines = [_Thread(name, self._run) for name in self._names]
        return self

    def log(self, metrics: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; what is no finite number is left out. Returns at once."""
        numbers = {
            NAMES.get(k, f"train/{k}"): float(v)
            for k, v in metrics.items()
            if k != "step" and isinstance(v, int | float) and math.isfinite(v)
        }
        for line in self._lines:
            line.give((metrics["step"], numbers))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for line in self._lines:
            line.give(kind is None, PATIENCE_S)
        for line in self._lines:
            line.wait(PATIENCE_S if kind is None else HASTE_S)
        self._quiet.__exit__(kind, error, trace)


class _Thread:
    """One tracker, fed through a queue: lines, and at last whether all went well."""

    def __init__(self, name: str, run: Run) -> None:
        self.name = name
        self._queue: queue.Queue[Any] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._run, args=(run,), name=name, daemon=True)
        self._thread.start()

    def _run(self, run: Run) -> None:
        try:
            tracker = TRACKERS[self.name](run)
            while not isinstance(item := self._queue.get(), bool):
                tracker.log(*item)
            tracker.close(item)
        except ImportError as error:
            advice = "pip install 'partita[track]'"
            logging.warning("no %s (%s): %s; training goes on", self.name, error, advice)
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split())
            logging.warning(
                "%s failed (%s: %s); training goes on", self.name, type(error).__name__, reason
            )

    def give(self, item: Any, seconds: float = 0.0) -> None:
        """One more; dropped where too many wait for longer than `seconds`."""
        with suppress(queue.Full):
            if self._thread.is_alive():
                self._queue.put(item, seconds > 0, seconds)

    def wait(self, seconds: float) -> None:
        """Until it is done, or that long."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            logging.warning("%s did not finish within %g s; it is left", self.name, seconds)


def tracking(job: Job, folder: Path, done: int, speaks: bool) -> Tracking:
    """The job's trackers on the rank that speaks for all, else none."""
    names = job.train.track if speaks else ()
    return Tracking(names, Run(job.name, folder, done, job.to_table() if names else {}))

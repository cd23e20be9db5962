"""A folder opened for serving: its model on the ranks of a plan, an engine over it, its words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from partita.serve.engine import Engine
from partita.serve.forecast import Forecast, forecast
from partita.serve.http.words import Words, words_of
from partita.serve.runner import Backend, Runner, open_runner

GIB = 1 << 30


@dataclass(frozen=True)
class Wanted:
    """How a model is served; None where the model or the engine says. `memory_gib`: of each rank."""

    plan: str = ""
    pages: int | None = None
    memory_gib: float | None = None
    dtype: str = "fp32"
    device: str | None = None
    backend: Backend = "local"
    max_batch_tokens: int = 512
    max_sequences: int = 64
    speculate: int = 0
    max_waiting: int = 1024
    step_s: float = 60.0


@dataclass(frozen=True)
class Opened:
    """What is served, and what is said of it."""

    engine: Engine
    runner: Runner
    words: Words
    forecast: Forecast

    def close(self) -> None:
        """Ends what runs, and the ranks."""
        self.engine.close()


def opened(folder: Path, wanted: Wanted) -> Opened:
    """Loads the model. Raises CheckpointError for a folder that is none, PlanError and UsageError for a plan
    that cannot be, UsageError where it has no tokenizer."""
    words = words_of(folder)
    device = wanted.device or words.device
    runner = open_runner(
        folder,
        wanted.plan,
        pages=wanted.pages,
        memory=None if wanted.memory_gib is None else int(wanted.memory_gib * GIB),
        dtype=wanted.dtype,
        device=device,
        backend=wanted.backend,
        step_s=wanted.step_s,
    )
    engine = Engine(
        runner,
        words.tokenizer,
        max_batch_tokens=wanted.max_batch_tokens,
        max_sequences=wanted.max_sequences,
        max_waiting=wanted.max_waiting,
        speculate=wanted.speculate,
        end=words.ends,
    )
    seen = forecast(folder, wanted.plan, wanted.dtype, runner, device)
    return Opened(engine, runner, words, seen)

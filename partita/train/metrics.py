"""What a run writes while it trains: metrics.jsonl, per-rank logs, and a progress bar on rank 0.

Metrics are JSON lines with the contract's names; a full disk for them is one warning, not an end.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from partita.base.units import format_seconds
from partita.record.run import read_metrics
from partita.train.data.tokenizer import write_whole


class MetricsFile:
    """Appends one JSON object a line; keeps going, with one warning, when the disk refuses."""

    def __init__(self, path: Path) -> None:
        self.path, self._failed = path, False

    def truncate_after(self, step: int) -> None:
        """Drops lines of steps that a resumed run does again, and what is left of a torn one."""
        if self.path.exists():
            kept = [x for x in read_metrics(self.path) if x["step"] <= step]
            write_whole(self.path, "".join(f"{json.dumps(x)}\n" for x in kept).encode())

    def write(self, metrics: dict[str, Any]) -> None:
        """One line; a number that is not finite is null."""
        plain = {k: None if x != x or x in (math.inf, -math.inf) else x for k, x in metrics.items()}
        try:
            with self.path.open("a") as file:  # the line before may end where the disk was full
                file.write("\n" * self._failed + json.dumps(plain, allow_nan=False) + "\n")
        except OSError as error:
            if not self._failed:
                logging.warning("cannot write %s (%s); training goes on", self.path, error)
            self._failed = True


def log_to(path: Path) -> None:
    """Sends this process's log to the rank's file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


class Bar:
    """A progress bar on stderr: loss, tokens/s, MFU, the slowest rank, time left. Plain lines where
    stderr is no terminal."""

    def __init__(self, steps: int, done: int, label: str) -> None:
        self.steps, self.label = steps, label
        self._done, self._start = done, time.monotonic()
        console = Console(stderr=True)
        self._live = console.is_terminal
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(label, total=steps, completed=done, facts="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, step: int, facts: str) -> None:
        """Moves the bar; without a terminal, a line every few seconds and at the end."""
        self._progress.update(self._task, completed=step, facts=facts)
        now = time.monotonic()
        if not self._live and (now - self._last_line > 5 or step == self.steps):
            self._last_line = now
            left = (self.steps - step) * (now - self._start) / max(step - self._done, 1)
            text = f"{self.label}  step {step}/{self.steps}  {facts}  {format_seconds(left)} left"
            with suppress(OSError):  # a file on a full disk
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()

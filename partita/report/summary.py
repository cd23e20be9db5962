"""What a run folder says, read once: the run, its forecast, what was measured, and how they compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from partita.base.errors import UsageError
from partita.record.compare import TrafficPair, pair_traffic
from partita.record.run import (
    Forecast,
    RankRecord,
    RunFacts,
    read_facts,
    read_forecast,
    read_metrics,
    read_ranks,
)
from partita.spec.job import Job


@dataclass(frozen=True)
class RunSummary:
    """A run folder's contents."""

    folder: Path
    job: Job
    metrics: tuple[Mapping[str, Any], ...]
    forecast: Forecast | None
    ranks: tuple[RankRecord, ...]
    facts: RunFacts

    @cached_property
    def predicted(self) -> tuple[RankRecord, ...]:
        """The forecast of every rank, empty where a run has none."""
        return self.forecast.ranks if self.forecast else ()

    @cached_property
    def traffic(self) -> list[TrafficPair]:
        """Declared beside recorded, exact, of the ranks that recorded a step."""
        known = {r.rank for r in self.ranks}
        declared = [t for r in self.predicted if r.rank in known for t in r.traffic]
        return pair_traffic(declared, [t for r in self.ranks for t in r.traffic])

    @property
    def traffic_equal(self) -> bool | None:
        """Whether every line agrees; None where nothing was recorded."""
        return all(p.equal for p in self.traffic) if self.ranks and self.forecast else None

    @property
    def step_time_s(self) -> float | None:
        """Median over the steps, without the first two where there are more: the first warms up, the
        second is recorded."""
        times = [m["step_time_s"] for m in self.metrics if m.get("step_time_s")]
        times = times[2:] if len(times) > 3 else times
        return median(times) if times else None

    @cached_property
    def exposed_comm_s(self) -> dict[str, float]:
        """Seconds by axis of the recorded step in which the rank that waited longest stood in communication:
        in collectives and sends until they returned, and waiting for what it had started. While it stands,
        it computes nothing. On a GPU of the host's thread. Waits of older records, without an axis: ''."""
        return max((exposed(r) for r in self.ranks), key=lambda e: sum(e.values()), default={})

    @cached_property
    def stragglers(self) -> dict[int, tuple[int, float]]:
        """Ranks that were named as slow: in how many steps as the slowest, and at most how many times as
        slow as ranks with their work."""
        found: dict[int, tuple[int, float]] = {}
        for m in self.metrics:
            if m.get("straggler") is not None:
                steps, ratio = found.get(m["straggler"], (0, 0.0))
                found[m["straggler"]] = steps + 1, max(ratio, m["straggler_ratio"])
        return found

    def last(self, key: str) -> Any:
        """The newest value of a metric."""
        return next((m[key] for m in reversed(self.metrics) if m.get(key) is not None), None)

    def to_json(self) -> dict[str, Any]:
        """The document of `report --json`, without the report's path."""
        first = self.metrics[0].get("loss") if self.metrics else None
        return {
            "run": str(self.folder),
            "plan": str(self.job.plan),
            "steps": self.last("step"),
            "loss": {
                "first": first, "last": self.last("loss"), "eval": self.last("eval_loss"),
                "unigram_entropy": self.facts.unigram_entropy,
            },
            "step_time_s": {
                "predicted": self.forecast.step_time_s if self.forecast else None,
                "measured": self.step_time_s,
            },
            "exposed_comm_s": {
                "predicted": dict(self.forecast.time.get("exposed_comm_s", {})) if self.forecast else None,
                "measured": self.exposed_comm_s if self.ranks else None,
            },
            "stragglers": [
                {"rank": r, "steps": steps, "ratio": ratio}
                for r, (steps, ratio) in sorted(self.stragglers.items())
            ],
            "memory": {
                "limit_bytes": self.job.cluster.memory_limit_bytes,
                "predicted": [_ledger(r) for r in self.predicted],
                "measured": [_ledger(r) for r in self.ranks],
            },
            "traffic": {
                "equal": self.traffic_equal, "lines": len(self.traffic),
                "different": sum(not p.equal for p in self.traffic),
            },
        }  # fmt: skip


def exposed(record: RankRecord) -> dict[str, float]:
    """Seconds by axis that the rank stood in communication in its recorded step."""
    axes = {f"{t.op} {t.site}": t.axis for t in record.traffic}
    found: dict[str, float] = {}
    for span in record.spans:
        if span.kind in ("comm", "wait"):
            told = span.name.removeprefix("wait").strip() if span.kind == "wait" else None
            axis = axes.get(span.name, span.lane) if told is None else told
            found[axis] = found.get(axis, 0.0) + span.duration_s
    return dict(sorted(found.items()))


def _ledger(record: RankRecord) -> dict[str, Any]:
    ledger = record.ledger
    if ledger is None:
        return {"rank": record.rank, "peak_bytes": None}
    return {"rank": record.rank, "peak_bytes": ledger.peak_bytes, **ledger.at_peak}


def read_run(folder: Path) -> RunSummary:
    """Everything a report needs, from the folder alone. Raises UsageError where it is no run folder."""
    if not (folder / "job.toml").is_file():
        raise UsageError(
            f"{folder} is no run folder: it has no job.toml (a run's folder is runs/<name>)",
            file=str(folder),
        )
    return RunSummary(
        folder,
        Job.load(folder / "job.toml"),
        tuple(read_metrics(folder / "metrics.jsonl")),
        read_forecast(folder),
        read_ranks(folder),
        read_facts(folder),
    )

"""What one step looked like, predicted or measured, as files of a run folder.

records/prediction.json   every rank's spans, ledger and traffic, as predicted before the run
records/rank-N.json       the same of rank N, measured in one step
records/run.json          facts that belong to no rank: machine, unigram entropy, a sample of text; the last
                          file of a run that came to its end
metrics.jsonl             a line a step (written by train/metrics.py)
trace.json                all of it for Chrome's and Perfetto's trace viewers
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from partita.base.config import decode
from partita.base.errors import UsageError, WriteError
from partita.record.ledger import Ledger
from partita.record.span import Span
from partita.record.transfer import TrafficLine

FOLDER = "records"
FACTS = "run.json"
_LANES = ("compute", "tp", "dp", "pp_up", "pp_down", "ep", "host")


@dataclass(frozen=True)
class RankRecord:
    """One step of one rank. Measured spans carry the host's clock; `aligned` makes them comparable.

    `declared` is, where the record is a measured one, what the laid program says the rank holds for the
    whole run; `aside` are checkpoints and evaluations, outside the recorded step. `ledger` is the device's
    arena; the host's and the disk's stand beside it where a plan offloads. `held`, where known, is (time,
    bytes on the device from then on).
    """

    rank: int
    step: int = 0
    host: str = ""
    spans: tuple[Span, ...] = ()
    traffic: tuple[TrafficLine, ...] = ()
    ledger: Ledger | None = None
    declared: Ledger | None = None
    aside: tuple[Span, ...] = ()
    host_ledger: Ledger | None = None
    declared_host: Ledger | None = None
    disk_ledger: Ledger | None = None
    held: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What was predicted for every rank of a run."""

    plan: str
    step_time_s: float
    limit_bytes: int
    ranks: tuple[RankRecord, ...]
    time: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFacts:
    """What belongs to no rank. `machine` is aligned text; numbers are None where unknown."""

    machine: str = ""
    unigram_entropy: float | None = None
    sample_prompt: str = ""
    sample_text: str = ""


def write_record(path: Path, record: RankRecord | Forecast | RunFacts) -> None:
    """One JSON file, there whole or not at all. Raises WriteError where the disk refuses."""
    import msgspec

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.replace(path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}", file=str(path)) from None


def read_forecast(folder: Path) -> Forecast | None:
    """The prediction a run began with; None where there is none."""
    path = folder / FOLDER / "prediction.json"
    return decode(Forecast, _load(path), file=str(path)) if path.exists() else None


def read_facts(folder: Path) -> RunFacts:
    """The facts of a run, empty where none were written."""
    path = folder / FOLDER / FACTS
    return decode(RunFacts, _load(path), file=str(path)) if path.exists() else RunFacts()


def read_ranks(folder: Path) -> tuple[RankRecord, ...]:
    """The measured records of all ranks that wrote one, in rank order, on one clock."""
    found: dict[int, RankRecord] = {}
    for path in (folder / FOLDER).glob("rank-*.json"):
        match = re.fullmatch(r"rank-(\d+)", path.stem)
        if match:
            found[int(match[1])] = decode(RankRecord, _load(path), file=str(path))
    return aligned([found[r] for r in sorted(found)])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, none where it is missing. A line that a kill, a power cut or a full disk
    left half written is no line."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [line for x in text.splitlines() if (line := _metrics_line(x)) is not None]


def _metrics_line(text: str) -> dict[str, Any] | None:
    import msgspec

    try:
        line = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def forget_measured(folder: Path) -> None:
    """What an earlier start measured, and that it came to its end: the next one may have another plan,
    and fewer ranks."""
    for path in [*(folder / FOLDER).glob("rank-*.json"), folder / FOLDER / FACTS]:
        path.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any]:
    import msgspec

    try:
        value = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"{path}: not a record: {error}", file=str(path)) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: not a record: an object is wanted", file=str(path))
    return value


def aligned(records: Sequence[RankRecord]) -> tuple[RankRecord, ...]:
    """The records with time 0 where the step began on its host; ranks of one host share a clock, other
    hosts' clocks say nothing, so each host begins at 0."""
    start: dict[str, float] = {}
    for r in records:
        for s in r.spans:
            start[r.host] = min(start.get(r.host, s.start_s), s.start_s)
    return tuple(
        replace(
            r,
            spans=tuple(_earlier(s, start.get(r.host, 0.0)) for s in r.spans),
            aside=tuple(_earlier(s, start.get(r.host, 0.0)) for s in r.aside),
        )
        for r in records
    )


def _earlier(s: Span, by_s: float) -> Span:
    return replace(s, start_s=s.start_s - by_s, end_s=s.end_s - by_s)


def chrome_trace(predicted: Sequence[RankRecord], measured: Sequence[RankRecord]) -> dict[str, Any]:
    """Trace events: a process for each rank, measured, and one for its prediction; a thread a lane, and a
    counter of the bytes held."""
    events: list[dict[str, Any]] = []
    both = (("measured", measured), ("predicted", predicted))
    for place, (what, records) in enumerate(both):
        for record in records:
            process = 2 * record.rank + place
            name = {"name": f"rank {record.rank} {what}"}
            events.append({"ph": "M", "pid": process, "name": "process_name", "args": name})
            order = {"sort_index": process}
            events.append({"ph": "M", "pid": process, "name": "process_sort_index", "args": order})
            spans = (*record.spans, *record.aside)
            lanes = {s.lane for s in spans}
            for lane in sorted(lanes, key=_lane_number):
                thread = {"ph": "M", "pid": process, "tid": _lane_number(lane)}
                events.append({**thread, "name": "thread_name", "args": {"name": lane}})
            events += [_event(s, process) for s in spans]
            events += [_counter(time, size, process) for time, size in record.held]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _lane_number(lane: str) -> int:
    return _LANES.index(lane) if lane in _LANES else len(_LANES)


def _counter(time_s: float, size: int, process: int) -> dict[str, Any]:
    return {
        "ph": "C", "pid": process, "name": "memory", "ts": time_s * 1e6, "args": {"bytes": size},
    }  # fmt: skip


def _event(s: Span, process: int) -> dict[str, Any]:
    arguments = {"stage": s.stage, "microbatch": s.microbatch, "step": s.step}
    return {
        "ph": "X", "pid": process, "tid": _lane_number(s.lane), "name": s.name, "cat": s.kind,
        "ts": s.start_s * 1e6, "dur": s.duration_s * 1e6,
        "args": {k: v for k, v in arguments.items() if v >= 0},
    }  # fmt: skip


def write_trace(folder: Path) -> Path:
    """Merges prediction and ranks of a run folder into trace.json. Raises WriteError."""
    import msgspec

    forecast = read_forecast(folder)
    path = folder / "trace.json"
    trace = chrome_trace(forecast.ranks if forecast else (), read_ranks(folder))
    try:
        path.write_bytes(msgspec.json.encode(trace))
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}", file=str(path)) from None
    return path

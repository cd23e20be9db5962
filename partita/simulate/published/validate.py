"""Holds the simulator against a table of published runs, group by group.

mape      mean |predicted / measured - 1| of the step times of a group
baseline  the same of one efficiency fitted to the group, times the bubble formula: FLOPs with recomputation
          over devices and peak, times 1 + (p-1)/(v m)
left out  the same with constants that were fitted without the group
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from partita.base.errors import PlanError, UsageError
from partita.parallel.laid import Laid
from partita.simulate.predict import timed, waiting
from partita.simulate.published.cells import Row, UnpredictableError, is_eager, method, value_of
from partita.simulate.published.rows import STEP_METRICS, Case, case, measured_seconds, refusal
from partita.simulate.published.works import case_works, lay_case
from partita.simulate.stage import PartTimes, Works, send_seconds, stage_time
from partita.simulate.step import step_time
from partita.spec.model import Convention
from partita.spec.plan import Plan

COLUMNS = ("id", "group", "metric", "value", "gpu_type", "n_gpus", "seq_len", "global_batch")
CONFIGURATION = (
    "model_name", "layers", "hidden", "heads", "vocab", "seq_len", "gpu_type", "n_gpus",
    "gpus_per_node", "tp", "pp", "vpp", "cp", "ep", "etp", "dp", "zero_or_fsdp", "schedule",
    "microbatch_size", "global_batch", "precision", "recompute", "seqpar", "group", "kv_heads",
    "ffn_hidden", "mlp", "experts", "topk", "moe_ffn_hidden",
)  # fmt: skip
# columns that a table may lack: as if they were empty
OPTIONAL = (
    *CONFIGURATION, "quality", "notes", "flops_conv", "use_for",
)  # fmt: skip


SAME = "told by another row of the same configuration"


@dataclass(frozen=True)
class Scored:
    """One row, predicted."""

    row: Row
    case: Case
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Signed and relative."""
        return self.predicted_s / self.measured_s - 1


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table. Raises UsageError where the file or a column is missing, or
    the file is no text."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}", key="FILE", file=str(path))
    try:
        with path.open(
            encoding="utf-8-sig", newline=""
        ) as lines:  # with the mark Excel writes, or none
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        text = f"{path} is no table of UTF-8 text: {error}; save it as CSV (UTF-8)"
        raise UsageError(text, key="FILE", file=str(path)) from None
    missing = [c for c in COLUMNS if rows and c not in rows[0]]
    if missing or not rows:
        text = f"{path} has no column {', '.join(missing)}" if missing else f"{path} has no rows"
        if rows and any(mark in str(next(iter(rows[0]))) for mark in ";\t|"):
            text += "; what stands between columns is a comma"
        raise UsageError(text, key="FILE", file=str(path))
    blank = dict.fromkeys(OPTIONAL, "")
    return [{**blank, **{k: v or "" for k, v in row.items() if k}} for row in rows]


def predict(found: Case, constants: Mapping[str, Any] | None = None) -> float:
    """Seconds of a step of a published configuration."""
    machine = found.machine(constants)
    plan = found.plan
    laid, works = _laid(_shortest(plan), found)
    return timed(laid, machine, plan.num_microbatches, works).seconds


def work_seconds(found: Case, constants: Mapping[str, Any]) -> float:
    """Seconds of the busiest rank's work in a step, its messages included, and of what follows it."""
    machine = found.machine(constants)
    laid, works = _laid(_shortest(found.plan), found)
    known: PartTimes = {}
    stages = [stage_time(w, laid, machine, known) for w in works.stages]
    work = [
        sum(stages[s.index].seconds for s in laid.stages_of(p)) for p in range(laid.sizes["pp"])
    ]
    m, chunks = found.plan.num_microbatches, found.plan.pipeline.virtual_stages
    waits, _ = waiting(send_seconds(laid, works.stages, machine), machine)
    busy = m * (max(work) + 2 * chunks * waits)
    return busy + step_time(laid, works, stages, machine).seconds


def _shortest(plan: Plan) -> Plan:
    """The plan with the fewest microbatches that lay it: what one microbatch does is the same."""
    p, m = plan.mesh.pp, plan.num_microbatches
    fewest = 1 if p == 1 else min(m, 4 * p + m % p)
    return plan.with_("pipeline", num_microbatches=fewest)


@lru_cache(maxsize=4096)
def _laid(plan: Plan, found: Case) -> tuple[Laid, Works]:
    laid = lay_case(found, plan)
    return laid, case_works(found, laid)


@dataclass(frozen=True)
class Skip:
    """A row that was not predicted."""

    row: Row
    reason: str


def score(
    rows: Iterable[Row], constants: Mapping[str, Any] | None = None
) -> tuple[list[Scored], list[Skip]]:
    """Predicts every step-time row; each configuration once, step time or tokens/s first."""
    found: list[Scored] = []
    seconds: dict[tuple[str, ...], float] = {}
    cases, skipped = _usable(rows)
    for row, one in cases:
        try:
            key = _configuration(row)
            if key not in seconds:
                seconds[key] = predict(one, constants)
        except PlanError as error:
            skipped.append(Skip(row, refusal(error)))
            continue
        except UsageError as error:
            skipped.append(Skip(row, f"refused, {error}"))
            continue
        measured = measured_seconds(row, one, convention_of(row))
        found.append(Scored(row, one, seconds[key], measured))
    return _best_convention(found), skipped


def convention_of(row: Row) -> Convention:
    """How the row counts FLOPs; 'model' says no more than that nothing is counted twice."""
    known: dict[str, Convention] = {"hw": "hw", "model_causal": "model_causal"}
    return known.get(row["flops_conv"], "model_full")


def _configuration(row: Row) -> tuple[str, ...]:
    """What ran, as the row's columns and notes tell it."""
    adapters = "LoRA" if "LoRA" in row.get("notes", "") else ""
    kernels = "eager" if is_eager(row) else ""
    return (*(row.get(c, "") for c in CONFIGURATION), method(row), adapters, kernels)


def _usable(rows: Iterable[Row]) -> tuple[list[tuple[Row, Case]], list[Skip]]:
    """Step-time rows that say what ran, one a configuration, and why each other one is not among them. A row
    that cannot be used takes no other's place; a configuration that cannot counts once too."""
    order = {m: i for i, m in enumerate(STEP_METRICS)}
    kept: dict[tuple[str, ...], tuple[Row, Case]] = {}
    skipped: list[Skip] = []
    told: set[tuple[str, ...]] = set()
    ids: set[str] = set()
    for row in rows:
        if row["metric"] not in order:
            continue
        key = (*_configuration(row), _revision(row))
        try:
            one = row, _read(row, ids)
        except (UnpredictableError, UsageError) as error:
            why = str(error) if isinstance(error, UnpredictableError) else f"refused, {error}"
            skipped.append(Skip(row, SAME if (*key, why) in told else why))
            told.add((*key, why))
            continue
        first = kept.setdefault(key, one)
        if first is one:
            continue
        if order[row["metric"]] < order[first[0]["metric"]]:
            kept[key], one = one, first
        skipped.append(Skip(one[0], SAME))
    return list(kept.values()), skipped


def _read(row: Row, ids: set[str]) -> Case:
    """The row as a case, its value a number, its id not met before."""
    if row["id"] in ids:
        raise UnpredictableError(f"an id that stands twice: {row['id']}")
    ids.add(row["id"])
    value_of(row)
    return case(row)


def _revision(row: Row) -> str:
    """Repeated runs of one configuration count each."""
    if "noise" not in row.get("use_for", ""):
        return ""
    return row["id"] if row["metric"] in ("step_time_s", "tokens_per_s_per_gpu") else "-"


def _best_convention(found: list[Scored]) -> list[Scored]:
    """Where a group says 'model', the convention with the smaller error counts, once for the group."""
    out: list[Scored] = []
    for group in dict.fromkeys(s.row["group"] for s in found):
        own = [s for s in found if s.row["group"] == group]
        open_rows = [s for s in own if s.row["flops_conv"] == "model"]
        ways = [own]
        if open_rows:
            ways.append([_recounted(s, "model_causal") for s in own])
        out += min(ways, key=lambda w: sum(abs(s.error) for s in w))
    return out


def _recounted(s: Scored, convention: Convention) -> Scored:
    if s.row["flops_conv"] != "model":
        return s
    return replace(s, measured_s=measured_seconds(s.row, s.case, convention))


def baseline(scored: Sequence[Scored]) -> float:
    """Mean error of one efficiency, fitted so that it is least, times the bubble formula."""
    ideal = [_ideal(s.case) for s in scored]
    ratios = sorted(s.measured_s / i for s, i in zip(scored, ideal, strict=True))
    errors = (
        sum(abs(f * i / s.measured_s - 1) for s, i in zip(scored, ideal, strict=True))
        for f in ratios
    )
    return min(errors) / len(scored)


def _ideal(c: Case) -> float:
    flops = c.tokens * c.model.train_flops_per_token(c.seq_len, "hw", c.recompute)
    plan = c.plan
    stages = plan.mesh.pp * plan.pipeline.virtual_stages
    bubble = (plan.mesh.pp - 1) / (plan.pipeline.virtual_stages * plan.num_microbatches)
    rate = c.cluster.devices * c.cluster.peak(plan.precision.dtype)
    return flops / rate * (1 + bubble if stages > 1 else 1)


def mape(scored: Sequence[Scored]) -> float | None:
    """Mean error of step times."""
    return sum(abs(s.error) for s in scored) / len(scored) if scored else None


def summary(scored: Sequence[Scored], left_out: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """A line a group."""
    lines = []
    for group in sorted({s.row["group"] for s in scored}):
        own = [s for s in scored if s.row["group"] == group]
        errors = [abs(s.error) for s in own]
        lines.append({
            "group": group, "metric": "step_time_s", "n": len(own),
            "mape": sum(errors) / len(errors), "median": median(errors), "max": max(errors),
            "baseline_mape": baseline(own), "left_out_mape": left_out.get(group),
        })  # fmt: skip
    return lines


def reasons(skipped: Iterable[Skip]) -> dict[str, int]:
    """How many rows for each reason."""
    return dict(Counter(s.reason for s in skipped).most_common())

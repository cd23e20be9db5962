"""Rows of published tables that are not step times: memory of a rank, bubbles.

    x_act_mem_GB, x_act_pct   activations of the first stage, GiB, or against tensor parallelism alone
    x_paramopt_mem_GB         parameters, gradients and optimizer states of the first stage, GiB
    peak_mem_GB               the fullest rank; GiB where the notes say so
    bubble_rate               idle share of the pipeline; its error is a difference, not a ratio

A row that does not print its batch gets enough microbatches to fill the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from partita.base.errors import PlanError, UsageError
from partita.cost.machine import machine_of
from partita.parallel.laid import Laid, Request, lay
from partita.simulate.memory import stage_ledger
from partita.simulate.predict import timed
from partita.simulate.published import Case, Row, UnpredictableError, case, method, number, refusal
from partita.spec.plan import Plan

METRICS = ("x_act_mem_GB", "x_act_pct", "x_paramopt_mem_GB", "peak_mem_GB", "bubble_rate")
GIB = 2**30
ROUNDS = 4  # of the pipeline, where no batch is printed
STATES = ("parameters", "gradients", "optimizer")


def other_rows(rows: Iterable[Row]) -> tuple[list[dict[str, Any]], list[tuple[Row, str]]]:
    """(id, group, metric, predicted, measured, error) of each row, and the reasons of those without."""
    found, skipped = [], []
    for row in rows:
        if row["metric"] not in METRICS:
            continue
        try:
            predicted = _predicted(row)
        except UnpredictableError as error:
            skipped.append((row, str(error)))
            continue
        except PlanError as error:
            skipped.append((row, refusal(error)))
            continue
        except UsageError as error:
            skipped.append((row, f"refused, {error}"))
            continue
        measured = float(row["value"])
        is_bubble = row["metric"] == "bubble_rate"
        error = predicted - measured if is_bubble else predicted / measured - 1
        found.append({
            "id": row["id"], "group": row["group"], "metric": row["metric"],
            "predicted": predicted, "measured": measured, "error": error,
        })  # fmt: skip
    return found, skipped


def other_lines(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each group and metric."""
    by: dict[tuple[str, str], list[float]] = {}
    for row in found:
        by.setdefault((row["group"], row["metric"]), []).append(abs(row["error"]))
    return [
        {"group": group, "metric": metric, "n": len(e), "mape": sum(e) / len(e), "median": median(e),
         "max": max(e), "baseline_mape": None, "left_out_mape": None}
        for (group, metric), e in sorted(by.items())
    ]  # fmt: skip


def _filled(row: Row) -> Row:
    """The row with a batch, where it prints none."""
    if row.get("global_batch") or not row.get("microbatch_size"):
        return row
    micro, dp, pp = (number(row, c, 1) for c in ("microbatch_size", "dp", "pp"))
    return {**row, "global_batch": str(micro * dp * ROUNDS * pp)}


def _predicted(row: Row) -> float:
    found, metric = case(_filled(row)), row["metric"]
    if metric == "bubble_rate":
        return _bubble(found, bool(method(row)))
    if metric == "peak_mem_GB":
        laid = _laid(found, found.plan)
        peak = max(stage_ledger(laid, p, laid.schedule).peak_bytes for p in range(laid.sizes["pp"]))
        return peak / (GIB if "GiB" in row["notes"] else 1e9)
    at = _first_stage(found, found.plan)
    if metric == "x_paramopt_mem_GB":
        return sum(at[c] for c in STATES) / GIB
    if metric == "x_act_mem_GB":
        return at["activations"] / GIB
    alone = found.plan.with_("mesh", sp=False).with_("recompute", mode="none")
    return 100 * at["activations"] / _first_stage(found, alone)["activations"]


def _laid(found: Case, plan: Plan) -> Laid:
    return lay(Request(plan, found.model, found.seq_len, found.micro_batch_size))


def _first_stage(found: Case, plan: Plan) -> Mapping[str, int]:
    laid = _laid(found, plan)
    return stage_ledger(laid, 0, laid.schedule).at_peak


def _bubble(found: Case, of_the_mean: bool) -> float:
    """Of the busiest rank and the schedule, as the zero-bubble papers; or of the mean rank and the step."""
    t = timed(_laid(found, found.plan), machine_of(found.cluster, found.software),
              found.plan.num_microbatches)  # fmt: skip
    if of_the_mean:
        return 1 - sum(t.played.busy) / len(t.played.busy) / t.seconds
    return 1 - max(t.played.busy) / t.pipeline_s

"""Rows of published tables that are not step times: memory of a rank, bubbles.

    x_act_mem_GB              activations of the first stage, GiB
    x_act_pct                 those of its layers, against tensor parallelism alone (Korthikanti, table 2)
    x_paramopt_mem_GB         parameters, gradients and optimizer states of its layers, GiB: the numbers
                              printed are 18 bytes x 12 layers hidden^2 / (tp pp), embeddings left out
    peak_mem_GB               the fullest rank; GiB where the notes say so
    bubble_rate               idle share of the pipeline; its error is a difference, not a ratio

A row that does not print its batch gets enough microbatches to fill the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from partita.base.errors import PlanError, UsageError
from partita.parallel.laid import Laid, lay
from partita.parallel.pp.rules import schedule_of
from partita.parallel.read import kept_bytes, state_bytes
from partita.schedule.clock import StageCosts
from partita.schedule.ir import Schedule
from partita.simulate.memory import kept_at_once
from partita.simulate.pipeline import play
from partita.simulate.predict import Timed, timed
from partita.simulate.published.cells import Row, UnpredictableError, method, number, value_of
from partita.simulate.published.rows import STEP_METRICS, Case, case, refusal
from partita.simulate.published.works import case_works, fullest
from partita.spec.plan import Plan
from partita.spec.program import Block

BUBBLE = "bubble_rate"
METRICS = ("x_act_mem_GB", "x_act_pct", "x_paramopt_mem_GB", "peak_mem_GB", BUBBLE)
GIB = 2**30
ROUNDS = 4  # of the pipeline, where no batch is printed


def other_rows(
    rows: Iterable[Row], constants: Mapping[str, Any] | None = None
) -> tuple[list[dict[str, Any]], list[tuple[Row, str]]]:
    """(id, group, metric, predicted, measured, error) of each row, and the reasons of those without."""
    found, skipped = [], []
    for row in rows:
        if row["metric"] not in METRICS:
            if row["metric"] not in STEP_METRICS and not row["metric"].startswith("x_"):
                skipped.append((row, f"a metric that is not known: {row['metric']}"))
            continue
        try:
            measured = value_of(row)
            predicted = _predicted(row, constants)
        except UnpredictableError as error:
            skipped.append((row, str(error)))
            continue
        except PlanError as error:
            skipped.append((row, refusal(error)))
            continue
        except UsageError as error:
            skipped.append((row, f"refused, {error}"))
            continue
        is_bubble = row["metric"] == BUBBLE
        error = predicted - measured if is_bubble else predicted / measured - 1
        found.append({
            "id": row["id"], "group": row["group"], "metric": row["metric"],
            "predicted": predicted, "measured": measured, "error": error,
        })  # fmt: skip
    return found, skipped


def other_lines(
    found: Iterable[Mapping[str, Any]], left_out: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """A line for each group and metric. `left_out`: errors of groups' bubbles; no constant is in memory,
    which has one error, in and out."""
    by: dict[tuple[str, str], list[float]] = {}
    for row in found:
        by.setdefault((row["group"], row["metric"]), []).append(abs(row["error"]))
    return [
        {"group": group, "metric": metric, "n": len(e), "mape": sum(e) / len(e), "median": median(e),
         "max": max(e), "baseline_mape": None,
         "left_out_mape": (left_out or {}).get(group) if metric == BUBBLE else sum(e) / len(e)}
        for (group, metric), e in sorted(by.items())
    ]  # fmt: skip


def _filled(row: Row) -> Row:
    """The row with a batch, where it prints none."""
    if row.get("global_batch") or not row.get("microbatch_size"):
        return row
    micro, dp, pp = (number(row, c, 1) for c in ("microbatch_size", "dp", "pp"))
    return {**row, "global_batch": str(micro * dp * ROUNDS * pp)}


def _predicted(row: Row, constants: Mapping[str, Any] | None) -> float:
    found, metric = case(_filled(row)), row["metric"]
    if metric == BUBBLE:
        return _bubble(found, bool(method(row)), constants)
    if metric == "peak_mem_GB":
        return fullest(found).peak_bytes / (GIB if "GiB" in row["notes"] else 1e9)
    laid = _laid(found, found.plan)
    if metric == "x_act_mem_GB":
        return kept_at_once(laid, 0, laid.schedule)[0] / GIB
    if metric == "x_paramopt_mem_GB":
        return sum(sum(state_bytes(b, laid.sizes).values()) for b in _layers(laid)) / GIB
    alone = _laid(found, found.plan.with_("mesh", sp=False).with_("recompute", mode="none"))
    kept = [sum(kept_bytes(b, x.sizes) for b in _layers(x)) for x in (laid, alone)]
    return 100 * kept[0] / kept[1]


def _laid(found: Case, plan: Plan) -> Laid:
    return lay(found.request(plan))


def _layers(laid: Laid) -> list[Block]:
    """The layers of the first place of pp."""
    blocks = (b for s in laid.stages_of(0) for b in s.blocks)
    return [b for b in blocks if b.name not in ("embedding", "head")]


def _bubble(found: Case, of_the_mean: bool, constants: Mapping[str, Any] | None = None) -> float:
    """Of the busiest rank and the schedule, as the zero-bubble papers, whose scheduler puts messages between
    stages that do not wait for them, and knows one time of an F, a B and a W: that of the mean stage; or of
    the mean rank and the step, where what a stage waits for its messages is no work."""
    laid, m = _laid(found, found.plan), found.plan.num_microbatches
    machine = found.machine(constants)
    if not of_the_mean:
        machine = replace(machine, software=replace(machine.software, sends_block=False))
    t = timed(laid, machine, m, case_works(found, laid))
    if not of_the_mean:
        return _alike_bubble(found, t)
    waiting = 2 * m * found.plan.pipeline.virtual_stages * t.waits_s
    return 1 - (sum(t.played.busy) / len(t.played.busy) - waiting) / t.seconds


def _alike_bubble(found: Case, t: Timed) -> float:
    """Idle share of the schedule with the mean stage at every stage."""
    plan, stages = found.plan, t.costs.stages
    mean = StageCosts(*(fmean(getattr(s, n) for s in stages) for n in ("F", "I", "W")))
    costs = replace(t.costs, stages=(mean,) * len(stages))

    def make(m: int) -> Schedule:
        return schedule_of(plan.with_("pipeline", num_microbatches=m))

    played = play(make, plan.mesh.pp, plan.num_microbatches, costs)
    is_own = plan.pipeline.schedule.startswith("zb_")
    return 1 - max(played.busy) / (played.own if is_own else played.seconds)

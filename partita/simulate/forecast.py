"""A prediction written out for every rank: what a run records before it begins, to be held against what
it measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from partita.base.errors import PlanError
from partita.record.run import Forecast, RankRecord
from partita.record.span import Span
from partita.schedule.clock import makespan
from partita.simulate.held import held
from partita.simulate.predict import Prediction


def forecast(prediction: Prediction, ranks: Sequence[int] | None = None) -> Forecast:
    """The spans, ledger, curve and traffic of every rank, or of some. Raises PlanError for an illegal
    plan."""
    if prediction.laid is None or prediction.step_time_s is None:
        raise PlanError(f"{prediction.plan} has no forecast", prediction.problems)
    return Forecast(
        prediction.plan,
        prediction.step_time_s,
        prediction.limit_bytes,
        tuple(_rank(prediction, r) for r in ranks or range(prediction.laid.mesh.world_size)),
        dict(prediction.time),
    )


def first_ranks(prediction: Prediction) -> list[int]:
    """One rank for each class of alike ranks: the first of each place of pp."""
    if prediction.laid is None:
        return []
    return [prediction.laid.mesh.rank_of({"pp": p}) for p in range(len(prediction.ledgers))]


def _rank(prediction: Prediction, rank: int) -> RankRecord:
    assert prediction.laid is not None and prediction.schedule is not None
    stage = prediction.laid.mesh.coords(rank)["pp"]
    spans = [replace(s, rank=rank) for s in prediction.spans if s.rank == stage]
    ledger = replace(prediction.ledgers[stage], rank=rank)
    traffic = tuple(prediction.laid.traffic(rank))
    curve = held(prediction.laid, stage, prediction.schedule, prediction.spans, ledger)
    return RankRecord(
        rank, 0, "", (*spans, *_tail(prediction, rank)), traffic, ledger, held=tuple(curve.total())
    )


def _tail(prediction: Prediction, rank: int) -> list[Span]:
    """What follows the schedule: the part of the reduction that is not hidden, and the update."""
    end = makespan(list(prediction.spans))
    assert prediction.step_time_s is not None
    update = prediction.time.get("optimizer_s", 0.0)
    reduced = prediction.step_time_s - update
    found = [Span(rank, "dp", "comm", "reduce", end, reduced)] if reduced > end * (1 + 1e-9) else []
    if update:
        found.append(Span(rank, "compute", "U", "optimizer", reduced, prediction.step_time_s))
    return found

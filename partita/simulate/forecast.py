"""A prediction written out for every rank: what a run records before it begins, to be held against what
it measures."""

from __future__ import annotations

from dataclasses import replace

from partita.base.errors import PlanError
from partita.record.run import Forecast, RankRecord
from partita.record.span import Span
from partita.schedule.clock import makespan
from partita.simulate.predict import Prediction


def forecast(prediction: Prediction) -> Forecast:
    """The spans, ledger and traffic of every rank. Raises PlanError for an illegal plan."""
    if prediction.laid is None or prediction.step_time_s is None:
        raise PlanError(f"{prediction.plan} has no forecast", prediction.problems)
    return Forecast(
        prediction.plan,
        prediction.step_time_s,
        prediction.limit_bytes,
        tuple(_rank(prediction, r) for r in range(prediction.laid.mesh.world_size)),
        dict(prediction.time),
    )


def _rank(prediction: Prediction, rank: int) -> RankRecord:
    assert prediction.laid is not None
    stage = prediction.laid.mesh.coords(rank)["pp"]
    spans = [replace(s, rank=rank) for s in prediction.spans if s.rank == stage]
    ledger = replace(prediction.ledgers[stage], rank=rank)
    traffic = tuple(prediction.laid.traffic(rank))
    return RankRecord(rank, 0, "", (*spans, *_tail(prediction, rank)), traffic, ledger)


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

"""A recorded step as actions of its plan's schedule, so that it is drawn and clocked as schedules are.

Of the ranks of each pipeline place the first stands for all. An action that needs another rank's result
begins when that is there: the wait for it, which the record counts to the action, is idle time here, as it
is on the clock. Of an overlapped pair only the whole is recorded; a third of it is shown as the forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from partita.base.errors import UsageError
from partita.parallel.pp.rules import schedule_of
from partita.record.run import RankRecord
from partita.record.span import Span
from partita.report.summary import RunSummary
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Action, Schedule, needs
from partita.spec.mesh import Mesh

_KINDS = ("F", "B", "I", "W", "U")  # U where stages update within their list


@dataclass(frozen=True)
class RecordedStep:
    """The schedule of the run's plan, when its actions ran in step `step` (by rank and start, seconds since
    the first), and the median seconds of each stage's halves and U; of a whole backward each is half."""

    schedule: Schedule
    spans: list[Span]
    costs: Costs
    step: int


def recorded_step(run: RunSummary) -> RecordedStep:
    """What the run recorded. Raises UsageError where it recorded no step of every place."""
    plan = run.job.plan
    schedule, mesh = schedule_of(plan), Mesh(plan.sizes, plan.mesh.order)
    records = {record.rank: record for record in run.ranks}
    spans: list[Span] = []
    for place in range(schedule.num_ranks):
        rank = mesh.rank_of({"pp": place})
        found = _actions(schedule, place, records[rank]) if rank in records else []
        if not found:
            raise UsageError(
                f"{run.folder} has no recorded step of rank {rank}: a run records one once it has done a few",
                file=str(run.folder),
            )
        spans += found
    begin = min(s.start_s for s in spans)
    spans = [replace(s, start_s=s.start_s - begin, end_s=s.end_s - begin) for s in spans]
    return RecordedStep(schedule, spans, _costs(schedule, spans), spans[0].step)


def _actions(schedule: Schedule, place: int, record: RankRecord) -> list[Span]:
    """The actions of a rank in the order they began, the newest of one that ran twice."""
    waits = [s for s in record.spans if s.kind == "wait"]
    found: dict[str, Span] = {}
    for s in record.spans:
        if s.lane == "compute" and s.kind in _KINDS and s.stage >= 0:
            found.pop(s.name, None)
            start, end = _own(schedule, s, waits)
            found[s.name] = replace(s, rank=place, start_s=start, end_s=end)
    return sorted(found.values(), key=lambda s: s.start_s)


def _own(schedule: Schedule, s: Span, waits: Sequence[Span]) -> tuple[float, float]:
    """(start, end) of an action without the wait for another rank's result, or its part of a pair."""
    action = Action(s.stage, s.kind, s.microbatch)
    third = s.start_s + s.duration_s / 3
    if action in schedule.paired:
        return s.start_s, third
    if action in schedule.beside:
        return third, s.end_s
    k = s.microbatch % schedule.num_microbatches  # an asynchronous step runs ahead into the next
    here = schedule.rank_of(s.stage, k)
    if all(schedule.rank_of(n.stage, k) == here for n in needs(action, schedule.num_stages)):
        return s.start_s, s.end_s
    inside = (w.end_s for w in waits if s.start_s <= w.start_s and w.end_s <= s.end_s)
    return next(inside, s.start_s), s.end_s


def _costs(schedule: Schedule, spans: Sequence[Span]) -> Costs:
    took: dict[tuple[int, str], list[float]] = defaultdict(list)
    for s in spans:
        took[s.stage, s.kind].append(s.duration_s)
    middle = {place: median(seconds) for place, seconds in took.items()}
    stages = []
    for stage in range(schedule.num_stages):
        half = middle.get((stage, "B"), 0.0) / 2
        forward, i, w = (middle.get((stage, kind), half) for kind in "FIW")
        stages.append(StageCosts(forward, i, w, middle.get((stage, "U"), 0.0)))
    return Costs(tuple(stages))

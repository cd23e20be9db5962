"""Steps back to back."""

from __future__ import annotations

from dataclasses import replace

from partita.schedule.ir import Action, Schedule
from partita.schedule.make.pipedream import lengthened


def repeat(schedule: Schedule, steps: int) -> Schedule:
    """The schedule run `steps` times, its microbatches numbered on: no barrier between.

    One whose list ends the step follows rank by rank; one that runs ahead does not even drain: it is one
    longer list.
    """
    if schedule.runs_ahead:
        return lengthened(schedule, steps)
    m = schedule.num_microbatches

    def later(action: Action, step: int) -> Action:
        return action._replace(microbatch=action.microbatch + step * m)

    return replace(
        schedule,
        num_microbatches=m * steps,
        ranks=tuple(
            tuple(later(a, step) for step in range(steps) for a in actions)
            for actions in schedule.ranks
        ),
        direction=schedule.direction * steps if schedule.direction is not None else None,
        paired=frozenset(later(a, step) for step in range(steps) for a in schedule.paired),
    )

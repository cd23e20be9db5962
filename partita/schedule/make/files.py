"""Schedules of a user's own, proven before anything starts: those that update under way too, which are
trained in PipeDream's order alone. Updates at the end say what every step does, and are left to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

from partita.base.errors import Problem, ScheduleError
from partita.schedule.check import check
from partita.schedule.ir import Action, Schedule
from partita.schedule.make.pipedream import pipedream
from partita.schedule.staircase import marked
from partita.schedule.text import read_program


def read_proven(path: str | Path) -> Schedule:
    """A file's schedule, without the updates that end a step. Raises ScheduleError with all that keeps it
    from running."""
    made, program = read_program(path)
    problems = file_problems(made, program)
    if problems:
        raise ScheduleError(f"{made.name} cannot run", problems)
    if made.is_asynchronous or "U" not in made.kinds:
        return made
    ranks = tuple(tuple(a for a in actions if a.kind != "U") for actions in made.ranks)
    return replace(made, ranks=ranks)


def file_problems(
    schedule: Schedule, program: Sequence[Sequence[Action]] | None = None
) -> list[Problem]:
    """What `check` finds; and of a file that updates a stage before its last backward the first action that
    is not PipeDream's. Its steps flow into each other, and what a step leaves to the next one, and which
    version of the weights each microbatch uses, is known of that list."""
    problems = check(schedule, program)
    if problems:
        return problems
    if not schedule.is_asynchronous:
        return _ends(schedule)
    ours = pipedream(schedule.num_ranks, schedule.num_microbatches)
    for rank, (actions, wanted) in enumerate(zip(schedule.ranks, ours.ranks, strict=True)):
        for place, (has, wants) in enumerate(zip_longest(actions, wanted)):
            if has != wants:
                return [_other(rank, actions, place, wants)]
    return []


def _ends(schedule: Schedule) -> list[Problem]:
    """Of a file whose updates stand behind the backwards: each stage has one, or none has any."""
    if "U" not in schedule.kinds:
        return []
    found = []
    for rank, actions in enumerate(schedule.ranks):
        last = {a.stage: i for i, a in enumerate(actions)}
        count = Counter(a.stage for a in actions if a.kind == "U")
        for stage in (s for s in last if count[s] != 1):
            times = f"{count[stage]} updates" if count[stage] else "no update"
            words = f"stage {stage} has {times}"
            message = (
                f"rank {rank} runs {actions[last[stage]]}, and {words}: a step ends with one of every stage, "
                f"which a file has once a stage or not at all\n{marked(rank, actions, last[stage], words)}"
            )
            found.append(Problem("schedule", "ordered", message, asked=str(actions[last[stage]])))
    return found


def _other(rank: int, actions: Sequence[Action], place: int, wants: Action | None) -> Problem:
    at = min(place, len(actions) - 1)
    has = actions[place] if place < len(actions) else "nothing more"
    words = f"pipedream has {wants} here" if wants else "pipedream has nothing more"
    message = (
        f"rank {rank} runs {has}, where {words.removesuffix(' here')}: a file that updates a stage before "
        "its last backward is asynchronous, and such steps run in the order of pipedream alone; with every U "
        f"behind its stage's last backward a file may have any order\n{marked(rank, actions, at, words)}"
    )
    return Problem("schedule", "asynchronous", message, asked=str(has), limit=str(wants))

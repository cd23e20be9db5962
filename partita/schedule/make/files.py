"""Schedules of a user's own, proven before anything starts: those that update under way too, which are
trained in PipeDream's order alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from partita.base.errors import Problem, ScheduleError
from partita.schedule.check import check
from partita.schedule.ir import Action, Schedule
from partita.schedule.make.pipedream import pipedream
from partita.schedule.staircase import marked
from partita.schedule.text import read_program


def read_proven(path: str | Path) -> Schedule:
    """A file's schedule. Raises ScheduleError with all that keeps it from running."""
    made, program = read_program(path)
    problems = file_problems(made, program)
    if problems:
        raise ScheduleError(f"{made.name} cannot run", problems)
    return made


def file_problems(
    schedule: Schedule, program: Sequence[Sequence[Action]] | None = None
) -> list[Problem]:
    """What `check` finds; and of a file that updates a stage before its last backward the first action that
    is not PipeDream's. Its steps flow into each other, and what a step leaves to the next one, and which
    version of the weights each microbatch uses, is known of that list."""
    problems = check(schedule, program)
    if problems or not schedule.is_asynchronous:
        return problems
    ours = pipedream(schedule.num_ranks, schedule.num_microbatches)
    for rank, (actions, wanted) in enumerate(zip(schedule.ranks, ours.ranks, strict=True)):
        for place, (has, wants) in enumerate(zip_longest(actions, wanted)):
            if has != wants:
                return [_other(rank, actions, place, wants)]
    return []


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

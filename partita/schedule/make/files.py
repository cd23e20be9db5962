"""Schedules of a user's own, proven before anything starts: those that update under way too. Updates at the
end say what every step does, and are left to it.

A file that updates a stage before its last backward is asynchronous. PipeDream's list runs ahead into the
next step, as the named schedule does; any other ends its step:

    0F0,0F1,0B0,0U0,0F2,0B1,0U1,0B2,0U2      0F2 uses what 0U0 made, 0F0 and 0F1 what the step began with
    1F0,1B0,1U0,1F1,1B1,1U1,1F2,1B2,1U2      0U1 applies 0B1's gradient, taken at version 0, to version 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from partita.base.errors import Problem, ScheduleError
from partita.schedule.check import check
from partita.schedule.ir import Action, Schedule
from partita.schedule.make.pipedream import pipedream
from partita.schedule.staircase import marked
from partita.schedule.text import Program, read_program


def read_proven(path: str | Path) -> Schedule:
    """A file's schedule, without the updates that end a step. Raises ScheduleError with all that keeps it
    from running."""
    made, program = read_file(path)
    problems = file_problems(made, program)
    if problems:
        raise ScheduleError(f"{made.name} cannot run", problems)
    if made.is_asynchronous or "U" not in made.kinds:
        return made
    ranks = tuple(tuple(a for a in actions if a.kind != "U") for actions in made.ranks)
    return replace(made, ranks=ranks)


def read_file(path: str | Path) -> tuple[Schedule, Program | None]:
    """As read_program; PipeDream's list, by whatever name, runs ahead as PipeDream does."""
    made, program = read_program(path)
    if made.versions == "stated":
        ours = pipedream(made.num_ranks, made.num_microbatches)
        made = replace(made, versions=ours.versions) if made.ranks == ours.ranks else made
    return made, program


def file_problems(
    schedule: Schedule, program: Sequence[Sequence[Action]] | None = None
) -> list[Problem]:
    """What `check` finds; then of updates those that cannot stand where they do."""
    problems = check(schedule, program)
    if problems or "U" not in schedule.kinds:
        return problems
    return [*(_stated(schedule) if schedule.versions == "stated" else _ends(schedule))]


def _ends(schedule: Schedule) -> Iterator[Problem]:
    """Of a file whose updates stand behind the backwards: each stage has one, or none has any."""
    if schedule.is_asynchronous:
        return
    for rank, actions in enumerate(schedule.ranks):
        last = {a.stage: i for i, a in enumerate(actions)}
        count = Counter(a.stage for a in actions if a.kind == "U")
        for stage in (s for s in last if count[s] != 1):
            times = f"{count[stage]} updates" if count[stage] else "no update"
            why = "a step ends with one of every stage, which a file has once a stage or not at all"
            yield _wrong("ordered", rank, actions, last[stage], f"stage {stage} has {times}", why)


def _stated(schedule: Schedule) -> Iterator[Problem]:
    """Of a list that updates under way: an update takes all gradients since the one before and is numbered
    after the last of them, none is left, and stages have equally many; what overlaps has one version."""
    if schedule.is_bidirectional:
        rank, place = next(
            (rank, place)
            for rank, actions in enumerate(schedule.ranks)
            for place, action in enumerate(actions)
            if action.kind == "U"
        )
        why = "an update is of both copies' gradients, which are added up when a step ends"
        words = "updates a stage of two copies under way"
        yield _wrong("asynchronous", rank, schedule.ranks[rank], place, words, why)
        return
    made = Counter(a.stage for a in schedule.actions() if a.kind == "U")
    for rank, actions in enumerate(schedule.ranks):
        waiting: dict[
            int, int
        ] = {}  # by stage the place of the last gradient that no update has taken
        last: dict[int, int] = {}
        for place, action in enumerate(actions):
            last[action.stage] = place
            if action.kind in ("B", "W"):
                waiting[action.stage] = place
            elif action.kind == "U":
                yield from _taken(rank, actions, place, waiting.pop(action.stage, None))
            if action in schedule.paired:
                why = "each would need its weights in the other's place"
                words = "stands in a pair, and versions change between F and B"
                yield _wrong("asynchronous", rank, actions, place, words, why)
        for stage, place in waiting.items():
            why = "gradients that no update takes would be lost: each stage ends with a U"
            yield _wrong("asynchronous", rank, actions, place, f"no {stage}U follows", why)
        for stage, place in last.items():
            if stage not in waiting and made[stage] != made[0]:
                words = f"stage {stage} has {made[stage]} updates, stage 0 has {made[0]}"
                why = "a gradient is times the updates of a step, of which all stages have as many"
                yield _wrong("asynchronous", rank, actions, place, words, why)


def _taken(
    rank: int, actions: Sequence[Action], place: int, gradient: int | None
) -> Iterator[Problem]:
    """Whether the update at a place takes the gradient that its number says."""
    if gradient is None:
        why = "an update takes the gradients since the one before"
        yield _wrong("asynchronous", rank, actions, place, "no gradient to take", why)
    elif actions[gradient].microbatch != actions[place].microbatch:
        why = "an update is numbered after the last gradient that it takes"
        words = f"takes gradients up to {actions[gradient]}"
        yield _wrong("asynchronous", rank, actions, place, words, why)


def _wrong(
    rule: str, rank: int, actions: Sequence[Action], place: int, words: str, why: str
) -> Problem:
    has = str(actions[place])
    message = f"rank {rank} runs {has}, and {words}: {why}\n{marked(rank, actions, place, words)}"
    return Problem("schedule", rule, message, asked=has)

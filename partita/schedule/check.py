"""Proves that a schedule can run: all of what is wrong with it at once.

complete   every stage runs F, and B or (I and W), of every microbatch once; F alone is a schedule too
placed     on the rank that the placement names
ordered    a rank runs what it needs from itself first
paired     every SEND has its RECV, with one key, on the ranks that hold the two stages
alive      no rank waits for ever, receives posted and sends not blocking (a deadlock names who
           waits for whom)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from partita.base.errors import Problem, ScheduleError
from partita.schedule.clock import clock
from partita.schedule.ir import COMPUTE, Action, Schedule, makes, needs
from partita.schedule.passes import with_communication

_SHOWN = 6  # names in one message


def check(schedule: Schedule) -> list[Problem]:
    """Everything that keeps the schedule from running; empty when it can.

    Deadlock is looked for only when each rank's own list is sound: a missing action would only show
    up a second time.
    """
    problems = [*_complete(schedule), *_placed(schedule)]
    if not problems:
        problems = [*_ordered(schedule), *_paired(schedule, with_communication(schedule))]
        problems += _alive(schedule)
    return problems


def checked(schedule: Schedule) -> Schedule:
    """The schedule itself, when it can run. Raises ScheduleError with every problem."""
    problems = check(schedule)
    if problems:
        raise ScheduleError(f"{schedule.name} cannot run", problems)
    return schedule


def _problem(rule: str, message: str, asked: str = "") -> Problem:
    return Problem("schedule", rule, message, asked=asked)


def _names(actions: Sequence[Action]) -> str:
    more = f" and {len(actions) - _SHOWN} more" if len(actions) > _SHOWN else ""
    return " ".join(map(str, actions[:_SHOWN])) + more


def _complete(schedule: Schedule) -> list[Problem]:
    problems = []
    counts = Counter(schedule.actions())
    strange = sorted(a for a in counts if a.kind not in COMPUTE or not _in_range(schedule, a))
    if strange:
        problems.append(
            _problem(
                "in_range",
                f"{_names(strange)}: stages are 0 to {schedule.num_stages - 1}, microbatches 0 to "
                f"{schedule.num_microbatches - 1}, kinds {' '.join(COMPUTE)}",
            )
        )
    twice = sorted(a for a, n in counts.items() if n > 1)
    twice += sorted(
        a for a in counts if a.kind == "B" and any(a._replace(kind=k) in counts for k in "IW")
    )
    if twice:
        problems.append(_problem("duplicate_free", f"done twice: {_names(twice)}"))
    missing = _missing(schedule, set(counts))
    if missing:
        problems.append(_problem("complete", f"never done: {_names(missing)}"))
    return problems


def _in_range(schedule: Schedule, action: Action) -> bool:
    return action.stage < schedule.num_stages and action.microbatch < schedule.num_microbatches


def _missing(schedule: Schedule, present: set[Action]) -> list[Action]:
    backward = not all(a.kind == "F" for a in present)
    missing = []
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            f, b, i, w = (Action(stage, kind, microbatch) for kind in "FBIW")
            missing += [f] if f not in present else []
            if backward and b not in present:
                halves = [a for a in (i, w) if a not in present]
                missing += [b] if len(halves) == 2 else halves
    return missing


def _placed(schedule: Schedule) -> list[Problem]:
    wrong = [
        (rank, action)
        for rank, actions in enumerate(schedule.ranks)
        for action in actions
        if _in_range(schedule, action) and schedule.rank_of(action.stage, action.microbatch) != rank
    ]
    return [
        _problem(
            "placed",
            f"rank {rank} runs {action}, but stage {action.stage} lies on "
            f"rank {schedule.rank_of(action.stage, action.microbatch)}",
        )
        for rank, action in wrong[:_SHOWN]
    ]


def _ordered(schedule: Schedule) -> list[Problem]:
    problems = []
    for rank, actions in enumerate(schedule.ranks):
        own = {result for action in actions for result in makes(action)}
        done: set[Action] = set()
        early = []
        for action in actions:
            early += [
                action for n in needs(action, schedule.num_stages) if n in own and n not in done
            ]
            done.update(makes(action))
        if early:
            names = _names(list(dict.fromkeys(early)))
            message = f"rank {rank} runs {names} before what it needs from itself"
            problems.append(_problem("ordered", message))
    return problems


def _paired(schedule: Schedule, ranks: Sequence[Sequence[Action]]) -> list[Problem]:
    sent, received = Counter(), Counter()
    for rank, actions in enumerate(ranks):
        for a in (a for a in actions if a.is_send or a.is_receive):
            peer = schedule.rank_of(a.peer_stage, a.microbatch)
            (sent if a.is_send else received)[
                (a.key, (rank, peer) if a.is_send else (peer, rank))
            ] += 1
    return [
        _problem(
            "paired",
            f"{what} of microbatch {microbatch} for stage {stage}, rank {source} to {target}: "
            f"{sent[message]} sent, {received[message]} received",
        )
        for message in sorted({*sent, *received})
        if sent[message] != 1 or received[message] != 1
        for (what, stage, microbatch), (source, target) in [message]
    ][:_SHOWN]


def _alive(schedule: Schedule) -> list[Problem]:
    try:
        clock(schedule)
    except ScheduleError as error:
        return [_problem("alive", error.message.removeprefix(f"{schedule.name}: "))]
    return []

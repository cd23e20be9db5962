"""Proves that a schedule can run: all of what is wrong with it at once, with a picture of each.

complete   every stage runs F, and B or (I and W), of every microbatch once; F alone is a schedule too
placed     on the rank that the placement names
ordered    a rank runs what it needs from itself first, and an update behind the gradients it takes; what a
           file lists of weights, gradients and activations (misplaced.py) stands where it can, once
overlapped a pair is an F, then a B or an I of another microbatch, and no more
paired     every SEND has its RECV, with one key, on the ranks that hold the two stages
alive      no rank waits for ever on the send/receive program, whether the network buffers without limit
           or not at all (a deadlock names who waits for whom)
memory     no rank holds more activations than allowed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from partita.base.errors import Problem, ScheduleError
from partita.schedule.clock import Costs, StageCosts, schedule_starts
from partita.schedule.ir import COMMUNICATION, COMPUTE, Action, Schedule, makes, needs
from partita.schedule.misplaced import misplaced
from partita.schedule.passes import with_communication
from partita.schedule.rendezvous import Wait, steps_of, waits
from partita.schedule.staircase import marked, staircase

_SHOWN = 6  # names in one message
_PICTURES = 3  # pictures of one rule


def check(schedule: Schedule, program: Sequence[Sequence[Action]] | None = None) -> list[Problem]:
    """Everything that keeps the schedule from running; empty when it can.

    `program` is its actions with those of passes among them; where it has neither SEND nor RECV, those of
    `with_communication` are added.
    Pairing and deadlock are looked for only when each rank's own list is sound: a missing action would
    only show up a second time.
    """
    problems = [*_complete(schedule), *_placed(schedule)]
    if not problems:
        lists = program or ()
        sends = any(a.kind in COMMUNICATION for actions in lists for a in actions)
        messages = lists if sends else with_communication(schedule)
        problems = [*_ordered(schedule), *_misplaced(schedule, lists)]
        problems += _overlapped(schedule)
        problems += _paired(schedule, messages)
        problems += [] if problems else _alive(schedule, messages)
    return problems


def _problem(rule: str, message: str) -> Problem:
    return Problem("schedule", rule, message)


def _shown(pictures: Sequence[str]) -> str:
    return "".join(f"\n{picture}" for picture in pictures[:_PICTURES])


def _places(schedule: Schedule, wanted: set[Action], words: str, nth: int = 0) -> list[str]:
    """A picture of each wanted action, at its (nth+1)-th place on a rank where it has one."""
    found = []
    for rank, actions in enumerate(schedule.ranks):
        seen: Counter[Action] = Counter()
        for i, action in enumerate(actions):
            if action in wanted and seen[action] == nth:
                found.append(marked(rank, actions, i, words))
            seen[action] += 1
    return found


def _names(actions: Sequence[Action]) -> str:
    more = f" and {len(actions) - _SHOWN} more" if len(actions) > _SHOWN else ""
    return " ".join(map(str, actions[:_SHOWN])) + more


def _complete(schedule: Schedule) -> list[Problem]:
    problems = []
    counts = Counter(schedule.actions())
    strange = {a for a in counts if a.kind not in COMPUTE or not _in_range(schedule, a)}
    if strange:
        limits = (
            f"{_names(sorted(strange))}: stages are 0 to {schedule.num_stages - 1}, microbatches 0 to "
            f"{schedule.num_microbatches - 1}, kinds {' '.join(COMPUTE)}"
        )
        pictures = _places(schedule, strange, "does not exist")
        problems.append(_problem("in_range", limits + _shown(pictures)))
    twice = {a for a, n in counts.items() if n > 1}
    whole = {a for a in counts if a.kind == "B" and any(a._replace(kind=k) in counts for k in "IW")}
    if twice or whole:
        pictures = _places(schedule, twice, "a second time", nth=1)
        pictures += _places(schedule, whole, "and its half I or W besides")
        names = _names(sorted(twice | whole))
        problems.append(_problem("duplicate_free", f"done twice: {names}{_shown(pictures)}"))
    missing = _missing(schedule, set(counts))
    if missing:
        pictures = [_gap(schedule, action) for action in missing[:_PICTURES]]
        message = f"never done: {_names(missing)}{_shown(pictures)}"
        problems.append(_problem("complete", message))
    return problems


def _gap(schedule: Schedule, action: Action) -> str:
    """Where a missing action would stand: behind the last one of its stage before its microbatch."""
    rank = schedule.rank_of(action.stage, action.microbatch)
    actions = schedule.ranks[rank]
    own = [i for i, a in enumerate(actions) if a.stage == action.stage]
    before = [i for i in own if actions[i].microbatch <= action.microbatch]
    place = max(before or own or [0])
    return marked(rank, actions, place, f"{action} is missing from here on")


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
        (rank, place, action)
        for rank, actions in enumerate(schedule.ranks)
        for place, action in enumerate(actions)
        if _in_range(schedule, action) and schedule.rank_of(action.stage, action.microbatch) != rank
    ]
    return [
        _problem(
            "placed",
            f"rank {rank} runs {action}, but stage {action.stage} lies on rank "
            f"{schedule.rank_of(action.stage, action.microbatch)}"
            + _shown([marked(rank, schedule.ranks[rank], place, "is not of this rank")]),
        )
        for rank, place, action in wrong[:_PICTURES]
    ]


def _ordered(schedule: Schedule) -> list[Problem]:
    problems = []
    for rank, actions in enumerate(schedule.ranks):
        own = {result for action in actions for result in makes(action)}
        done: set[Action] = set()
        early: list[int] = []
        for place, action in enumerate(actions):
            wanted = own.intersection(needs(action, schedule.num_stages))
            if action.kind == "U" and schedule.versions != "stated":  # which take what is there
                wanted = {
                    r for r in own if r[:2] == (action.stage, "W") and r[2] <= action.microbatch
                }
            early += [place] if wanted - done else []
            done.update(makes(action))
        if early:
            names = _names([actions[place] for place in early])
            message = f"rank {rank} runs {names} before what it needs from itself"
            pictures = [marked(rank, actions, place, "too early") for place in early]
            problems.append(_problem("ordered", message + _shown(pictures)))
    return problems


def _overlapped(schedule: Schedule) -> list[Problem]:
    """Pairs that cannot run overlapped: the executor lets a forward and a backward take turns, and a backward
    follows every forward of its own microbatch."""
    problems = []
    for rank, actions in enumerate(schedule.ranks):
        for place, first in enumerate(actions):
            if first not in schedule.paired or (place and actions[place - 1] in schedule.paired):
                continue
            cell = list(actions[place : place + 2])
            while cell[-1] in schedule.paired and place + len(cell) < len(actions):
                cell.append(actions[place + len(cell)])
            words = _no_pair(cell)
            if words:
                name = "+".join(map(str, cell))
                picture = marked(rank, actions, place, words)
                message = f"rank {rank} runs {name} as one pair, but {words}"
                problems.append(_problem("overlapped", message + _shown([picture])))
    return problems[:_PICTURES]


def _no_pair(cell: Sequence[Action]) -> str:
    """Why these actions are no pair; empty where they are one."""
    if len(cell) != 2:
        return "a pair is two actions"
    first, second = cell
    if first.kind != "F" or second.kind not in ("B", "I"):
        return "a pair is an F first, then a B or an I"
    if first.microbatch == second.microbatch:
        return f"{second} needs {first}: a pair is of two microbatches"
    return ""


def _misplaced(schedule: Schedule, ranks: Sequence[Sequence[Action]]) -> list[Problem]:
    problems = []
    for rank, actions in enumerate(ranks):
        for place, words in misplaced(schedule, rank, actions)[:_PICTURES]:
            message = f"rank {rank} runs {actions[place]} {words}"
            problems.append(
                _problem("ordered", message + _shown([marked(rank, actions, place, words)]))
            )
    return problems


def _paired(schedule: Schedule, ranks: Sequence[Sequence[Action]]) -> list[Problem]:
    sent, received = Counter(), Counter()
    places = {}
    for rank, actions in enumerate(ranks):
        for place, a in enumerate(actions):
            stage, kind, microbatch = a
            if kind not in COMMUNICATION:
                continue
            peer_stage, sends = a.peer_stage, a.is_send
            exists = 0 <= peer_stage < schedule.num_stages
            exists = exists and 0 <= microbatch < schedule.num_microbatches
            peer = schedule.rank_of(peer_stage, microbatch) if exists else -1
            key = (kind[-1], peer_stage if sends else stage, microbatch)
            message = (key, (rank, peer) if sends else (peer, rank))
            count = sent if sends else received
            count[message] = count.get(message, 0) + 1
            places[message] = rank, place
    wrong = sorted(m for m in places if sent[m] != 1 or received[m] != 1)
    problems = []
    for message in wrong[:_SHOWN]:
        (what, stage, microbatch), (source, target) = message
        rank, place = places[message]
        times = f"{sent[message]} sent, {received[message]} received"
        words = f"{what} of microbatch {microbatch} for stage {stage}, rank {source} to {target}: {times}"
        picture = marked(rank, ranks[rank], place, times)
        problems.append(_problem("paired", words + _shown([picture])))
    return problems


def _alive(schedule: Schedule, program: Sequence[Sequence[Action]]) -> list[Problem]:
    steps = steps_of(schedule, program)
    for buffered, network in (
        (True, ""),
        (False, " where the network buffers nothing and keeps the order of sends"),
    ):
        blocked = waits(schedule, program, buffered, steps)
        if blocked:
            lines = [f"deadlock{network}", *(_waits(schedule, wait) for wait in blocked)]
            picture = _staircase(schedule, program, blocked)
            return [_problem("alive", "\n".join([*lines, picture]))]
    return []


def _waits(schedule: Schedule, wait: Wait) -> str:
    return (
        f"  rank {wait.rank}: {wait.action} waits for {' '.join(map(str, _makers(schedule, wait)))}"
    )


def _makers(schedule: Schedule, wait: Wait) -> list[Action]:
    """The actions that would make what is missing."""
    wanted = set(wait.missing)
    return [a for a in schedule.actions() if wanted.intersection(makes(a))] or list(wait.missing)


def _staircase(
    schedule: Schedule, program: Sequence[Sequence[Action]], blocked: Sequence[Wait]
) -> str:
    """What ran before nothing moved, a slot an action, and who waits for what."""
    done = [list(actions) for actions in program]
    for wait in blocked:
        done[wait.rank] = done[wait.rank][: wait.place]
    sums = Costs((StageCosts(U=1.0),) * schedule.num_stages)
    ran = [[a for a in actions if a.kind in COMPUTE] for actions in done]
    starts = schedule_starts(schedule, sums, ran)
    rows = [
        [(round(start), action) for start, action in zip(at, actions, strict=True)]
        for at, actions in zip(starts, ran, strict=True)
    ]
    words = {w.rank: _waits(schedule, w).partition(": ")[2] for w in blocked}
    return staircase(rows, words)


def limits_by_rank(limit: float | Sequence[float], num_ranks: int) -> list[float]:
    """One limit for all ranks, or one for each. Raises ScheduleError where they are of another number."""
    if isinstance(limit, int | float):
        return [limit] * num_ranks
    if len(limit) != num_ranks:
        raise ScheduleError(
            f"{len(limit)} limits ({', '.join(f'{x:g}' for x in limit)}) for {num_ranks} ranks: one for all "
            "of them is wanted, or one for each"
        )
    return list(limit)


def over_limit(
    schedule: Schedule,
    limit: float | Sequence[float],
    sizes: Sequence[float] | None = None,
    unit: str = "activations",
) -> list[Problem]:
    """Where a rank holds more than `limit`, of all ranks or one for each: the first action that goes beyond.

    `sizes[stage]` is what a microbatch holds there, 1/v by default: the limit is then in whole shares.
    """
    v = schedule.virtual_stages
    size = sizes or [1 / v] * schedule.num_stages
    problems = []
    freed = {(a.stage, a.microbatch) for a in schedule.actions() if a.kind in "BW"}
    limits = limits_by_rank(limit, len(schedule.ranks))
    for rank, actions in enumerate(schedule.ranks):
        held, most = 0.0, limits[rank]
        for place, (stage, kind, microbatch) in enumerate(actions):
            held += size[stage] if kind == "F" and (stage, microbatch) in freed else 0.0
            held -= size[stage] if kind in "BW" else 0.0
            if held > most * (1 + 1e-12):
                words = f"{held:.6g} {unit}, the limit is {most:.6g}"
                message = f"rank {rank} holds {words}, from {actions[place]} on"
                picture = marked(rank, actions, place, words)
                problems.append(_problem("memory", message + _shown([picture])))
                break
    return problems

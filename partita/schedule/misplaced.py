"""Where a user's file has actions of weights, gradients and activations that cannot stand there.

What residence.py adds stands as follows, and so must what a file lists:

    UNSHARD  before the stage is computed with, once, and again only behind a RESHARD
    RESHARD  behind a use, once; no F, B or I of the stage before the next UNSHARD
    REDUCE   once, behind the stage's last B or W before its U, or before the end; one with a microbatch's
             number behind the B or W of that microbatch
    OFFLOAD  once, behind F; its RELOAD once, behind it and before the B or I of the microbatch
    FREE     once, behind the last reader of what F kept
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from partita.schedule.ir import ACTIVATIONS, COMPUTE, STEP, WEIGHTS, Action, Schedule

Found = tuple[int, str]  # a place in the rank's list, and what is wrong there
Line = list[tuple[int, Action]]  # some actions of the list with their places, in order
_WHOLE = ("F", "B", "I")  # need whole weights; W multiplies what F kept by a gradient
_GRADIENT = ("B", "W")


def misplaced(schedule: Schedule, rank: int, actions: Sequence[Action]) -> list[Found]:
    """Of one rank's list, in order; its compute is complete and in order."""
    found = dict(_foreign(schedule, rank, actions))
    stages: dict[int, Line] = {}
    chunks: dict[tuple[int, int], Line] = {}
    for i, action in enumerate(actions):
        if i in found:
            continue
        if action.kind in WEIGHTS or action.kind in COMPUTE:
            stages.setdefault(action.stage, []).append((i, action))
        if action.kind in ACTIVATIONS or action.kind in COMPUTE:
            chunks.setdefault((action.stage, action.microbatch), []).append((i, action))
    for line in stages.values():
        found |= {**dict(_shards(line)), **dict(_reductions(line))}
    for line in chunks.values():
        if any(action.kind in ACTIVATIONS for _, action in line):
            found |= {**dict(_away(line)), **dict(_freed(line))}
    return sorted(found.items())


def _foreign(schedule: Schedule, rank: int, actions: Sequence[Action]) -> Iterator[Found]:
    for i, (stage, kind, microbatch) in enumerate(actions):
        if kind not in WEIGHTS and kind not in ACTIVATIONS:
            continue
        if stage >= schedule.num_stages or microbatch >= schedule.num_microbatches:
            yield i, "of a stage or microbatch that does not exist"
        elif kind in WEIGHTS and rank not in schedule.ranks_of(stage):
            yield i, f"of a stage that lies on rank {schedule.rank_of(stage)}"
        elif kind in ACTIVATIONS and rank != schedule.rank_of(stage, microbatch):
            yield i, f"of a stage that lies on rank {schedule.rank_of(stage, microbatch)}"


def _shards(line: Line) -> Iterator[Found]:
    """Of one stage. Without an UNSHARD before the first use the weights are whole from the beginning."""
    gathered = -1  # the place of an UNSHARD that nothing has used yet
    whole: bool | None = None
    for i, action in line:
        if action.kind == "UNSHARD":
            if whole:
                yield i, "though the weights are whole"
            whole, gathered = True, i
        elif action.kind == "RESHARD":
            if not whole or gathered >= 0:
                yield i, "before a use of whole weights"
            whole, gathered = False, -1
        elif action.kind in _WHOLE:
            if whole is False:
                yield i, "after a RESHARD, with no UNSHARD between"
            whole, gathered = True, -1
        elif action.kind == "W":  # residence.py and torch gather for it too
            gathered = -1
    if gathered >= 0:
        yield gathered, "for nothing: no use of the weights follows"


def _reductions(line: Line) -> Iterator[Found]:
    """Of one stage, from update to update."""
    made: set[int] = set()  # microbatches whose gradients are there
    done: set[int] = set()  # those that have been reduced, STEP for the sum
    for at, (i, action) in enumerate(line):
        kind, microbatch = action.kind, action.microbatch
        if kind in _GRADIENT:
            made.add(microbatch)
        elif kind == "U":
            made, done = set(), set()
        elif kind == "REDUCE":
            later = _next_gradient(line[at + 1 :]) if microbatch == STEP else None
            if done and (STEP in done or microbatch in (STEP, *done)):
                yield i, "a second time"
            elif later is not None:
                yield i, f"before the gradient of {later}"
            elif not made or microbatch not in (STEP, *made):
                yield i, "where there is no gradient of it"
            done.add(microbatch)


def _next_gradient(line: Line) -> Action | None:
    """The first B or W before the stage's next U."""
    for _, action in line:
        if action.kind in (*_GRADIENT, "U"):
            return action if action.kind != "U" else None
    return None


def _away(line: Line) -> Iterator[Found]:
    """OFFLOAD and RELOAD of one microbatch of one stage."""
    at, away, back = "before its F", -1, -1
    for i, action in line:
        if action.kind == "F":
            at = ""
        elif action.kind in ("B", "I"):
            at = f"behind {action}"
        elif action.kind == "OFFLOAD":
            if at or away >= 0:
                yield i, at or "a second time"
            else:
                away = i
        elif action.kind == "RELOAD":
            if at or away < 0 or back >= 0:
                yield i, at or ("a second time" if back >= 0 else "of what no OFFLOAD moved")
            back = i
    if away > back:
        yield away, "with no RELOAD before its backward"


def _freed(line: Line) -> Iterator[Found]:
    """FREE of one microbatch of one stage."""
    freed = False
    for at, (i, action) in enumerate(line):
        if action.kind == "FREE":
            readers = [str(a) for _, a in line[at + 1 :] if a.kind in COMPUTE and a.kind != "U"]
            if freed or readers:
                yield i, "a second time" if freed else f"before {readers[-1]}, which reads it"
            freed = True

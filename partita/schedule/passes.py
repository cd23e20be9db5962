"""Passes over schedules: communication added around compute, halves split and joined.

What they add for weights and activations is in residence.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from partita.schedule.ir import Action, Schedule


def receives_of(schedule: Schedule, action: Action) -> tuple[Action, ...]:
    """The RECV that brings what `action` needs from another rank; none where it is at hand.

    The turn of a V, where neighbouring stages lie on one rank, needs no message.
    """
    stage, kind, microbatch = action
    source = {"F": stage - 1, "B": stage + 1, "I": stage + 1}.get(kind, -1)
    if not 0 <= source < schedule.num_stages:
        return ()
    if schedule.rank_of(source, microbatch) == schedule.rank_of(stage, microbatch):
        return ()
    return (Action(stage, "RECV_F" if kind == "F" else "RECV_B", microbatch),)


def sends_of(schedule: Schedule, action: Action) -> tuple[Action, ...]:
    """The SEND that hands the result of `action` to another rank; none where nobody there needs it."""
    stage, kind, microbatch = action
    target = {"F": stage + 1, "B": stage - 1, "I": stage - 1}.get(kind, -1)
    if not 0 <= target < schedule.num_stages:
        return ()
    if schedule.rank_of(target, microbatch) == schedule.rank_of(stage, microbatch):
        return ()
    return (Action(stage, "SEND_F" if kind == "F" else "SEND_B", microbatch),)


def with_communication(schedule: Schedule, ahead: int = 1) -> tuple[tuple[Action, ...], ...]:
    """Each rank's actions with SEND and RECV among them: what the executor runs.

    A RECV *posts* a receive and never waits; the compute action that needs the tensor waits for it. It
    stands `ahead` compute actions early, so that the message travels behind the compute before it. A
    SEND stands right behind the action that made its tensor, and does not wait for the receiver: 1F1B
    would deadlock under blocking sends. Messages are keyed (`Action.key`), because two chunks that
    share a pair of ranks are consumed in another order than produced.

    >>> from partita.schedule.make import schedule
    >>> s = schedule("1f1b", num_ranks=2, num_microbatches=2)
    >>> for actions in with_communication(s):
    ...     print(*actions)
    0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1
    1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1
    """
    out = []
    for actions in schedule.ranks:
        posts = [receives_of(schedule, action) for action in actions]
        program: list[Action] = [post for early in posts[:ahead] for post in early]
        for i, action in enumerate(actions):
            program += posts[i + ahead] if i + ahead < len(posts) else ()
            program.append(action)
            program += sends_of(schedule, action)
        out.append(tuple(program))
    return tuple(out)


def in_pairs(
    actions: Sequence[Action], paired: frozenset[Action]
) -> tuple[tuple[Action, ...], ...]:
    """A rank's program, action by action; a paired one stands with the compute action behind it, as they
    overlap: receives between them are posted before both, and so does what comes back; sends follow both, and
    so does what leaves.

    >>> from partita.schedule.make import schedule
    >>> s = schedule("dualpipe", num_ranks=2, num_microbatches=4)
    >>> program = in_pairs(with_communication(s)[0], s.paired)
    >>> [" ".join(map(str, group)) for group in program if len(group) == 2]
    ['1F3 0B0']
    """
    found: list[tuple[Action, ...]] = []
    waiting: list[Action] = []  # what follows both, since the first of a pair
    first: Action | None = None
    for action in actions:
        if first is None and action not in paired:
            found.append((action,))
        elif first is None:
            first = action
        elif action.is_send or action.kind == "OFFLOAD":
            waiting.append(action)
        elif action.is_receive or action.kind == "RELOAD":
            found.append((action,))
        else:
            found += [(first, action), *((a,) for a in waiting)]
            first, waiting = None, []
    return tuple(found)


def warm_up(
    actions: Sequence[Action], paired: frozenset[Action] = frozenset()
) -> tuple[Action, ...]:
    """A rank's program before its first backward, or pair with one: what may be run again with other weights.

    >>> from partita.schedule.make import schedule
    >>> print(*warm_up(with_communication(schedule("1f1b", num_ranks=2, num_microbatches=2))[0]))
    0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1
    """
    return tuple(takewhile(lambda a: a.kind not in ("B", "I") and a not in paired, actions))


def fused(schedule: Schedule) -> Schedule:
    """I with the W of its microbatch right behind it becomes B: one backward costs less than two halves.

    >>> from partita.schedule.make import schedule
    >>> print(fused(schedule("zb_h1", num_ranks=2, num_microbatches=2)))
    0F0,0F1,0B0,0B1
    1F0,1I0,1F1,1I1,1W0,1W1
    """
    ranks = []
    for actions in schedule.ranks:
        row: list[Action] = []
        for action in actions:
            half = action._replace(kind="I")
            if action.kind == "W" and row and row[-1] == half and half not in schedule.paired:
                row[-1] = action._replace(kind="B")
            else:
                row.append(action)
        ranks.append(tuple(row))
    return replace(schedule, ranks=tuple(ranks))


def halved(schedule: Schedule) -> Schedule:
    """Every B as I with its W right behind it: the gradient leaves before the weight half runs."""

    def halves(action: Action) -> tuple[Action, ...]:
        kinds = "IW" if action.kind == "B" else ()
        return tuple(action._replace(kind=kind) for kind in kinds) or (action,)

    ranks = tuple(tuple(h for a in actions for h in halves(a)) for actions in schedule.ranks)
    return replace(schedule, ranks=ranks)


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards alone, in order, for evaluation; a bidirectional one still feeds both ends."""
    ranks = tuple(tuple(a for a in actions if a.kind == "F") for actions in schedule.ranks)
    return replace(
        schedule, name=f"{schedule.name} forward", ranks=ranks, paired=frozenset(), versions="flush"
    )

"""Passes over schedules: communication added around compute, steps repeated."""

from __future__ import annotations

from dataclasses import replace

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


def repeat(schedule: Schedule, steps: int) -> Schedule:
    """The schedule run `steps` times back to back, its microbatches numbered on: no barrier between."""
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

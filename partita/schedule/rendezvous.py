"""Runs the send/receive program of a schedule without time, to prove that no rank waits for ever.

Receives are posted and never wait, sends are issued and never wait; a compute action waits for what it
needs. Between two ranks every channel (Action.channel: one a direction and consuming stage) is a lane of
its own. Two extremes of what a network may do:

    unlimited buffering   a message is there once it is sent and its receive is posted; keys match them
    no buffering          a lane carries one message at a time, in the order of its sends, when its
                          receive is the first one posted on the lane: an order that differs on the two
                          ends blocks the lane, as it would with NCCL, which ignores keys
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from partita.schedule.ir import COMPUTE, Action, Schedule, makes, needs

Lane = tuple[tuple[str, int], int, int]  # channel, source rank, target rank
Message = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank that waits for ever, at place `place` of its program, for these results."""

    rank: int
    place: int
    action: Action
    missing: tuple[Action, ...]


class Step(NamedTuple):
    """An action: what it waits for, each with the message that brings it from another rank, what it leaves,
    and of a SEND or RECV the lane and the message."""

    wanted: tuple[tuple[Action, Message | None], ...]
    results: tuple[Action, ...]
    lane: Lane | None
    message: Message
    sends: bool


Steps = list[list[Step]]
_NONE: Message = ("", 0, 0)


def steps_of(schedule: Schedule, program: Sequence[Sequence[Action]]) -> Steps:
    """The program as `waits` runs it: what does not change with the network, found once."""
    return [[_step(schedule, rank, a) for a in actions] for rank, actions in enumerate(program)]


def _step(schedule: Schedule, rank: int, action: Action) -> Step:
    stage, kind, microbatch = action
    if kind in COMPUTE:
        wanted = tuple(
            [
                (n, None if n[0] == stage else (n[1], stage, microbatch))
                for n in needs(action, schedule.num_stages)
            ]
        )
        return Step(wanted, makes(action), None, _NONE, False)
    sends = action.is_send
    if not sends and not action.is_receive:
        return Step((), (), None, _NONE, False)
    what, peer_stage = action.what, action.peer_stage
    key = (what, peer_stage if sends else stage, microbatch)
    peer = schedule.rank_of(peer_stage, microbatch)
    if sends:
        own = ((Action(stage, what, microbatch), None),)
        return Step(own, (), (key[:2], rank, peer), key, True)
    return Step((), (), (key[:2], peer, rank), key, False)


class _Network:
    """Lanes, what is issued on their two ends and has not met, and the messages that have arrived."""

    def __init__(self, buffered: bool) -> None:
        self.buffered, self.arrived = buffered, set[Message]()
        self.open = Counter[tuple[Lane, Message, bool]]()  # with buffers
        self.queues: dict[Lane, tuple[deque[Message], deque[Message]]] = {}  # without: sent, posted

    def issue(self, lane: Lane, message: Message, sends: bool) -> None:
        """Issues a SEND or RECV; what it lets through arrives."""
        if self.buffered:
            if self.open[lane, message, not sends]:
                self.open[lane, message, not sends] -= 1
                self.arrived.add(message)
            else:
                self.open[lane, message, sends] += 1
            return
        sent, posted = self.queues.setdefault(lane, (deque(), deque()))
        (sent if sends else posted).append(message)
        while sent and posted and sent[0] == posted[0]:
            self.arrived.add(sent.popleft())
            posted.popleft()


def waits(
    schedule: Schedule,
    program: Sequence[Sequence[Action]],
    buffered: bool,
    steps: Steps | None = None,
) -> list[Wait]:
    """The ranks that never come to their end, and what they wait for; empty where all do. `steps` are the
    program's, where somebody has found them."""
    steps, network = steps or steps_of(schedule, program), _Network(buffered)
    done: list[set[Action]] = [set() for _ in program]
    at = [0] * len(program)

    def missing(rank: int, step: Step) -> tuple[Action, ...]:
        own, arrived = done[rank], network.arrived
        return tuple(
            n for n, by in step.wanted if n not in own and (by is None or by not in arrived)
        )

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(steps):
            while at[rank] < len(row):
                step = row[at[rank]]
                if step.wanted and missing(rank, step):
                    break
                if step.lane is not None:
                    network.issue(step.lane, step.message, step.sends)
                done[rank].update(step.results)
                at[rank] += 1
                moved = True
    return [
        Wait(rank, at[rank], actions[at[rank]], missing(rank, steps[rank][at[rank]]))
        for rank, actions in enumerate(program)
        if at[rank] < len(actions)
    ]

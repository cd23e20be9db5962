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

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from partita.schedule.ir import COMPUTE, Action, Schedule, makes, needs

Lane = tuple[tuple[str, int], int, int]  # channel, source rank, target rank
Message = tuple[str, int, int]


@dataclass
class _Ends:
    """What is issued on the two ends of a lane and has not met."""

    sent: deque[Message] = field(default_factory=deque)
    posted: deque[Message] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank that waits for ever, at place `place` of its program, for these results."""

    rank: int
    place: int
    action: Action
    missing: tuple[Action, ...]


class _Network:
    """Lanes, and the messages that have arrived."""

    def __init__(self, schedule: Schedule, buffered: bool) -> None:
        self.schedule, self.buffered = schedule, buffered
        self.lanes: dict[Lane, _Ends] = {}
        self.arrived: set[Message] = set()

    def issue(self, rank: int, action: Action) -> None:
        """Issues a SEND or RECV; what it lets through arrives."""
        peer = self.schedule.rank_of(action.peer_stage, action.microbatch)
        source, target = (rank, peer) if action.is_send else (peer, rank)
        ends = self.lanes.setdefault((action.channel, source, target), _Ends())
        (ends.sent if action.is_send else ends.posted).append(action.key)
        if self.buffered:
            for key in set(ends.sent) & set(ends.posted):
                ends.sent.remove(key)
                ends.posted.remove(key)
                self.arrived.add(key)
        while ends.sent and ends.posted and ends.sent[0] == ends.posted[0]:
            self.arrived.add(ends.sent.popleft())
            ends.posted.popleft()


def waits(schedule: Schedule, program: Sequence[Sequence[Action]], buffered: bool) -> list[Wait]:
    """The ranks that never come to their end, and what they wait for; empty where all do."""
    network = _Network(schedule, buffered)
    done: list[set[Action]] = [set() for _ in program]
    at = [0] * len(program)

    def missing(rank: int, action: Action) -> tuple[Action, ...]:
        if action.is_send:
            wanted = (Action(action.stage, action.what, action.microbatch),)
        else:
            wanted = needs(action, schedule.num_stages) if action.kind in COMPUTE else ()
        return tuple(
            need
            for need in wanted
            if need not in done[rank]
            and (
                need.stage == action.stage
                or (need.kind, action.stage, need.microbatch) not in network.arrived
            )
        )

    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(program):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                if missing(rank, action):
                    break
                if action.is_send or action.is_receive:
                    network.issue(rank, action)
                done[rank].update(makes(action))
                at[rank] += 1
                moved = True
    return [
        Wait(rank, at[rank], actions[at[rank]], missing(rank, actions[at[rank]]))
        for rank, actions in enumerate(program)
        if at[rank] < len(actions)
    ]

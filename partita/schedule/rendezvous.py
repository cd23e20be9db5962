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
from dataclasses import dataclass

from partita.schedule.ir import COMMUNICATION, COMPUTE, Action, Schedule, makes, needs

Lane = tuple[str, int, int, int]  # kind and consuming stage, source rank, target rank
_RESULTS = "FBW"  # what `needs` asks for


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank that waits for ever, at place `place` of its program, for these results."""

    rank: int
    place: int
    action: Action
    missing: tuple[Action, ...]


# An action: what it waits for, each with the message that brings it from another rank (or -1), what it
# leaves, and of a SEND or RECV the lane (else -1), the message, and whether it sends. Results and messages
# are numbers (_Rules.number): a message has that of the result, at the stage that consumes it.
Wanted = tuple[tuple[int, int], ...]
Step = tuple[Wanted, tuple[int, ...], int, int, bool]
Steps = list[list[Step]]


class _Rules:
    """`needs` and `makes` in numbers, of every microbatch by those of the first."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.lanes = schedule, dict[Lane, int]()
        self.compute: dict[tuple[int, str], tuple[list[tuple[int, int]], list[int]]] = {}
        self.ends: dict[tuple[int, int, str, int], tuple[int, int, int]] = {}  # of lanes

    @property
    def count(self) -> int:
        """Of all numbers."""
        return len(_RESULTS) * self.schedule.num_stages * self.schedule.num_microbatches

    def number(self, kind: str, stage: int, microbatch: int = 0) -> int:
        """Of a result."""
        row = _RESULTS.index(kind) * self.schedule.num_stages + stage
        return row * self.schedule.num_microbatches + microbatch

    def result(self, number: int) -> Action:
        """That has the number."""
        row, microbatch = divmod(number, self.schedule.num_microbatches)
        kind, stage = divmod(row, self.schedule.num_stages)
        return Action(stage, _RESULTS[kind], microbatch)

    def _of_first(self, stage: int, kind: str) -> tuple[list[tuple[int, int]], list[int]]:
        first = Action(stage, kind, 0)
        wanted = [
            (self.number(n.kind, n.stage), -1 if n.stage == stage else self.number(n.kind, stage))
            for n in needs(first, self.schedule.num_stages)
        ]
        return wanted, [self.number(r.kind, r.stage) for r in makes(first)]

    def step(self, rank: int, action: Action) -> Step:
        """What `waits` does with an action."""
        stage, kind, k = action
        if kind in COMPUTE:
            rule = self.compute.get((stage, kind))
            if rule is None:
                rule = self.compute[stage, kind] = self._of_first(stage, kind)
            wanted = [(n + k, by if by < 0 else by + k) for n, by in rule[0]]
            return tuple(wanted), tuple([n + k for n in rule[1]]), -1, -1, False
        if kind not in COMMUNICATION:
            return (), (), -1, -1, False
        way = self.schedule.direction[k] if self.schedule.direction is not None else 0
        end = self.ends.get((rank, stage, kind, way))
        if end is None:
            end = self.ends[rank, stage, kind, way] = self._end(rank, action)
        lane, message, own = end
        return () if own < 0 else ((own + k, -1),), (), lane, message + k, own >= 0

    def _end(self, rank: int, action: Action) -> tuple[int, int, int]:
        """The lane of a SEND or RECV, and of the first microbatch its message and what is sent (or -1)."""
        (stage, _, k), what, peer_stage = action, action.what, action.peer_stage
        peer = self.schedule.rank_of(peer_stage, k)
        sends = action.is_send
        to, ends = (peer_stage, (rank, peer)) if sends else (stage, (peer, rank))
        lane = self.lanes.setdefault((what, to, *ends), len(self.lanes))
        return lane, self.number(what, to), self.number(what, stage) if sends else -1


def steps_of(schedule: Schedule, program: Sequence[Sequence[Action]]) -> Steps:
    """The program as `waits` runs it: what does not change with the network, found once."""
    rules = _Rules(schedule)
    return [[rules.step(rank, a) for a in actions] for rank, actions in enumerate(program)]


class _Network:
    """Lanes, what is issued on their two ends and has not met, and the messages that have arrived."""

    def __init__(self, buffered: bool, messages: int) -> None:
        self.buffered, self.arrived = buffered, bytearray(messages)
        self.open: dict[tuple[int, int], int] = {}  # with buffers: sends less receives
        self.queues: dict[int, tuple[deque[int], deque[int]]] = {}  # without: sent, posted

    def issue(self, lane: int, message: int, sends: bool) -> None:
        """Issues a SEND or RECV; what it lets through arrives."""
        if self.buffered:
            before = self.open.get((lane, message), 0)
            self.open[lane, message] = before + (1 if sends else -1)
            if before < 0 if sends else before > 0:
                self.arrived[message] = 1
            return
        sent, posted = self.queues.setdefault(lane, (deque(), deque()))
        (sent if sends else posted).append(message)
        while sent and posted and sent[0] == posted[0]:
            self.arrived[sent.popleft()] = 1
            posted.popleft()


def waits(
    schedule: Schedule,
    program: Sequence[Sequence[Action]],
    buffered: bool,
    steps: Steps | None = None,
) -> list[Wait]:
    """The ranks that never come to their end, and what they wait for; empty where all do. `steps` are the
    program's, where somebody has found them."""
    steps, rules = steps or steps_of(schedule, program), _Rules(schedule)
    network, at = _Network(buffered, rules.count), [0] * len(program)
    done = [bytearray(rules.count) for _ in program]
    arrived, moved = network.arrived, True
    while moved:
        moved = False
        for rank, row in enumerate(steps):
            here, place = done[rank], at[rank]
            while place < len(row):
                wanted, results, lane, message, sends = row[place]
                for n, by in wanted:
                    if not here[n] and (by < 0 or not arrived[by]):
                        break
                else:
                    if lane >= 0:
                        network.issue(lane, message, sends)
                    for n in results:
                        here[n] = 1
                    place += 1
                    continue
                break
            moved = moved or place > at[rank]
            at[rank] = place

    def missing(rank: int) -> tuple[Action, ...]:
        here, wanted = done[rank], steps[rank][at[rank]][0]
        gone = [n for n, by in wanted if not (here[n] or (by >= 0 and arrived[by]))]
        return tuple(map(rules.result, gone))

    return [
        Wait(rank, at[rank], actions[at[rank]], missing(rank))
        for rank, actions in enumerate(program)
        if at[rank] < len(actions)
    ]

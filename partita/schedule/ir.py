"""Pipeline schedules are data: who does what, in which order, on which rank.

A Schedule says nothing about time or tensors. Five readers give it meaning: a generator writes it
(make/), `check` proves that it can run, `clock` gives it durations, the executor gives it tensors,
plots/timeline draws it.

An action prints as <stage><kind><microbatch>: ``2F0`` is stage 2, forward, microbatch 0. Kinds:
    F  forward              U  update (carries the last microbatch it covers)
    B  whole backward       SEND_F, RECV_F  an activation to the next, from the previous stage
    I  input-gradient half  SEND_B, RECV_B  a gradient to the previous, from the next stage
    W  weight-gradient half
and, added by passes (passes.py, residence.py); those without a microbatch print as ``2REDUCE``:
    UNSHARD, RESHARD  gather the stage's weights, drop all but the shard
    REDUCE            sum the stage's gradients over its data-parallel ranks
    OFFLOAD, RELOAD   move what F kept for one microbatch to the host, and back
    FREE              nothing needs what F kept for this microbatch any more
The names are those of torch.distributed.pipelining, so that its CSV files read and write.

Where stages lie (`placement`):
    line           stage s on rank s                   rank   0  1  2  3
    loop           stage s on rank s mod p                    0  1  2  3  /  4  5  6  7
    vee            chunk 0 down, chunk 1 up again             0  1  2  3  /  7  6  5  4
    bidirectional  two copies of every stage; direction 0     0  1  2  3
                   runs stage s on rank s, 1 on p-1-s         3  2  1  0
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Literal, NamedTuple

COMPUTE = ("F", "B", "I", "W", "U")
COMMUNICATION = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
WEIGHTS = ("UNSHARD", "RESHARD", "REDUCE")
ACTIVATIONS = ("OFFLOAD", "RELOAD", "FREE")
KINDS = COMPUTE + COMMUNICATION + WEIGHTS + ACTIVATIONS
STEP = -1  # the microbatch of an action that is of no single one

Versions = Literal["flush", "newest", "vertical", "previous", "stated"]


class Action(NamedTuple):
    """One thing that a rank does, for one stage and one microbatch."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch if self.microbatch != STEP else ''}"

    @property
    def is_send(self) -> bool:
        """Whether it hands a tensor to another stage."""
        return self.kind in ("SEND_F", "SEND_B")

    @property
    def is_receive(self) -> bool:
        """Whether it posts a receive from another stage."""
        return self.kind in ("RECV_F", "RECV_B")

    @property
    def what(self) -> str:
        """F (an activation) or B (a gradient) of a SEND or RECV; the kind itself of any other."""
        return self.kind[-1]

    @property
    def peer_stage(self) -> int:
        """The stage at the other end of a SEND or RECV."""
        return self.stage + (1 if self.kind in ("SEND_F", "RECV_B") else -1)

    @property
    def key(self) -> tuple[str, int, int]:
        """What names the message of a SEND or RECV: (F or B, the stage that consumes it, microbatch)."""
        return self.what, self.peer_stage if self.is_send else self.stage, self.microbatch

    @property
    def channel(self) -> tuple[str, int]:
        """The stream of messages it belongs to, one a direction and consuming stage: within a channel
        microbatches are consumed in the order they are sent; across channels they are not."""
        return self.key[:2]


Placement = tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """The compute actions of every rank, in order.

    `placement[stage]` is the rank that holds the stage. A bidirectional schedule has a pair of
    placements, and `direction[microbatch]` says which of them the microbatch follows. `paired` holds
    actions that run overlapped with the next one of their rank.

    `versions` says which weights a microbatch sees, counted in updates (U) of the stage:
        flush     one version a step: the schedule has no U, or has them after the last backward
        newest    F uses the newest, B the version its own F used (PipeDream's weight stashing)
        vertical  every stage uses the version that stage 0 used (PipeDream's vertical sync)
        previous  batch b uses version max(0, b-1) on every stage (PipeDream-2BW)
        stated    as newest, of a list that is the whole step: nothing is in flight when it ends (a file)
    """

    name: str
    num_ranks: int
    num_stages: int
    num_microbatches: int
    placement: Placement | tuple[Placement, Placement]
    ranks: tuple[tuple[Action, ...], ...]
    direction: tuple[int, ...] | None = None
    paired: frozenset[Action] = frozenset()
    versions: Versions = "flush"

    @property
    def virtual_stages(self) -> int:
        """Stages a rank holds in one direction."""
        return max(self.num_stages // self.num_ranks, 1)

    @property
    def is_asynchronous(self) -> bool:
        """Whether stages update their weights before the step's last backward."""
        return self.versions != "flush"

    @property
    def runs_ahead(self) -> bool:
        """Whether a stage begins the next step's microbatches before the step is over."""
        return self.versions not in ("flush", "stated")

    @property
    def is_bidirectional(self) -> bool:
        """Whether every stage has two copies, one for each direction of microbatches."""
        return self.direction is not None

    @cached_property
    def beside(self) -> frozenset[Action]:
        """Backwards that run overlapped with the forward before them on their rank."""
        return frozenset(
            second
            for actions in self.ranks
            for first, second in pairwise(actions)
            if first in self.paired and second.kind == "B"
        )

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that lie on the rank, of all directions, each once."""
        return tuple(sorted({s for way in self.placements for s, r in enumerate(way) if r == rank}))

    def ranks_of(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold a copy of the stage: one, or the two ends of a bidirectional one."""
        return tuple(dict.fromkeys(way[stage] for way in self.placements))

    @property
    def is_forward_only(self) -> bool:
        """Whether nothing runs backward."""
        return self.kinds <= {"F"}

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of its actions."""
        return frozenset(a.kind for a in self.actions())

    @cached_property
    def placements(self) -> tuple[Placement, ...]:
        """The placement of each direction: one, or two."""
        two_way = self.direction is not None
        return self.placement if two_way else (self.placement,)  # type: ignore[return-value]

    def rank_of(self, stage: int, microbatch: int = 0) -> int:
        """The rank that runs this microbatch at this stage."""
        way = self.direction[microbatch] if self.direction is not None else 0
        return self.placements[way][stage]

    def actions(self) -> Iterator[Action]:
        """All actions, rank by rank."""
        return chain.from_iterable(self.ranks)

    def __str__(self) -> str:
        from partita.schedule.text import print_schedule

        return print_schedule(self)


def needs(action: Action, num_stages: int) -> tuple[Action, ...]:
    """What must be finished before `action` may start: data dependencies only.

    An F stands for the activation; a B for the gradient of the stage's input, which B or I makes; a W
    for the gradient of its weights, which B or W makes (`makes` is the other half of this rule).
    """
    stage, kind, microbatch = action
    if kind == "F":
        return (Action(stage - 1, "F", microbatch),) if stage > 0 else ()
    if kind in ("B", "I"):
        own = Action(stage, "F", microbatch)
        return (own, Action(stage + 1, "B", microbatch)) if stage < num_stages - 1 else (own,)
    if kind == "W":
        return (Action(stage, "B", microbatch),)
    if kind == "U":
        return (Action(stage, "W", microbatch),)
    return ()


def makes(action: Action) -> tuple[Action, ...]:
    """The results that `needs` asks for, as `action` leaves them."""
    stage, kind, microbatch = action
    if kind == "B":
        return action, Action(stage, "W", microbatch)
    if kind == "I":
        return (Action(stage, "B", microbatch),)
    return (action,) if kind in ("F", "W") else ()

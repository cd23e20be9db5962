"""Runs a rank's list of actions: one small method a kind, and no schedule by name.

A rank holds any stages of the model. Each microbatch's forward is cut off at the stage's input, so that its
backward can run whenever the list says. A receive is posted when the list says and waited for when its
tensor is needed; a send never waits for its receiver; neighbours on one rank hand over without a message.
One stage without a pipeline is the same list without messages.

    F  x -> blocks -> y        keeps (x, y's graph)        sends y.detach() to the next stage
    B  dy -> blocks -> dx      frees both                  sends dx to the previous stage
    I  the same, but work on weights' gradients waits in the queue, with what it needs, until its
    W  runs that work, and frees it
    U  applies the stage's gradient (asynchronous schedules; see versions.py)
    OFFLOAD, RELOAD  what F kept goes, and is there again (offload/activations.py)

A forward and a backward that the schedule pairs take turns piece by piece, where modules have pieces
(pieces.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from partita.base.errors import NonFiniteError
from partita.comm.protocol import Comm, Handle, Key, Sent, Where
from partita.parallel.deferred import WeightQueue
from partita.parallel.pp.pieces import Cuts, Flow, backward_in_pieces, forward_in_pieces
from partita.schedule.ir import COMPUTE, Action, Schedule
from partita.schedule.passes import in_pairs, warm_up, with_communication

ACTIVITIES = {
    "F": ("F", "forward"), "B": ("B", "backward"), "I": ("I", "backward"), "W": ("W", "backward"),
    "U": ("step", "optimizer"),
}  # fmt: skip
BACKWARD = ("B", "I")
DONE = object()

Group = tuple[tuple[Action, ...], tuple[int, ...]]  # an action or a pair, stages it is the last of
MessageKey = tuple[str, int, int]  # F or B, the stage that consumes it, microbatch


class StageModule(Protocol):
    """The blocks of one stage."""

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The stage's output; x is None on the first stage. The last stage returns its share of the
        step's loss, already divided by the step's valid tokens."""
        ...


class FlowingModule(StageModule, Protocol):
    """A stage whose forward stops where rows travel."""

    def flow(self, x: Tensor | None, batch: Any) -> Flow:
        """The same forward as a generator."""
        ...


class StageWeights(Protocol):
    """Which version of the weights is in place, where a schedule updates them under way."""

    def forward(self, stage: int, microbatch: int) -> None:
        """Puts the version in place that the microbatch uses at the stage."""
        ...

    def backward(self, stage: int, microbatch: int) -> None:
        """Puts the version in place that its forward used."""
        ...

    def adds(self, stage: int, microbatch: int) -> None:
        """Its weight gradients are about to come."""
        ...


class StageKept(Protocol):
    """What F keeps for B may lie elsewhere meanwhile; `where` says of which stage and microbatch."""

    def last_leaves(self) -> None:
        """What is still there goes."""
        ...

    def last_comes(self) -> None:
        """What backward begins with is there again."""
        ...

    def forget(self) -> None:
        """Its forwards are run again, from inputs that may be away."""
        ...


@dataclass(frozen=True)
class Channel:
    """Messages of one direction to one stage: a Comm over the places of pp, on a lane of its own, and
    the site of their sender."""

    comm: Comm
    site: str  # '<block>:send'


@dataclass
class _Held:
    """What one microbatch keeps between F and B: of y the place in the graph, and the last stage's loss."""

    x: Tensor | None
    y: Tensor | GradientEdge
    cuts: Cuts


@dataclass
class Executor:
    """Executes the actions of one rank, at `place` on pp; `modules` are its stages by index.

    `activation(stage, batch, what)` has the shape and dtype of the stage's input (F) or output (B), for
    receives. `last_backward(stage)` is called before the stage's last B or W on this rank, so that
    its gradients may be reduced as they become ready. Communicates: sends of stage inputs and outputs on
    axis pp, keyed by (F or B, consuming stage, microbatch), on the channel of the first two. `update(stage)`
    is U; `weights` puts versions in place; `seed` is what backward starts from. `overlaps`: modules flow, and
    pairs take turns. `kept`: what leaves between F and B.
    """

    modules: Mapping[int, StageModule]
    schedule: Schedule
    place: int
    channels: Mapping[tuple[str, int], Channel]
    where: Where
    activation: Callable[[int, Any, str], Tensor]
    queue: WeightQueue = field(default_factory=WeightQueue)
    last_backward: Callable[[int], None] = lambda stage: None
    span: Callable[[Action], Any] | None = None
    update: Callable[[int], None] | None = None
    weights: StageWeights | None = None
    seed: float = 1.0
    overlaps: bool = False
    actions: Sequence[Action] = ()
    _read: tuple[Sequence[Action], Sequence[Group]] = ((), ())  # the last list, in groups
    _early: tuple[MessageKey, ...] = ()  # messages to this rank that senders' warm-ups hold
    _taken: dict[MessageKey, Tensor] | None = None  # received, while forwards may be run again
    _dropped: list[Handle] = field(default_factory=list)  # sends of what is run again
    kept: StageKept | None = None
    _held: dict[tuple[int, int], _Held] = field(default_factory=dict)
    _posted: dict[MessageKey, Handle] = field(default_factory=dict)
    _ready: dict[MessageKey, tuple[Tensor, str]] = field(
        default_factory=dict
    )  # made in which phase
    _sent: dict[MessageKey, Sent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        every = with_communication(self.schedule)
        self.actions = self.actions or every[self.place]
        self._early = tuple(
            a.key
            for actions in every
            for a in warm_up(actions, self.schedule.paired if self.overlaps else frozenset())
            if a.is_send and self.schedule.rank_of(a.peer_stage, a.microbatch) == self.place
        )
        self._handlers: Mapping[str, Callable[[Action], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._input_half,
            "W": self._weight_half,
            "U": self._update,
            "SEND_F": self._send,
            "SEND_B": self._send,
            "RECV_F": self._post,
            "RECV_B": self._post,
            "OFFLOAD": self._offload,
            "RELOAD": self._reload,
        }

    def run(
        self, batches: Sequence[Any] | Mapping[int, Any], actions: Sequence[Action] | None = None,
        settle: bool = True, confirm: Callable[[], bool] | None = None,
    ) -> Tensor:  # fmt: skip
        """One step's microbatches; returns this rank's share of the loss (zero but on the last
        stage). Gradients are added into the units' buffers. `actions`: others than the step's;
        `settle`: nothing stays under way. `confirm` is asked before the first backward, on all ranks alike,
        whether the weights were right: else the forwards before it are run again."""
        self._batches, self._loss = batches, torch.zeros((), dtype=torch.float64)
        actions = self.actions if actions is None else actions
        self._halves = {(a.stage, a.microbatch) for a in actions if a.kind == "I"}
        groups = self._groups(actions)
        if confirm is not None:
            groups = self._play_warm_up(groups, confirm)
        self._play(groups)
        if settle:
            self._settle()
        self.where.microbatch = -1
        return self._loss

    def _groups(self, actions: Sequence[Action]) -> Sequence[Group]:
        """Actions alone or in pairs, each with the stages whose last backward it is; read once for a list
        that comes again."""
        if self._read[0] is not actions:
            last = _last_backwards(actions)
            pairs = in_pairs(actions, self.schedule.paired if self.overlaps else frozenset())
            found = [(g, tuple(a.stage for a in g if a in last)) for g in pairs]
            self._read = actions, found
        return self._read[1]

    def _play_warm_up(
        self, groups: Sequence[Group], confirm: Callable[[], bool]
    ) -> Sequence[Group]:
        """Runs what stands before the first backward, again where that was wrong; what is left."""
        first = list(takewhile(lambda g: not any(a.kind in BACKWARD for a in g[0]), groups))
        self._taken = {}
        self._play(first)
        try:
            right = confirm()
        except NonFiniteError:
            self._discard(self._taken)
            raise
        if not right:
            self._discard(self._taken)
            self._play(first)
        self._taken = None
        return groups[len(first) :]

    def _play(self, groups: Sequence[Group]) -> None:
        for group, last in groups:
            for stage in last:
                self.last_backward(stage)
            if self.span is None or group[0].kind not in COMPUTE:
                self._do(*group)
                continue
            with ExitStack() as spans:
                for action in group:
                    spans.enter_context(self.span(action))
                self._do(*group)

    def _settle(self) -> None:
        """Waits until all that was sent has arrived."""
        for handle in (*self._dropped, *self._sent.values()):
            handle.wait()
        self._dropped.clear()
        self._sent.clear()

    def _let_go(self) -> None:
        """Of what was sent and has gone out, which would be held until the step ends."""
        for key in [k for k, sent in self._sent.items() if sent.has_gone]:
            self._sent.pop(key).wait()

    def _discard(self, taken: Mapping[MessageKey, Tensor]) -> None:
        """Forgets the forwards so far. What others have sent in their own warm-ups comes again: it is taken
        in and dropped. What they sent later was right and comes no more: it stays, and so does a receive
        of what they have not sent yet."""
        self._loss = torch.zeros((), dtype=torch.float64)
        if self.kept is not None:
            self.kept.forget()
        self._held.clear()
        self._ready.clear()
        self._dropped += self._sent.values()
        self._sent.clear()
        for key in self._early:
            if key not in taken:
                self._post(Action(key[1], f"RECV_{key[0]}", key[2]))
                self._posted.pop(key).wait()
        for key, x in taken.items():
            if key not in self._early:
                self._ready[key] = x.detach(), key[0]

    def _do(self, action: Action, beside: Action | None = None) -> None:
        if beside is None:
            self._at(action)
            self._handlers[action.kind](action)
            return
        turns = {beside: self._backward_pieces(beside), action: self._forward_pieces(action)}
        while turns:
            for one, pieces in tuple(turns.items()):
                self._at(one)
                if next(pieces, DONE) is DONE:
                    del turns[one]

    def _at(self, action: Action) -> None:
        self._let_go()
        where = self.where
        where.stage, where.microbatch = action.stage, action.microbatch
        if action.kind in ACTIVITIES:
            where.phase, where.activity = ACTIVITIES[action.kind]

    def _forward(self, action: Action) -> None:
        for _ in self._forward_pieces(action):
            pass

    def _forward_pieces(self, action: Action) -> Iterator[None]:
        stage, _, microbatch = action
        x = None
        if stage > 0:
            x = self._take("F", stage, microbatch)
            x.requires_grad_(torch.is_grad_enabled())
        if self.weights is not None and torch.is_grad_enabled():
            self.weights.forward(stage, microbatch)
        module, cuts, batch = self.modules[stage], Cuts(), self._batches[microbatch]
        if self.overlaps and torch.is_grad_enabled():
            y = yield from forward_in_pieces(cast(FlowingModule, module).flow(x, batch), cuts)
        else:
            y = module(x, batch)
        if stage == self.schedule.num_stages - 1:
            self._loss = self._loss + y.detach().to(torch.float64)  # where y lies: nobody waits
        else:
            self._ready["F", stage + 1, microbatch] = y.detach(), "F"
        if torch.is_grad_enabled():
            whole = stage == self.schedule.num_stages - 1 or not y.requires_grad
            self._held[stage, microbatch] = _Held(x, y if whole else get_gradient_edge(y), cuts)

    def _backward(self, action: Action) -> None:
        for _ in self._backward_pieces(action):
            pass

    def _backward_pieces(self, action: Action) -> Iterator[None]:
        stage, kind, microbatch = action
        held = self._held.pop((stage, microbatch))
        sent = ("F", stage + 1, microbatch)
        if sent in self._sent:  # its gradient is back; gloo says of no send that it has gone
            self._sent.pop(sent).wait()
        last = stage == self.schedule.num_stages - 1
        gradient = None if last else self._take("B", stage, microbatch)
        if self.weights is not None:
            self.weights.backward(stage, microbatch)
            if kind == "B":
                self.weights.adds(stage, microbatch)
        if isinstance(held.y, Tensor) and last and self.seed != 1:
            gradient = torch.full_like(held.y, self.seed)
        yield from backward_in_pieces(held.y, gradient, held.cuts)
        if held.x is not None:
            assert held.x.grad is not None, "a stage's output does not depend on its input"
            self._ready["B", stage - 1, microbatch] = held.x.grad, kind

    def _input_half(self, action: Action) -> None:
        self.queue.split(action.stage, action.microbatch)
        self._backward(action)
        self.queue.close()

    def _weight_half(self, action: Action) -> None:
        if self.weights is not None:
            self.weights.adds(action.stage, action.microbatch)
        self.queue.run(action.stage, action.microbatch)

    def _update(self, action: Action) -> None:
        assert self.update is not None, "a schedule with U needs an update"
        self.update(action.stage)

    def _offload(self, action: Action) -> None:
        assert self.kept is not None, "a schedule with OFFLOAD needs a place to go"
        with self.where.at("F"):
            self.kept.last_leaves()

    def _reload(self, action: Action) -> None:
        assert self.kept is not None, "a schedule with RELOAD needs a place to come from"
        with self.where.at("I" if (action.stage, action.microbatch) in self._halves else "B"):
            self.kept.last_comes()

    def _send(self, action: Action) -> None:
        key = action.key
        x, self.where.phase = self._ready.pop(key)
        channel = self.channels[key[:2]]
        to = self.schedule.rank_of(action.peer_stage, action.microbatch)
        self._sent[key] = channel.comm.send(x, to, key=Key(*key), site=channel.site)

    def _post(self, action: Action) -> None:
        key = action.key
        if key in self._posted or key in self._ready:  # from before the forwards were run again
            return
        channel = self.channels[key[:2]]
        source = self.schedule.rank_of(action.peer_stage, action.microbatch)
        like = self.activation(action.stage, self._batches[action.microbatch], action.what)
        handle = channel.comm.receive(like, source, key=Key(*key), site=channel.site)
        self._posted[key] = handle

    def _take(self, kind: str, stage: int, microbatch: int) -> Tensor:
        """The tensor this stage consumes: received, or made by a stage on this rank."""
        key = (kind, stage, microbatch)
        if key not in self._posted:
            return self._ready.pop(key)[0]
        x = self._posted.pop(key).wait()
        if self._taken is not None:
            self._taken[key] = x
        return x


def _last_backwards(actions: Sequence[Action]) -> set[Action]:
    """Each stage's last B or W, before its U or at all."""
    last: dict[int, Action] = {}
    found: set[Action] = set()
    for action in actions:
        if action.kind in ("B", "W"):
            last[action.stage] = action
        elif action.kind == "U":
            found.add(last.pop(action.stage))
    return found | set(last.values())

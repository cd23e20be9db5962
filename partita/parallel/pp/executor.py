"""Runs a rank's list of actions: one small method a kind, and no schedule by name.

Each microbatch's forward is cut off at the stage's input, so that its backward can run whenever the
list says. A receive is posted when the list says and waited for when its tensor is needed; a send never
waits for its receiver. One stage without a pipeline is the same list without messages.

    F  x -> blocks -> y        keeps (x, y) until B        sends y.detach() to the next stage
    B  dy -> blocks -> dx      frees both                  sends dx to the previous stage
    I  the same, but work on weights' gradients waits in the queue, with what it needs, until its
    W  runs that work, and frees it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from partita.comm.protocol import Comm, Handle, Key, Where
from partita.parallel.deferred import WeightQueue
from partita.schedule.ir import COMPUTE, Action


class StageModule(Protocol):
    """The blocks of one stage."""

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The stage's output; x is None on the first stage. The last stage returns its share of the
        step's loss, already divided by the step's valid tokens."""
        ...


@dataclass(frozen=True)
class Link:
    """How a stage's tensors leave it: the neighbours' places in the pp group and the site."""

    down: Comm | None  # activations, to the next stage
    up: Comm | None  # gradients, to the previous stage
    send_site: str = ""  # '<own last block>:send'
    back_site: str = ""  # '<own first block>:send'
    from_previous: str = ""  # the previous stage's send_site
    from_next: str = ""  # the next stage's back_site


@dataclass
class _Held:
    """What one microbatch keeps between F and B."""

    x: Tensor | None
    y: Tensor


@dataclass
class Executor:
    """Executes actions of one stage a rank.

    `activation(batch, what)` is an empty tensor like the stage's input (F) or output (B), to receive into.
    `last_backward` is called before the rank's last B or W, so that gradients may be reduced as they
    become ready. Communicates: sends of stage inputs and outputs on axis pp, keyed by (F or B,
    consuming stage, microbatch).
    """

    module: StageModule
    actions: Sequence[Action]
    num_stages: int
    link: Link
    where: Where
    activation: Callable[[Any, str], Tensor]
    queue: WeightQueue = field(default_factory=WeightQueue)
    last_backward: Callable[[], None] = lambda: None
    span: Callable[[Action], Any] | None = None
    _held: dict[tuple[int, int], _Held] = field(default_factory=dict)
    _posted: dict[tuple[str, int, int], Handle] = field(default_factory=dict)
    _ready: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    _sent: dict[tuple[str, int, int], Handle] = field(default_factory=dict)

    def run(self, batches: Sequence[Any]) -> Tensor:
        """One step's microbatches; returns this rank's share of the loss (zero but on the last
        stage). Gradients are added into the units' buffers."""
        self._batches, self._loss = batches, torch.zeros((), dtype=torch.float64)
        backwards = [i for i, a in enumerate(self.actions) if a.kind in ("B", "W")]
        final = backwards[-1] if backwards else -1
        handlers: Mapping[str, Callable[[Action], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._input_half,
            "W": self._weight_half,
            "SEND_F": self._send,
            "SEND_B": self._send,
            "RECV_F": self._post,
            "RECV_B": self._post,
        }
        for i, action in enumerate(self.actions):
            if i == final:
                self.last_backward()
            self.where.stage, self.where.microbatch = action.stage, action.microbatch
            if self.span is None or action.kind not in COMPUTE:
                handlers[action.kind](action)
            else:
                with self.span(action):
                    handlers[action.kind](action)
        for handle in self._sent.values():
            handle.wait()
        self._sent.clear()
        self.where.microbatch = -1
        return self._loss

    def _forward(self, action: Action) -> None:
        self.where.phase, self.where.activity = "F", "forward"
        stage, _, microbatch = action
        x = None
        if stage > 0:
            x = self._take("F", stage, microbatch)
            x.requires_grad_(torch.is_grad_enabled())
        y = self.module(x, self._batches[microbatch])
        if stage == self.num_stages - 1:
            self._loss += y.detach().to(torch.float64).cpu()
        else:
            self._ready["F", stage + 1, microbatch] = y.detach()
        if torch.is_grad_enabled():
            self._held[stage, microbatch] = _Held(x, y)

    def _backward(self, action: Action) -> None:
        self.where.phase, self.where.activity = action.kind, "backward"
        stage, _, microbatch = action
        held = self._held.pop((stage, microbatch))
        if ("F", stage + 1, microbatch) in self._sent:  # its gradient is back: it has arrived
            self._sent.pop(("F", stage + 1, microbatch)).wait()
        last = stage == self.num_stages - 1
        gradient = None if last else self._take("B", stage, microbatch)
        torch.autograd.backward(held.y, gradient)
        if held.x is not None:
            assert held.x.grad is not None, "a stage's output does not depend on its input"
            self._ready["B", stage - 1, microbatch] = held.x.grad

    def _input_half(self, action: Action) -> None:
        self.queue.split(action.stage, action.microbatch)
        self._backward(action)
        self.queue.close()

    def _weight_half(self, action: Action) -> None:
        self.where.phase, self.where.activity = "W", "backward"
        self.queue.run(action.stage, action.microbatch)

    def _send(self, action: Action) -> None:
        self.where.phase = action.what
        comm = self.link.down if action.what == "F" else self.link.up
        assert comm is not None
        x = self._ready.pop(action.key)
        site = self.link.send_site if action.what == "F" else self.link.back_site
        to = comm.rank + (1 if action.what == "F" else -1)
        self._sent[action.key] = comm.send(x, to, key=Key(*action.key), site=site)

    def _post(self, action: Action) -> None:
        comm = self.link.down if action.what == "F" else self.link.up
        assert comm is not None
        batch = self._batches[action.microbatch]
        source = comm.rank + (-1 if action.what == "F" else 1)
        site = self.link.from_previous if action.what == "F" else self.link.from_next
        like = self.activation(batch, action.what)
        self._posted[action.key] = comm.receive(like, source, key=Key(*action.key), site=site)

    def _take(self, kind: str, stage: int, microbatch: int) -> Tensor:
        """The tensor this stage consumes: received, or made by a stage on this rank."""
        key = (kind, stage, microbatch)
        if key in self._posted:
            return self._posted.pop(key).wait()
        return self._ready.pop(key)

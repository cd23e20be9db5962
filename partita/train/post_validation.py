"""Updates made before the step's norm is known, and undone where that was wrong (Qi et al. 2023, arXiv
2401.10241, sec. 4: post-validation of the optimizer).

    rank 0   ... W W  U F0 F1 F2 F3 ?  B0      U  updates, as if nothing were clipped
    rank 1   ...  W W W  U F0 F1 F2  ?  B0     ?  waits for the norm of all: right, or undo, do it again
                                               and run the forwards before it again

A clip, or a skip of what is not finite, needs the norm of all stages: waiting for it turns the span of a
rank into the flush of the step. Here each place of pp hands the squares so far on to the next (8 bytes),
starts the sum of all, and updates at once, unless what it knows already says that the guess is wrong. Before
its first backward of the next step it waits for the sum. Where gradients are to be clipped, or something is
not finite, all ranks undo: masters and states come back from copies, gradients are still there; then they
update as the norm says and run the step's first forwards again. So weights, losses and norms are bit for bit
those of a step that waits.

The step's loss, and what routers did, are known with the norm: a batch that drains waits for them at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partita.comm.protocol import Done, Handle, Key
from partita.parallel.ep.log import Routed
from partita.train.optimizer.optim import norm_of, state_names
from partita.train.routing import start_routing
from partita.train.step import Found, Model, StepBatch, Update
from partita.train.sums import NO_TARGETS, mean_loss

SURE = 1 + 1e-9  # sums in another order than the norm's differ by less


@dataclass
class Saved:
    """Copies of what an update changes on the device: masters, states, under a loss scale gradients; and
    counts. What lies elsewhere keeps what was before in a second place."""

    update: Update

    def __post_init__(self) -> None:
        update, places = self.update, self.update.places
        here = update.away is None  # states
        scaled = here and update.given.away is None and update.model.scaler is not None
        self._changed = [
            s.master for s in update.slots if places is None or not places.holds(s.master)
        ]
        self._changed += [slot.gradient for slot in update.slots if scaled]
        self._copies = [torch.empty_like(x) for x in self._changed]
        names = state_names(update.train) if here else ()
        self._states = {
            s.master: {name: torch.empty_like(s.master, dtype=s.gradient.dtype) for name in names}
            for s in update.slots if not s.balances
        }  # fmt: skip
        self._steps: dict[Tensor, dict[str, Tensor]] = {}

    def tensors(self) -> list[Tensor]:
        """All copies, which live as long as the run."""
        return [*self._copies, *(x for states in self._states.values() for x in states.values())]

    def take(self) -> None:
        """Copies what is there."""
        update, scaler = self.update, self.update.model.scaler
        for copy, x in zip(self._copies, self._changed, strict=True):
            copy.copy_(x)
        states = update.optimizer.state
        names = state_names(update.train)
        self._steps = {x: _whole(states[x], names) for x in self._states if states.get(x)}
        for master in self._steps:
            for name, copy in self._states[master].items():
                copy.copy_(states[master][name])
        self._counts = update.updates, update.made, update.lr
        self._scaler = None if scaler is None else scaler.state()

    def restore(self) -> None:
        """Puts it back; a state that the update made is gone."""
        update = self.update
        for x, copy in zip(self._changed, self._copies, strict=True):
            x.copy_(copy)
        if update.away is not None:
            update.away.undo()
        elif update.places is not None:
            update.places.change()
        states = update.optimizer.state
        for master, copies in self._states.items():
            if master not in self._steps:
                states.pop(master, None)
                continue
            for name, copy in copies.items():
                states[master][name].copy_(copy)
            for name, x in self._steps[master].items():
                states[master][name].copy_(x)
        update.updates, update.made, update.lr = self._counts
        if self._scaler is not None:
            assert update.model.scaler is not None
            update.model.scaler.restore(self._scaler)


def _whole(state: dict[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Copies of what is kept of a whole parameter: how many updates it has had, and what follows from it."""
    return {n: x.clone() for n, x in state.items() if n not in names and isinstance(x, Tensor)}


@dataclass(frozen=True)
class _Pending:
    """A step whose end is not known: its number, the sums under way, and what was done meanwhile."""

    step: int
    loss: Handle
    squares: Handle
    routed: Callable[[], Routed]
    sent: Handle | None
    updated: bool
    scale: float
    scales: list[Any]  # what those of fp8 had seen before the forwards that follow


@dataclass
class Guess:
    """One rank's. `found` is the last step that is known."""

    model: Model
    update: Update
    found: Found | None = None
    _pending: _Pending | None = None
    _sums: tuple[StepBatch, Handle, Callable[[], Routed]] | None = field(default=None)

    def __post_init__(self) -> None:
        self.saved = Saved(self.update)

    def copies(self) -> list[Tensor]:
        """All tensors that are held to undo an update."""
        return self.saved.tensors()

    @property
    def waits(self) -> bool:
        """Whether an update is not known to be right."""
        return self._pending is not None

    def forward_backward(self, batch: StepBatch) -> float:
        """As Model's; the update before is proven before the first backward."""
        model, confirm = self.model, None
        where = model.context.where
        if self._pending is None:
            model.begin(batch)
        else:
            where.step, where.phase, where.activity = batch.step + 1, "step", "count"
            model.begin_forwards()
            model.count(batch)
            confirm = self._confirm
        loss = model.executor.run(batch.microbatches, confirm=confirm)
        model.reducer.finish()
        where.phase, where.activity = "step", "loss"
        self._sums = batch, self._sum_loss(loss), start_routing(model, model.comms.routing)
        if not batch.drains:
            return math.nan
        model.routed = self._sums[2]()
        return model.end_loss(float(self._sums[1].wait()), batch.step)

    def step(self) -> float:
        """The update of the step that has run; its norm, or nan where the batch does not drain."""
        assert self._sums is not None, "an update follows a forward and backward"
        (batch, loss, routed), self._sums = self._sums, None
        model, update = self.model, self.update
        own, comms = update.squares(), model.comms
        known, sent = self._hand_on(own)
        handle: Handle = Done(own)
        if comms.norm is not None:
            handle = comms.norm.start_all_reduce(own, site="step.norm:reduce_from")
        scale = 1.0 if model.scaler is None else model.scaler.scale
        if batch.drains:
            norm = update.finish(norm_of(handle.wait()))
            if sent is not None:
                sent.wait()
            return norm
        right = math.isfinite(known) and not update.clips(known / scale / SURE)
        self.saved.take()
        if right:
            update.finish(0.0)
        else:
            model.parameters.refresh(rounded=update.away is not None)
        self._pending = _Pending(
            batch.step, loss, handle, routed, sent, right, scale, model.products.seen()
        )
        return math.nan

    def _hand_on(self, own: Tensor) -> tuple[float, Handle | None]:
        """The norm of this place and those before it, as far as this rank knows; squares go on."""
        comm, site = self.model.comms.known, "step.known:hand_on"
        assert comm is not None, "a pipeline has places"
        squares = own.clone()
        if comm.rank > 0:
            key = Key("F", comm.rank, 0)
            squares += comm.receive(torch.empty_like(own), comm.rank - 1, key=key, site=site).wait()
        sent = None
        if comm.rank + 1 < comm.size:
            key = Key("F", comm.rank + 1, 0)
            sent = comm.send(squares, comm.rank + 1, key=key, site=site)
        return norm_of(squares), sent

    def _confirm(self) -> bool:
        """Waits for the sums of the step before; where the guess was wrong undoes it and updates as the
        norm says. Gradients start anew."""
        pending, self._pending = self._pending, None
        assert pending is not None, "nothing is to be proven"
        model, update, where = self.model, self.update, self.model.context.where
        before = where.step, where.phase, where.activity
        where.step, where.phase, where.activity = pending.step + 1, "step", "optimizer"
        if pending.sent is not None:
            pending.sent.wait()
        scaled, total = norm_of(pending.squares.wait()), float(pending.loss.wait())
        counts = total != NO_TARGETS
        loss = total if counts else 0.0
        model.routed, norm = pending.routed(), scaled / pending.scale
        held = math.isfinite(loss) and math.isfinite(norm) and not update.clips(norm)
        if not held:
            self._undo(pending, gathers=not (math.isfinite(loss) and math.isfinite(norm)))
            mean_loss(total, pending.step)
            norm = update.finish(scaled)
        self.found = Found(pending.step, loss, norm, update.lr, held, model.routed, counts)
        where.step, where.phase, where.activity = before
        model.reducer.begin()
        if not held:
            model.begin_forwards()
        return held

    def _undo(self, pending: _Pending, gathers: bool) -> None:
        """Weights, states and counts are those before the update, fp8's scales those before the forwards.
        `gathers`: no update follows, which would make the working weights anew."""
        if pending.updated:
            self.saved.restore()
        self.model.products.restore(pending.scales)
        self.model.parameters.forget()
        if gathers:
            self.model.parameters.refresh(rounded=self.update.away is not None)

    def _sum_loss(self, loss: Tensor) -> Handle:
        """The loss of all ranks, on every rank, under way; those that have none bring zero."""
        comm, loss = self.model.comms.loss, self.model.own_loss(loss.reshape(1).cpu())
        return (
            Done(loss)
            if comm is None
            else comm.start_all_reduce(loss, site="step.loss:reduce_from")
        )

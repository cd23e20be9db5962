"""One training step of a rank: count, forward and backward of all microbatches, reduce, norm, update.

count   valid tokens of the step, summed over the axes that cut labels (8 bytes, last stage)
run     the schedule; gradients add up in flat units; units are reduced under the last backward
loss    summed over the same axes in fp64, sent to every stage (8 bytes each)
norm    sum of squares of what this rank counts, summed over ranks that count other elements (8 bytes)
update  clip by the global norm, AdamW or SGD on masters, working weights rounded from them
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from partita.base.errors import NonFiniteError, UsageError
from partita.comm.context import Context
from partita.parallel.cp.split import Split
from partita.parallel.dp.replicate import Reducer
from partita.parallel.dp.zero import Parameters
from partita.parallel.ep.log import Routed
from partita.parallel.laid import Laid
from partita.parallel.offload.arenas import Arenas
from partita.parallel.pp.executor import Executor
from partita.parallel.pp.versions import Flow, Versions
from partita.parallel.precision.fp8 import Products
from partita.parallel.precision.scaler import LossScaler
from partita.spec.job import TrainSpec
from partita.train.optimizer import optim
from partita.train.optimizer.offloaded_update import AwayUpdate, Given
from partita.train.optimizer.places import Places
from partita.train.optimizer.slots import Slot
from partita.train.optimizer.stochastic import StochasticUpdate
from partita.train.routing import begin_routing, sum_routing
from partita.train.sums import NO_TARGETS, StepComms, mean_loss


@dataclass(frozen=True)
class Microbatch:
    """A rank's part of one microbatch: ids, targets, valid [samples, its share of seq]; `documents` [samples,
    seq]; `samples` are the samples' places in the global batch of its `step`: dropout is keyed by both. Where
    context parallelism cuts seq, `split` says which tokens these are, and documents are in its order."""

    ids: Tensor
    targets: Tensor
    valid: Tensor
    documents: Tensor | None
    samples: Tensor
    split: Split | None = None
    step: int = 0

    def to(self, device: torch.device) -> Microbatch:
        """The same on a device; itself where it is there already."""
        if self.ids.device == device:
            return self
        documents = None if self.documents is None else self.documents.to(device)
        ids, targets, valid, samples = (
            t.to(device) for t in (self.ids, self.targets, self.valid, self.samples)
        )
        split = None if self.split is None else self.split.to(device)
        return Microbatch(ids, targets, valid, documents, samples, split, self.step)


@dataclass(frozen=True)
class StepBatch:
    """What a rank computes on in one step (counted from 0): its part of every microbatch. `following`
    are the next step's, for an asynchronous pipeline that stays full; without them it drains. Without
    `drains` an update that was made before it was known to be right is left so (post_validation.py)."""

    step: int
    microbatches: Sequence[Microbatch]
    following: Sequence[Microbatch] = ()
    drains: bool = True


@dataclass(frozen=True)
class Found:
    """What is known in the end of a step (counted from 0) whose update was made before; `held`: whether that
    was right."""

    step: int
    loss: float
    norm: float
    lr: float
    held: bool
    routed: Routed
    has_targets: bool = True


class Unproven(Protocol):
    """Updates made before the step's norm is known, and how a step then runs (post_validation.py)."""

    found: Found | None  # the last step that is known

    @property
    def waits(self) -> bool:
        """Whether an update is not known to be right."""
        ...

    def forward_backward(self, batch: StepBatch) -> float:
        """As Model's."""
        ...

    def step(self) -> float:
        """As Update's."""
        ...

    def copies(self) -> list[Tensor]:
        """What is held to undo an update, as long as the run."""
        ...


@dataclass
class Model:
    """This rank's stages of the model (its `place` is the coordinate on pp), and how a step runs on
    them. `blocks` are those of its stages in a row."""

    laid: Laid
    context: Context
    place: int
    blocks: Sequence[Any]
    units: Sequence[Any]
    executor: Executor
    reducer: Reducer
    parameters: Parameters
    comms: StepComms
    forward_only: Executor | None = None
    scaler: LossScaler | None = None  # under fp16
    routed: Routed = field(default_factory=Routed)  # the step's, where experts are
    flow: Flow | None = None  # under an asynchronous schedule
    guess: Unproven | None = None  # where updates are made before the norm is known
    has_targets: bool = True  # whether the last step counted any: else it has no loss
    arenas: Arenas = field(kw_only=True)  # what lies elsewhere than on the device
    products: Products = field(kw_only=True)  # how its weights are multiplied

    @property
    def names(self) -> tuple[str, ...]:
        """Full names of `blocks`."""
        return tuple(name for s in self.laid.stages_of(self.place) for name in s.names)

    @property
    def holds_loss(self) -> bool:
        """Whether it computes the loss: then its last block is the head."""
        return self.laid.holds_loss(self.place)

    def forward_backward(self, batch: StepBatch) -> float:
        """Runs the step's schedule; returns the global token mean of the loss, on every rank.

        Gradients are left in the units, reduced, times the scaler's S under fp16. Raises NonFiniteError,
        before any update and on every rank, when the loss is not a number; train/finite.py then finds
        where it began. Where updates are made before they are known to be right, and the batch does not
        drain: not a number, yet (`guess.found` has it later). 0 where the step counts no target.
        """
        if self.guess is not None:
            return self.guess.forward_backward(batch)
        self.begin(batch)
        if self.flow is not None:
            end = self.flow.first + len(batch.microbatches)
            loss = self.flow.run(batch.microbatches, batch.following)
            self.routed = sum_routing(self, self.comms.routing, end)
            return self.finish_loss(loss, batch.step)
        loss = self.executor.run(batch.microbatches)
        self.reducer.finish()
        self.routed = sum_routing(self, self.comms.routing)
        return self.finish_loss(loss, batch.step)

    def evaluate(self, batch: StepBatch) -> float:
        """The token mean of the loss over one microbatch of every rank, forward only, dropout off; scales
        that look back see nothing of it."""
        assert self.forward_only is not None
        if self.under_way:
            raise UsageError(
                "the last step is not over (its microbatches, or the proof of its update): evaluate after "
                "one that drains (data.batch(step), without drains=False)"
            )
        seen = self.products.seen()
        for block in self.blocks:
            block.training = False
        try:
            with torch.no_grad():
                self.count(batch)
                loss = self.forward_only.run(batch.microbatches)
                return self.finish_loss(loss, batch.step)
        finally:
            self.products.restore(seen)
            for block in self.blocks:
                block.training = True

    @property
    def under_way(self) -> bool:
        """Whether the last step was begun by a batch that does not drain."""
        full = self.flow is not None and self.flow.steps > 0
        return full or (self.guess is not None and self.guess.waits)

    def take_known(self) -> int:
        """Held-out images that this rank was the first to know, since it was asked last."""
        if not self.holds_loss:
            return 0
        head = self.blocks[-1]
        found, head.known = int(head.known), 0
        at = self.context.coords
        return found if at["split"] == at["tp"] == at["cp"] == 0 else 0

    def begin(self, batch: StepBatch) -> None:
        """Zeroes gradients and tells the head how many valid tokens the step has."""
        where = self.context.where
        where.step, where.phase, where.activity = batch.step + 1, "step", "count"
        self.reducer.begin()
        self.begin_forwards()
        self.count(batch)

    def begin_forwards(self) -> None:
        """Tells blocks the loss scale; nothing has been routed yet."""
        scale = 1.0 if self.scaler is None else self.scaler.scale
        for block in self.blocks:
            block.loss_scale = scale
        begin_routing(self, scale)

    def count(self, batch: StepBatch) -> None:
        """Tells the head the valid tokens of the whole step: the loss is a mean over them."""
        if self.holds_loss:
            counts = [b.valid.sum() for b in batch.microbatches]
            total = int(torch.stack(counts).sum())  # one word to the host
            if self.comms.count is not None:
                counted = torch.tensor([total], dtype=torch.int64)
                total = int(self.comms.count.all_reduce(counted, site="step.count:reduce_from"))
            self.blocks[-1].total_valid, self.has_targets = max(total, 1), total > 0

    def own_loss(self, loss: Tensor) -> Tensor:
        """This rank's part of the step's loss, as it is summed: NO_TARGETS where none is counted."""
        nothing = self.holds_loss and not self.has_targets
        return torch.full_like(loss, NO_TARGETS) if nothing else loss

    def end_loss(self, total: float, step: int) -> float:
        """The step's loss from the sum over ranks, which tells every rank whether it counted targets. Raises
        NonFiniteError."""
        self.has_targets = total != NO_TARGETS
        return mean_loss(total, step)

    def told(self, loss: float) -> float | None:
        """Of a step's loss: None where it counted no target; not a number as long as nothing is known."""
        return loss if self.has_targets or math.isnan(loss) else None

    def finish_loss(self, loss: Tensor, step: int) -> float:
        """Sums the loss over ranks and hands it to every stage. Where microbatches go two ways, or updates
        are made before the norm is known, all ranks take part in the sum, those without a loss with zero."""
        where = self.context.where
        where.phase, where.activity, loss = "step", "loss", self.own_loss(loss.cpu())
        takes_part = self.holds_loss or self.laid.sums_loss_over_stages
        if self.comms.loss is not None and takes_part:
            loss = self.comms.loss.all_reduce(loss.reshape(1), site="step.loss:reduce_from")
        if self.comms.broadcast is not None:
            root = self.laid.stages[-1].places[0]
            loss = self.comms.broadcast.broadcast(
                loss.reshape(1), site="step.loss:broadcast", root=root
            )
        return self.end_loss(float(loss), step)


@dataclass
class Update:
    """The optimizer of this rank's units. `step` clips, updates and rounds working weights.

    `updates` are steps that are done; `made`, the updates that an element has had in them: under fp16 some
    skip theirs, under an asynchronous schedule each has several."""

    model: Model
    train: TrainSpec
    optimizer: torch.optim.Optimizer
    slots: Sequence[Slot]
    counted: list[Tensor]  # parts of gradients that this rank counts in the norm
    given: Given
    updates: int = 0
    made: int = 0
    lr: float = field(default=0.0)
    away: AwayUpdate | None = None  # of states that lie elsewhere than on the device
    rounded: StochasticUpdate | None = None  # of weights without masters
    places: Places | None = None  # of what lies elsewhere, where an update may be undone
    _share: float = 1.0  # of the step's rows, each as often as updates, that this update has

    def step(self) -> float:
        """One update; returns the global gradient norm before clipping. Under fp16 a norm that is not
        finite skips it, on every rank.

        Under an asynchronous schedule stages have updated already (`advance`): the norm is that of
        their last gradients. Communicates: all_reduce over the axes that cut gradients, 8 bytes. Raises
        NonFiniteError before anything changes.
        """
        where = self.model.context.where
        where.phase, where.activity = "step", "optimizer"
        guess = self.model.guess
        return self.finish(self.gradient_norm()) if guess is None else guess.step()

    def finish(self, norm: float) -> float:
        """The update, as the norm of the (scaled) gradients says; returns that of the gradients."""
        where, factor, scaler = self.model.context.where, 1.0, self.model.scaler
        if scaler is not None:
            factor = 1 / scaler.scale
            norm *= factor
            if not scaler.step(norm):
                self.updates += 1
                return norm
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient norm of step {where.step} is {norm}")
        if self.model.flow is not None:
            self.updates, self.made = self.updates + 1, self.made + self.model.flow.per_step
            return norm
        factor *= optim.clip_coefficient(norm, self.train.clip_grad_norm)
        self.updates, self.made = self.updates + 1, self.made + 1
        self._apply(self.updates, self.given.names, self.updates, factor)
        self.model.parameters.refresh(rounded=self.away is not None)
        return norm

    def clips(self, norm: float) -> bool:
        """Whether gradients of this norm are clipped."""
        return optim.clip_coefficient(norm, self.train.clip_grad_norm) < 1

    def advance(self, stage: int) -> None:
        """U: a stage of this rank applies what its last microbatches left, at the rate of the step."""
        flow = self.model.flow
        assert flow is not None, "U belongs to an asynchronous schedule"
        late = () if flow.late is None else flow.late.versions.units
        versions = flow.own[stage]
        self.model.reducer.finish(late, [*versions.units, *late])
        versions.update(lambda: self.apply_to(versions))
        if flow.late is not None:
            flow.late.update()

    def join(self, versions: Versions, spent: Sequence[Tensor]) -> None:
        """The late U of units that another stage holds too: their gradients are added up, then applied."""
        self.model.reducer.add_late(versions.units, spent)
        self.apply_to(versions)

    def apply_to(self, versions: Versions) -> None:
        """Updates a stage's masters, at the rate of the step under way."""
        flow, names = self.model.flow, {unit.name for unit in versions.units}
        assert flow is not None, "a step that flushes has one update of all"
        draw = self.updates * flow.per_step + flow.number(versions) + 1
        self._share = flow.share(versions)
        self._apply(self.updates + 1, names, draw)

    def _apply(self, step: int, units: Collection[str], draw: int, factor: float = 1.0) -> None:
        """Of the units named, at the rate of step `step`; rounding at random is by number `draw`."""
        self.lr = optim.learning_rate(self.train, step)
        if self.away is not None:
            self.away.run(draw, self.lr, factor, self._balance, units)
            return
        slots = [slot for slot in self.slots if slot.unit in units]
        self.given.update(units, slots, lambda own: self._apply_here(own, draw, factor))
        if self.rounded is not None:
            self.rounded.shards.change()

    def _apply_here(self, slots: Sequence[Slot], draw: int, factor: float) -> None:
        """The same of slots whose gradients are on the device."""
        if self.rounded is not None:
            self.rounded.run(slots, draw, self.lr, factor, self._balance)
            return
        if factor != 1:
            own = [s.gradient for s in slots if not s.balances]
            if own:  # a stage whose weights are all frozen has none
                torch._foreach_mul_(own, factor)
        optim.set_learning_rate(self.optimizer, self.lr)
        for slot in slots:
            slot.master.grad = slot.gradient
        self.optimizer.step()
        for slot in slots:
            slot.master.grad = None
            if slot.balances:
                self._balance(slot.master, slot.gradient)

    def _balance(self, master: Tensor, had: Tensor) -> None:
        """Moves a balance bias by a fixed rate: up where its expert got fewer rows than an even share,
        down where more (DeepSeek-V3, sec. 2.1.2). Its rows stand where a gradient would."""
        laid = self.model.laid
        spec = laid.request.model
        scale = 1.0 if self.model.scaler is None else self.model.scaler.scale
        rows = laid.samples * laid.request.seq_len * spec.top_k
        even = scale * self._share * rows / max(spec.experts, 1)
        master.add_((even - had).sign(), alpha=spec.router_bias_rate)

    def gradient_norm(self) -> float:
        """The 2-norm over all parameters, each element counted once."""
        squares = self.squares()
        if self.model.comms.norm is not None:
            squares = self.model.comms.norm.all_reduce(squares, site="step.norm:reduce_from")
        return optim.norm_of(squares)

    def squares(self) -> Tensor:
        """The sum of squares of what this rank counts, fp64 [1]."""
        squares = torch.zeros(1, dtype=torch.float64)
        found = self.given.norms(self.counted)
        if found:
            norms = torch.stack(tuple(found)).to(torch.float64).cpu()
            squares[0] = (norms * norms).sum()
        return squares

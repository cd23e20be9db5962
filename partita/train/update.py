"""The optimizer of a rank's units, put together: what is updated, where it lies, what counts in the norm."""

from __future__ import annotations

import torch

from partita.spec.job import TrainSpec
from partita.train.optimizer.offloaded_update import Given, host_threads, make_away
from partita.train.optimizer.optim import make_optimizer
from partita.train.optimizer.places import Places
from partita.train.optimizer.slots import BALANCE_BIAS, slots_of
from partita.train.optimizer.stochastic import Rounding, StochasticUpdate, shards_of
from partita.train.post_validation import Guess
from partita.train.step import Model, Update


def make_update(model: Model, train: TrainSpec) -> Update:
    """The optimizer over the masters of this rank's units, and what it counts in the norm."""
    trained = [unit for unit in model.units if not unit.spec.frozen]
    by_unit = {unit.name: list(slots_of(unit)) for unit in trained}
    slots = [slot for found in by_unit.values() for slot in found]
    laid, coords = model.laid, model.context.coords
    plane = laid.mesh.rank_of(
        {a: coords[a] for a in laid.norm_axes}
    )  # of replicas the first counts
    counted = [
        unit.gradient[piece.start : piece.start + piece.numel()]
        for unit in trained
        for weight, *_ in unit.places
        for piece in laid.pieces(weight, plane)
        if piece.primary and not weight.endswith(BALANCE_BIAS)
    ]
    named = [(slot.name, slot.master, slot.decays) for slot in slots if not slot.balances]
    given = Given(trained, model.reducer.away)
    update = Update(model, train, make_optimizer(named, train), slots, counted, given)
    stochastic = model.laid.request.plan.precision.rounding == "stochastic"
    rounding = Rounding(model.laid, model.context) if stochastic else None
    undoes = model.laid.request.plan.pipeline.post_validation
    update.places = places = Places(model.arenas) if undoes else None
    update.away = make_away(
        model.arenas, by_unit, trained, update.optimizer, train, rounding, places
    )
    if update.away is not None and model.context.device.type == "cuda":
        torch.set_num_threads(host_threads(model.laid.request.plan.world_size))
    if rounding is not None and update.away is None:
        shards = shards_of(model.parameters, trained, slots, places)
        update.rounded = StochasticUpdate(rounding, slots, update.optimizer, train, shards)
    if undoes:
        model.guess = Guess(model, update)
    if model.flow is not None:
        model.executor.update = update.advance
        if model.flow.late is not None:
            model.flow.late.join = update.join
    return update

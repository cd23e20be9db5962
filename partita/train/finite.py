"""Where a number that is not finite came from: the first bad tensor of a step, and its rank.

The loss and the gradient norm are the same on all ranks, so all come here together, before any update:

    1  weights, in the order of the program
    2  outputs of the blocks, the step's forward run again, microbatch after microbatch
    3  gradients, in the order backward writes them: head to embedding

Each rank looks at its own; the earliest place over all ranks is told, by all of them. Communicates once
(all_gather over world, outside any step), besides the forward's own collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from partita.base.errors import NonFiniteError
from partita.parallel.laid import Laid
from partita.parallel.units import Unit
from partita.train.stage import StageBlocks
from partita.train.step import Model, StepBatch

TEXT = 240  # bytes of a place's name that are exchanged
Exchange = Callable[[Sequence[int]], list[list[int]]]


@dataclass(frozen=True, order=True)
class Place:
    """A bad tensor: `found_in` is 1, 2 or 3 as above; then its place in that order."""

    found_in: int
    microbatch: int
    block: int
    name: str

    def words(self) -> list[int]:
        """As numbers, all of one length."""
        text = self.name.encode()[:TEXT]
        return [self.found_in, self.microbatch, self.block, *text, *[0] * (TEXT - len(text))]

    @staticmethod
    def of(words: Sequence[int]) -> Place:
        """What `words` gives."""
        text = bytes(w for w in words[3:] if w).decode(errors="replace")
        return Place(words[0], words[1], words[2], text)


NOWHERE = Place(9, 0, 0, "")


def explained(
    error: NonFiniteError, model: Model, batch: StepBatch, exchange: Exchange
) -> NonFiniteError:
    """The error with the rank and the first bad tensor; every rank calls it."""
    where = model.context.where
    activity = where.activity
    output = _bad_output(model, batch)  # on every rank: it communicates
    where.activity = activity
    found = bad_weight(model) or output or _bad_gradient(model) or NOWHERE
    places = [Place.of(w) for w in exchange(found.words())]
    return _named(error.message, places, "; nothing was updated")


def check_weights(model: Model, step: int, exchange: Exchange) -> None:
    """Raises NonFiniteError on all ranks where a weight of any is not finite: what a save must not
    keep. Communicates as `explained`."""
    found = bad_weight(model) or NOWHERE
    places = [Place.of(w) for w in exchange(found.words())]
    if min(places) != NOWHERE:
        lead = f"the update of step {step} made a weight that is not finite"
        raise _named(lead, places, "; no checkpoint was written: lower train.lr")


def _named(lead: str, places: Sequence[Place], end: str) -> NonFiniteError:
    first = min(places)
    if first == NOWHERE:
        return NonFiniteError(f"{lead}; every tensor that was looked at is finite{end}")
    rank = places.index(first)
    error = NonFiniteError(
        f"{lead}: first bad tensor is the {first.name}, on rank {rank}{end}",
        key=first.name.split()[-1],
    )
    error.rank = rank
    return error


def stored(model: Model, unit: Unit) -> Iterator[tuple[str, slice]]:
    """Each weight's pieces in what this rank stores of a unit."""
    for name, *_ in unit.places:
        for piece in model.laid.pieces(name, model.context.rank):
            yield name, slice(piece.start, piece.start + piece.numel())


def bad_weight(model: Model) -> Place | None:
    """The first weight of this rank that is not finite."""
    order = _weight_order(model.laid)
    found = [
        Place(1, 0, order[name], f"weight {name}")
        for unit in model.units
        for name, part in stored(model, unit)
        if not bool(torch.isfinite(unit.master[part]).all())
    ]
    return min(found, default=None)


def _bad_gradient(model: Model) -> Place | None:
    """The last of the program, the first that backward wrote."""
    order = _weight_order(model.laid)
    found = [
        Place(3, 0, len(order) - order[name], f"gradient of {name}")
        for unit in model.units
        for name, part in stored(model, unit)
        if not bool(torch.isfinite(unit.gradient[part]).all())
    ]
    return min(found, default=None)


def _bad_output(model: Model, batch: StepBatch) -> Place | None:
    """The first block whose output is not finite on this rank, the forward run again."""
    executor = model.forward_only
    assert executor is not None
    inner, place = executor.modules, _Found(model)

    def watched(stage: int, module: Any) -> StageBlocks:
        names = model.laid.stages[stage].names
        pairs = zip(module.blocks, names, strict=True)
        return StageBlocks([_Watching(block, name, place) for block, name in pairs], module.data)

    executor.modules = {stage: watched(stage, x) for stage, x in inner.items()}
    try:
        with torch.no_grad():
            for number, microbatch in enumerate(batch.microbatches):
                place.microbatch = number
                executor.run([microbatch])
    finally:
        executor.modules = inner
    return place.found


class _Found:
    """The first bad output of a rank, whatever stage made it."""

    def __init__(self, model: Model) -> None:
        names = [name for stage in model.laid.stages for name in stage.names]
        self.order = {name: place for place, name in enumerate(names)}
        self.microbatch = 0
        self.found: Place | None = None


class _Watching:
    """One block, looked at until an output is not finite."""

    def __init__(self, block: Any, name: str, place: _Found) -> None:
        self.block, self.name, self.place = block, name, place

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The block's output."""
        with _FirstBad() as seen:
            y = self.block(x, batch)
        place, name = self.place, self.name
        if place.found is None and not bool(torch.isfinite(y).all()):
            what = f"output of {name}" if name != "head" else "loss of head"
            detail = f"{seen.text}, {what}" if seen.text else what
            place.found = Place(2, place.microbatch, place.order[name], detail)
        return y


class _FirstBad(TorchDispatchMode):
    """Notes the first operator whose result is not finite. Masks of attention are filled with minus
    infinity: that alone is no fault; nor is what stands in memory that nobody has written."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and looks at what it made."""
        made = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").partition(".")[0]
        written = not (func.is_view or "empty" in name)
        looked_at = written and isinstance(made, Tensor) and made.is_floating_point()
        if looked_at and not self.text and bool((made.isnan() | made.isposinf()).any()):
            self.text = f"{name} {list(made.shape)}"
        return made


def _weight_order(laid: Laid) -> dict[str, int]:
    """Full weight name -> place in the program."""
    found: dict[str, int] = {}
    for stage in laid.stages:
        for name, block in zip(stage.names, stage.blocks, strict=True):
            for w in block.weights():
                found.setdefault(laid.full_name(name, w.name), len(found))
    return found

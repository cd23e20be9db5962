"""A stage of plain modules, as the executor calls it, and what is wrong with what it takes and returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from partita.base.errors import UsageError
from partita.parallel.draws import drawing
from partita.parallel.pp.portals import Adds, Portal, Wire, what_is
from partita.schedule.ir import Schedule

Stage = Callable[..., Mapping[str, Tensor]]


class Pipe(Protocol):
    """The pipeline that a stage stands in: `place`, what is drawn depends on beside the seed, and `rank`, of
    the world."""

    seed: int
    place: tuple[object, ...]
    rank: int
    token: Tensor
    device: torch.device

    @property
    def microbatch(self) -> int:
        """The one under way."""
        ...

    def add(self, loss: Tensor) -> None:
        """A stage's loss of one microbatch joins the step's."""
        ...


class WiredStage:
    """What the executor calls: wires in, the module, wires out."""

    def __init__(self, pipe: Pipe, module: Stage, at: tuple[int, int], portals: Sequence[Portal]):
        self.pipe, self.module, (self.stage, stages) = pipe, module, at
        self.last = self.stage == stages - 1
        self.takes = [p for p in portals if p.wire.target == self.stage]
        self.gives = [p for p in portals if p.wire.source == self.stage]

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The token behind all that the stage does; of the last stage a number that backward starts from."""
        pipe, microbatch = self.pipe, self.pipe.microbatch
        token = pipe.token.clone().requires_grad_(torch.is_grad_enabled()) if x is None else x
        given: dict[str, Tensor] = {}
        for portal in self.takes:
            token, given[portal.wire.name] = portal.receive(token, microbatch)
        try:
            with drawing(
                pipe.seed, *pipe.place, self.stage, "microbatch", microbatch, device=pipe.device
            ):
                made = self.module(batch, **given)
        except Exception as error:
            error.add_note(f"rank {pipe.rank} ran stage {self.stage}, microbatch {microbatch}")
            raise
        wrong = wrong_made(made, [p.wire for p in self.gives])
        if wrong:
            raise UsageError(
                f"rank {pipe.rank}: stage {self.stage} returned {_told(made)} for microbatch {microbatch}; "
                f"it returns {_wanted([p.wire for p in self.gives])}, and a 'loss' may stand beside them:"
                + "".join(f"\n  {w}" for w in wrong)
            )
        for portal in self.gives:
            token = portal.send(token, made[portal.wire.name], microbatch)
        if "loss" in made:
            pipe.add(made["loss"].reshape(()))
            token = Adds.apply(token, made["loss"])  # type: ignore[assignment]
        return token.sum() if self.last else token


def wrong_made(made: Any, wires: Sequence[Wire]) -> list[str]:
    """All that is wrong with what a stage returned."""
    if not isinstance(made, Mapping):
        return [f"{what_is(made)} is no dict of tensors by the names of its wires"]
    found = []
    for name in dict.fromkeys(w.name for w in wires):
        to = " and ".join(str(w.target) for w in wires if w.name == name)
        if name not in made:
            found.append(f"'{name}' is missing: stage {to} takes it")
        elif wrong := _unsendable(made[name]):
            found.append(f"'{name}' is {what_is(made[name])}: {wrong}; stage {to} takes it")
    known = {w.name for w in wires} | {"loss"}
    found += [f"'{x}' has no wire from here" for x in made if x not in known]
    loss = made.get("loss", torch.ones(()))
    if not isinstance(loss, Tensor):
        found.append(f"the loss is {what_is(loss)}: not a tensor, so nothing goes backward from it")
    elif loss.numel() != 1 or not loss.is_floating_point():
        found.append(f"the loss is {what_is(loss)}: it is one number of a floating type")
    return found


def _unsendable(x: Any) -> str:
    return "not a tensor" if not isinstance(x, Tensor) else Portal.refuses(x)


def _told(made: Any) -> str:
    if not isinstance(made, Mapping):
        return what_is(made)
    return ", ".join(f"{k} {what_is(v)}" for k, v in made.items()) or "nothing"


def _wanted(wires: Sequence[Wire]) -> str:
    names = ", ".join(sorted({w.name for w in wires}))
    return f"a dict of {names}" if names else "an empty dict"


def hold_kinds(modules: Any, wires: Any, schedule: Any) -> None:
    """Raises UsageError where one of the three is of another kind than it is asked for as."""
    strange = next((w for w in wires if not isinstance(w, Wire)), None)
    wrong = [
        f"modules are {what_is(modules)}: write {{stage: module}} of this rank's stages"
        if not isinstance(modules, Mapping)
        else "",
        f"a wire is {what_is(strange)}: write Wire('x', 0, 1)" if strange is not None else "",
        f"the schedule is {what_is(schedule)}: make one, pt.schedule('1f1b', num_ranks=2, num_microbatches=4)"
        if not isinstance(schedule, Schedule)
        else "",
    ]
    if any(wrong):
        raise UsageError("this pipeline cannot be built:" + "".join(f"\n  {w}" for w in wrong if w))


def unlike_signatures(modules: Mapping[int, Any], wires: Sequence[Wire]) -> list[str]:
    """Stages whose module cannot be called with the microbatch and what their wires carry."""
    found = []
    for stage, module in modules.items():
        names = [w.name for w in wires if w.target == stage]
        if not callable(module):
            found.append(f"stage {stage} is {what_is(module)}: it cannot be called")
            continue
        try:
            takes = inspect.signature(
                module.forward if isinstance(module, nn.Module) else module  # type: ignore[arg-type]
            )
        except (TypeError, ValueError):  # of what is written in C
            continue
        try:
            takes.bind(None, **dict.fromkeys(names))
        except TypeError as error:
            called = ", ".join(["microbatch", *(f"{n}=..." for n in names)])
            found.append(f"stage {stage} is called as ({called}) and takes {takes}: {error}")
    return found

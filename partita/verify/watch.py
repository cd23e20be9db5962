"""Watches segments from outside: outputs in forward, their gradients in backward, box by box.

Only used to find where a difference begins: modules are wrapped, none is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partita.spec.layout import product_coordinate
from partita.train.step import Microbatch, Model

Seen = dict[tuple[str, int], tuple[Tensor, Tensor]]  # (module, sample) -> (positions, values)


@dataclass
class Watch:
    """What was seen in one step, sample by sample: outputs, gradients, and (positions, input ids)."""

    outputs: Seen = field(default_factory=dict)
    gradients: Seen = field(default_factory=dict)
    ids: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _order: list[Microbatch] = field(default_factory=list)
    active: bool = False

    def start(self, batches: Sequence[Microbatch], share: tuple[int, int] = (0, 1)) -> None:
        """From now on, these microbatches, of which this is one of so many shares of the sequence."""
        self.active = True
        for b in batches:
            at = places(b, b.ids.shape[1], share)
            for row, sample in enumerate(b.samples.tolist()):
                self.ids[sample] = (at[row], b.ids[row].cpu().clone())
        self._order = list(batches)

    def stop(self) -> None:
        """No more."""
        self.active = False

    def see(self, name: str, x: Tensor, batch: Microbatch, share: tuple[int, int]) -> None:
        """A module's output [samples, seq share, hidden], the `share[0]`-th of `share[1]`."""
        if self.active:
            self._see(name, x, batch, places(batch, x.shape[1], share))

    def see_channels(self, name: str, x: Tensor, batch: Microbatch, at: Tensor) -> None:
        """An image model's output [samples, groups, channels or units, ...]; `at` says which of all groups'
        they are [groups, channels], of a map [groups, channels, rows], the rows behind which are padding."""
        if self.active and at.numel():  # of a small map the last ranks hold no row
            held = at.shape[2] if at.ndim > 2 else None
            self._see(name, x, batch, at.flatten().expand(len(batch.samples), -1), held)

    def _see(
        self, name: str, x: Tensor, batch: Microbatch, at: Tensor, held: int | None = None
    ) -> None:
        """Row by row; what lies in groups as one row of channels, of maps so many rows."""
        samples = batch.samples.tolist()

        def rows(values: Tensor) -> Tensor:
            values = values if held is None else values.narrow(-2, 0, held)
            return values.reshape(len(samples), at.shape[1], -1)

        for row, (sample, values) in enumerate(zip(samples, rows(x.detach()), strict=True)):
            self.outputs.setdefault((name, sample), (at[row], values.cpu().clone()))
        if x.requires_grad:
            x.register_hook(lambda g: self._gradient(name, rows(g), samples, at))

    def _gradient(self, name: str, g: Tensor, samples: list[int], at: Tensor) -> None:
        for row, sample in enumerate(samples):
            self.gradients.setdefault((name, sample), (at[row], g[row].detach().cpu().clone()))

    def see_whole(self, name: str, x: Tensor) -> None:
        """The judge's modules, microbatch after microbatch: the first name starts the next one."""
        if not self.active:
            return
        seen = sum(1 for n, _ in self.outputs if n == name)
        done, at = 0, 0
        while at < len(self._order) and done + len(self._order[at].samples) <= seen:
            done += len(self._order[at].samples)
            at += 1
        batch = self._order[at]
        if x.ndim > 3:  # a map's rows, channel by channel
            every = torch.arange(x.shape[1] * x.shape[2])
            self._see(name, x, batch, every.expand(len(batch.samples), -1))
        else:
            self.see(name, x, batch, (0, 1))


class _Watched:
    """A segment that tells what it makes."""

    def __init__(self, inner: Any, name: str, model: Model, watch: Watch) -> None:
        self._inner, self._name, self._model, self._watch = inner, name, model, watch

    def __call__(self, x: Tensor, batch: Any, *rest: Any, **more: Any) -> Tensor:
        """The segment's output, seen."""
        y = self._inner(x, batch, *rest, **more)
        tell(self._model, self._watch, self._name, y, batch)
        return y


def places(batch: Microbatch, held: int, share: tuple[int, int]) -> Tensor:
    """[samples, held]: the positions of a share of `held` places of the laid sequence."""
    first = share[0] * held
    if batch.split is None:
        at = torch.arange(first, first + held).unsqueeze(0)
    else:
        at = batch.split.tokens.part(first, first + held).positions.cpu()
    return at.expand(len(batch.samples), -1)


def share_of(model: Model, axes: tuple[str, ...] = ("cp", "ulysses")) -> tuple[int, int]:
    """(this rank's share, shares) of the laid sequence where these axes cut it; an image is read whole."""
    if model.laid.request.model.image is not None:
        return 0, 1
    ways, mine = product_coordinate(model.laid.sizes, model.context.coords, axes)
    return mine, ways


def tell(model: Model, watch: Watch, name: str, y: Tensor, batch: Any) -> None:
    """Says which positions this rank holds of y."""
    if model.laid.request.model.image is not None:
        at = _channels(model, y)
        watch.see_channels(name, y, batch, _rows(model, name, y, at) if y.ndim > 3 else at)
        return
    axes = ("cp", "ulysses", "tp") if model.context.plan.mesh.sp else ("cp", "ulysses")
    watch.see(name, y, batch, share_of(model, axes))


def _channels(model: Model, y: Tensor) -> Tensor:
    """[groups, channels] here, as numbers among all groups': groups are cut along split, channels along
    tp."""
    at, sizes = model.context.coords, model.laid.sizes
    groups, channels = y.shape[1:3]
    whole = channels * sizes["tp"]
    first = at["split"] * groups * whole + at["tp"] * channels
    return first + torch.arange(groups).unsqueeze(1) * whole + torch.arange(channels)


def _rows(model: Model, name: str, y: Tensor, at: Tensor) -> Tensor:
    """[groups, channels, rows] of a map that are of the image here, as numbers among all channels' rows."""
    stages = (s for s in model.laid.stages if name in s.names)
    block = next(s.blocks[s.names.index(name)] for s in stages)
    size = block.tensors[block.output].dims[-2].size
    first = min(model.context.coords["cp"] * y.shape[-2], size)
    return at.unsqueeze(-1) * size + torch.arange(first, min(first + y.shape[-2], size))


def watch_blocks(model: Model, watch: Watch) -> None:
    """Wraps the segments of every layer, and the embedding."""
    for stage, module in model.executor.modules.items():
        names = model.laid.stages[stage].names
        wrapped = list(module.blocks)  # type: ignore[attr-defined]
        for i, (name, block) in enumerate(zip(names, wrapped, strict=True)):
            if name == "embedding" or (
                model.laid.request.model.image is not None and name != "head"
            ):
                wrapped[i] = _Watched(block, name, model, watch)
            elif name != "head" and block.beside is not None:
                block.beside = _Watched(block.beside, f"{name}.mlp", model, watch)
            elif name != "head":
                block.attention = _Watched(block.attention, f"{name}.attention", model, watch)
                block.mlp = _Watched(block.mlp, f"{name}.mlp", model, watch)
        module.blocks = tuple(wrapped)  # type: ignore[attr-defined]

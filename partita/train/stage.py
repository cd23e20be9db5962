"""The blocks of one stage in a row: what the executor calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from partita.model.transformer import LayerBlock
from partita.parallel.dp.zero import DataParallel
from partita.parallel.kernels.chain import Residual, Segment
from partita.parallel.offload.activations import StageKept
from partita.parallel.pp.pieces import Flow, run


class StageBlocks:
    """Runs the stage's blocks one after the other; tells data parallelism before and after each.

    The first stage hands its first block the batch alone; every block sees (x, batch). `kept`: where what
    they keep leaves until backward."""

    def __init__(
        self, blocks: Sequence[Any], data: DataParallel, kept: StageKept | None = None
    ) -> None:
        self.blocks, self.data, self.kept = tuple(blocks), data, kept

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The stage's output for one microbatch."""
        return run(self._flow(x, batch, whole=True))

    @cached_property
    def _joins(self) -> bool:
        """Whether nothing is to be told between blocks: layers in a row may be one node of autograd."""
        return self.kept is None and not (self.data.reducer.reduces or self.data.gatherer.gathers)

    def flow(self, x: Tensor | None, batch: Any) -> Flow:
        """The same, stopping where rows travel."""
        return self._flow(x, batch, whole=False)

    def _flow(self, x: Tensor | None, batch: Any, whole: bool) -> Flow:
        """`whole`: stops nowhere."""
        row: list[Segment] = []
        for at, block in enumerate(self.blocks):
            segments = self._segments(block, x, batch, whole)
            row += segments
            if segments:
                continue
            x, row = _run(x, row), []
            flow = _flow(block, self.data.before(at, x), batch, whole)
            if self.kept is not None and torch.is_grad_enabled():
                flow = self.kept.run(at, flow, batch)
            x = self.data.after(at, (yield from flow))
        x = _run(x, row)
        assert x is not None, "a stage has at least one block"
        return x

    def _segments(self, block: Any, x: Tensor | None, batch: Any, whole: bool) -> Sequence[Segment]:
        """Of a block that is one node with its neighbours."""
        if x is None or not (self._joins and torch.is_grad_enabled()):
            return ()
        if not isinstance(block, LayerBlock) or not (whole or block.log is None):
            return ()  # rows travel from a layer with experts, where others may compute
        return block.segments(x, batch)


def _run(x: Tensor | None, row: Sequence[Segment]) -> Tensor | None:
    """Layers in a row on x. The last segment stands by itself: a node holds the gradient that it is given
    until its backward is over, which would be one more where a whole backward holds most. (Under weight
    halves most is held at an I's end, and the joined node's is one [batch, seq, hidden] more there.)"""
    for segments in (row[:-1], row[-1:]):
        if segments:
            x = Residual.apply(x, *segments)  # type: ignore[assignment]
    return x


def _flow(block: Any, x: Tensor | None, batch: Any, whole: bool) -> Flow:
    """A block's forward; layers stop where rows travel, unless it is to be `whole`."""
    if isinstance(block, LayerBlock):
        assert x is not None, "a layer has an input"
        return block(x, batch) if whole else (yield from block.flow(x, batch))
    return block(x, batch)  # in one piece

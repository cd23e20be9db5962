"""The blocks of one stage in a row: what the executor calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from partita.model.transformer import LayerBlock
from partita.parallel.dp.zero import DataParallel
from partita.parallel.pp.pieces import Flow, run


class StageBlocks:
    """Runs the stage's blocks one after the other; tells data parallelism before and after each.

    The first stage hands its first block the batch alone; every block sees (x, batch)."""

    def __init__(self, blocks: Sequence[Any], data: DataParallel) -> None:
        self.blocks, self.data = tuple(blocks), data

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The stage's output for one microbatch."""
        return run(self.flow(x, batch))

    def flow(self, x: Tensor | None, batch: Any) -> Flow:
        """The same, stopping where rows travel."""
        for at, block in enumerate(self.blocks):
            x = self.data.before(at, x)
            if isinstance(block, LayerBlock):
                assert x is not None, "a layer has an input"
                y = yield from block.flow(x, batch)
            else:
                y = block(x, batch)
            x = self.data.after(at, y)
        assert x is not None, "a stage has at least one block"
        return x

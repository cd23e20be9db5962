"""The blocks of one stage in a row: what the executor calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partita.parallel.dp.replicate import BlockDone, Reducer


class StageBlocks:
    """Runs the stage's blocks one after the other; tells the reducer when a block's backward is over.

    The first stage hands its first block the batch alone; every block sees (x, batch)."""

    def __init__(self, blocks: Sequence[Any], names: Sequence[str], reducer: Reducer) -> None:
        self.blocks, self.names, self.reducer = tuple(blocks), tuple(names), reducer
        self._reduces = bool(reducer.sums)

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The stage's output for one microbatch."""
        for name, block in zip(self.names, self.blocks, strict=True):
            if x is not None and self._reduces and torch.is_grad_enabled():
                x = BlockDone.apply(x, self.reducer, name)
            x = block(x, batch)
        assert x is not None, "a stage has at least one block"
        return x

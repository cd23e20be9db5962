"""Weight-gradient halves of backward that may wait for their W (Qi et al. 2024, zero bubble).

    B   work runs at once
    I   work is kept, with the tensors it needs
    W   what that I kept runs, in the order it came, and lets go of each tensor as it is done

Whatever adds to a weight's gradient goes through `WeightQueue.add`, so that a layer never knows whether
its backward is split. Kept work holds the layer's input and the gradient of its output, no copies, until
its W; both runs make the same calls on the same numbers, so that I + W equals B bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

Work = tuple[Callable[..., Any], tuple[Any, ...]]


class WeightQueue:
    """One rank's queue, shared by all its units. The executor splits; layers add."""

    __slots__ = ("_kept", "_open")

    def __init__(self) -> None:
        self._open: deque[Work] | None = None
        self._kept: dict[tuple[int, int], deque[Work]] = {}

    @property
    def defers(self) -> bool:
        """Whether an I is under way: work that is added will run later."""
        return self._open is not None

    def add(self, work: Callable[..., Any], *args: Any) -> None:
        """Runs work(*args): now, or at the W of the I under way. `args` must not change until then."""
        if self._open is None:
            work(*args)
        else:
            self._open.append((work, args))

    def split(self, stage: int, microbatch: int) -> None:
        """An I begins: what is added from now on belongs to this stage and microbatch."""
        assert self._open is None, "one I at a time"
        self._open = self._kept[stage, microbatch] = deque()

    def close(self) -> None:
        """The I is over."""
        self._open = None

    def run(self, stage: int, microbatch: int) -> None:
        """The W: runs what its I kept."""
        kept = self._kept.pop((stage, microbatch))
        with torch.no_grad():  # as inside a backward
            while kept:
                work, args = kept.popleft()
                work(*args)
                del work, args  # freed before the next one allocates

    def __len__(self) -> int:
        """Pieces of work that wait."""
        return sum(map(len, self._kept.values()))

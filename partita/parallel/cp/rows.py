"""Rows of images in torch: the halo exchange before a window, and the gather of a whole map (halo.py).

    Halo       [..., rows held, w] -> [..., rows seen, w]   all_to_all of edge rows; backward their gradients,
                                                            added up where they lie
    WholeMap   [..., rows held, w] -> [..., all rows, w]    all_gather; backward this rank's rows, no message
    crop       pixels              -> rows seen             nothing moves

Rows held beyond the image are padding: nobody reads them, and their gradient is zero. Rows seen beyond it are
zeros, as a convolution's padding is: a pooling sees none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from partita.parallel.cp.halo import Window
from partita.parallel.regions import Region

ROW = -2  # of [..., rows, columns]


@dataclass(frozen=True)
class RowMove(ABC):
    """A region that moves rows of rank `mine` of cp; called as a Region is."""

    region: Region
    mine: int

    @property
    def is_known(self) -> bool:
        """Whether forward will hand out a result that was kept, whatever it is given."""
        return self.region.is_known

    def __call__(self, x: Tensor, needless: bool = False) -> Tensor:
        """The autograd pair on x. `needless`: nobody reads the result, whose values may be arbitrary."""
        return _Move.apply(x, self, needless and self.region.tape is None)  # type: ignore[return-value]

    def shape_after(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of what forward returns."""
        return (*shape[:ROW], self.rows, shape[-1])

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of what forward returns."""

    @abstractmethod
    def bring(self, x: Tensor) -> Tensor:
        """Moves a value."""

    @abstractmethod
    def give_back(self, dy: Tensor) -> Tensor:
        """Moves a gradient."""


@dataclass(frozen=True)
class Halo(RowMove):
    """What a window sees. Sends a halo's rows to each rank that needs them, and gets its own: both ways one
    all_to_all with exact counts."""

    window: Window

    @property
    def rows(self) -> int:
        """Rows seen, those beyond the image too."""
        return self.window.needed

    @property
    def _out(self) -> list[range]:
        return [self.window.sends(self.mine, to) for to in range(self.window.ways)]

    @property
    def _in(self) -> list[range]:
        return [self.window.sends(source, self.mine) for source in range(self.window.ways)]

    @property
    def _kept(self) -> range:
        """Rows that this rank holds and sees."""
        own, seen = self.window.own(self.mine), self.window.seen(self.mine)
        first, end = max(own.start, seen.start), min(own.stop, seen.stop)
        return range(first, max(first, end))

    @property
    def _places(self) -> tuple[int, int]:
        """The rows of the image at which what is held and what is seen begin."""
        return self.mine * self.window.held, self.window.first(self.mine)

    def _exchange(self, rows: Tensor, out: Sequence[range], back: Sequence[range]) -> Tensor:
        """rows [n, ...] to each rank in order, and theirs."""
        counts = [len(r) for r in out], [len(r) for r in back]
        return self.region.comm.all_to_all(
            rows, site=self.region.site, send_counts=counts[0], receive_counts=counts[1]
        )

    def bring(self, x: Tensor) -> Tensor:
        """Rows seen; zeros beyond the image."""
        held, seen = self._places
        came = self._exchange(_picked(x, self._out, held), self._out, self._in)
        y = x.new_zeros(self.shape_after(x.shape))
        _part(y, self._kept, seen).copy_(_part(x, self._kept, held))
        for rows, part in zip(self._in, came.split([len(r) for r in self._in]), strict=True):
            _part(y, rows, seen).copy_(part.movedim(0, ROW))
        return y

    def give_back(self, dy: Tensor) -> Tensor:
        """Gradients of rows that others hold go to them; theirs of rows held here are added."""
        held, seen = self._places
        came = self._exchange(_picked(dy, self._in, seen), self._in, self._out)
        dx = dy.new_zeros(*dy.shape[:ROW], self.window.held, dy.shape[-1])
        _part(dx, self._kept, held).copy_(_part(dy, self._kept, seen))
        for rows, part in zip(self._out, came.split([len(r) for r in self._out]), strict=True):
            _part(dx, rows, held).add_(part.movedim(0, ROW))
        return dx


def _part(x: Tensor, rows: range, first: int) -> Tensor:
    """Rows of the image, of x that begins at row `first`."""
    return x.narrow(ROW, rows.start - first if rows else 0, len(rows))


def _picked(x: Tensor, runs: Sequence[range], first: int) -> Tensor:
    """Runs of rows one behind the other, as the first dim."""
    return torch.cat([_part(x, rows, first) for rows in runs], ROW).movedim(ROW, 0).contiguous()


@dataclass(frozen=True)
class WholeMap(RowMove):
    """All `size` rows of a map. What reads it is the same on every rank, and so is its gradient."""

    size: int

    @property
    def rows(self) -> int:
        """All."""
        return self.size

    def bring(self, x: Tensor) -> Tensor:
        """Gathers shares, padding with them, and leaves that out."""
        dim = x.ndim + ROW
        whole = self.region.comm.all_gather(x.contiguous(), site=self.region.site, dim=dim)
        return whole.narrow(dim, 0, self.size).contiguous()

    def give_back(self, dy: Tensor) -> Tensor:
        """This rank's rows; of padding zeros."""
        held = -(-self.size // self.region.comm.size)
        first = min(self.mine * held, self.size)
        rows = min(held, self.size - first)
        return pad(dy.narrow(ROW, first, rows), (0, 0, 0, held - rows)).contiguous()


class _Move(torch.autograd.Function):
    """Forward: bring, or what was kept of it. Backward: give_back, its conjugate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, move: RowMove, needless: bool) -> Tensor:
        """Keeps nothing."""
        ctx.move = move
        if needless:
            return x.new_empty(move.shape_after(x.shape))
        return move.region.known(lambda: move.bring(x))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Moves the gradient."""
        return ctx.move.give_back(dy), None, None


def crop(x: Tensor, window: Window, mine: int) -> Tensor:
    """The rows of whole pixels [..., height, width] that a rank's windows see, in storage of their own."""
    rows, first = window.seen(mine), window.first(mine)
    y = x.new_zeros(*x.shape[:ROW], window.needed, x.shape[-1])
    _part(y, rows, first).copy_(x.narrow(ROW, rows.start, len(rows)))
    return y

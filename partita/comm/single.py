"""A group of one: every collective is free and records nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from partita.comm.protocol import Comm, Done, Handle, Key, ReduceOp, Sent


@dataclass(frozen=True)
class SingleComm:
    """The Comm of a rank alone on an axis. Results may be the argument itself."""

    axis: str
    lane: str = "compute"
    ranks: tuple[int, ...] = (0,)
    rank: int = 0
    size: int = 1

    def all_reduce(self, x: Tensor, *, site: str, op: ReduceOp = "sum") -> Tensor:
        """x."""
        return x

    def all_gather(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """x."""
        return x

    def reduce_scatter(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """x."""
        return x

    def all_to_all(
        self,
        x: Tensor,
        *,
        site: str,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """x."""
        return x

    def counts(self, x: Tensor, *, site: str) -> list[list[int]]:
        """x."""
        return [x.tolist()]

    def broadcast(self, x: Tensor, *, site: str, root: int = 0) -> Tensor:
        """x."""
        return x

    def barrier(self, *, site: str) -> None:
        """Nobody to wait for."""

    def moves(self, size: int) -> bool:
        """Nothing has to."""
        return True

    def start_all_reduce(
        self, x: Tensor, *, site: str, op: ReduceOp = "sum", out: Tensor | None = None
    ) -> Handle:
        """x, done."""
        return Done(x if out is None else out.copy_(x))

    def start_all_gather(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """x, done."""
        return Done(x if out is None else out.copy_(x))

    def start_reduce_scatter(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """x, done."""
        return Done(x if out is None else out.copy_(x))

    def start_all_to_all(
        self, x: Tensor, *, site: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Handle:
        """x, done."""
        return Done(x)

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Sent:
        """A rank alone has nobody to send to."""
        raise AssertionError(f"{site}: a group of one sends to rank {to}")

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """A rank alone has nobody to receive from."""
        raise AssertionError(f"{site}: a group of one receives from rank {source}")


@dataclass(frozen=True)
class SingleWorld:
    """A run of one rank."""

    rank: int = 0
    size: int = 1

    def make(self, ranks: Sequence[int], *, axis: str, lane: str) -> Comm | None:
        """A SingleComm where this rank is named."""
        return SingleComm(axis, lane, tuple(ranks), 0, 1) if self.rank in ranks else None

    def check(self) -> None:
        """Nothing to compare."""

    def close(self, drain: bool = True) -> None:
        """Nothing to free."""

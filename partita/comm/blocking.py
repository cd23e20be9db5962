"""The collectives that wait, made of those that start: what every Comm with ranks in it shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from partita.comm.protocol import ReduceOp


class Blocking:
    """Adds to a class with `size` and the four `start_` collectives those that return tensors."""

    size: int
    start_all_reduce: Any
    start_all_gather: Any
    start_reduce_scatter: Any
    start_all_to_all: Any

    def moves(self, size: int) -> bool:
        """What is started moves by itself."""
        return True

    def all_reduce(self, x: Tensor, *, site: str, op: ReduceOp = "sum") -> Tensor:
        """Sum or maximum, in a new tensor."""
        return self.start_all_reduce(x, site=site, op=op).wait()

    def all_gather(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """Shards concatenated along dim."""
        return self.start_all_gather(x, site=site, dim=dim).wait()

    def reduce_scatter(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """This rank's part of the sum."""
        return self.start_reduce_scatter(x, site=site, dim=dim).wait()

    def all_to_all(
        self,
        x: Tensor,
        *,
        site: str,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Rows of dim 0 to each rank in order; equal shares unless counts are given."""
        even = [x.shape[0] // self.size] * self.size
        send, take = send_counts or even, receive_counts or even
        return self.start_all_to_all(x, site=site, send_counts=send, receive_counts=take).wait()

    def counts(self, x: Tensor, *, site: str) -> list[list[int]]:
        """All ranks' vectors, on the host."""
        return self.all_gather(x.view(1, -1), site=site).tolist()

"""One call of each collective, as whoever measures a machine makes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from partita.comm.protocol import Comm, Key

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")


@dataclass(frozen=True)
class Calls:
    """One call of each collective, as layers make them; `send` goes there and back."""

    comm: Comm
    x: torch.Tensor
    site: str

    def all_reduce(self, i: int) -> None:
        """Of the whole."""
        self.comm.all_reduce(self.x, site=f"{self.site}:all_reduce")

    def all_gather(self, i: int) -> None:
        """Of a shard."""
        self.comm.all_gather(self.x, site=f"{self.site}:all_gather")

    def reduce_scatter(self, i: int) -> None:
        """Of the whole."""
        self.comm.reduce_scatter(self.x, site=f"{self.site}:reduce_scatter")

    def all_to_all(self, i: int) -> None:
        """Equal rows."""
        self.comm.all_to_all(self.x, site=f"{self.site}:all_to_all")

    def broadcast(self, i: int) -> None:
        """Of rank 0's."""
        self.comm.broadcast(self.x, site=f"{self.site}:broadcast")

    def send(self, i: int) -> None:
        """There and back."""
        site, there, back = f"{self.site}:send", Key("F", 1, i), Key("B", 0, i)
        if self.comm.rank == 0:
            sent = self.comm.send(self.x, 1, key=there, site=site)
            self.comm.receive(self.x, 1, key=back, site=site).wait()
            sent.wait()
        elif self.comm.rank == 1:
            self.comm.receive(self.x, 0, key=there, site=site).wait()
            self.comm.send(self.x, 0, key=back, site=site).wait()

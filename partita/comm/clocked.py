"""Transfers take a stated time, on any World, so that overlap can be tested anywhere.

    world = ClockedWorld(world, {"dp": Link(latency_s=1e-3, bytes_per_s=1e9)})

A transfer takes latency + bytes / bytes_per_s (bytes of the tensor handed in) and begins when its link has
done with the one before it; a collective begins when its last rank does. `start_...` and `send` return at
once, `wait` not before the end. Lanes without a link take what the World under them takes; lanes
given one Link share it. Ranks tell each other their times through a second group, so nothing is
reordered or recorded in the group that carries the tensors. Clocks must agree: ranks of one host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partita.comm.blocking import Blocking
from partita.comm.protocol import Comm, Done, Handle, Key, ReduceOp, Sent, World


@dataclass
class Link:
    """What one rank's transfers pass through, one after the other."""

    latency_s: float
    bytes_per_s: float
    free_s: float = field(default=0.0)  # when the transfers begun so far have ended

    def begin(self, x: Tensor) -> tuple[float, float]:
        """(earliest start, duration) of a transfer of x; the link is taken until then."""
        start = max(time.perf_counter(), self.free_s)
        duration = self.latency_s + x.numel() * x.element_size() / self.bytes_per_s
        self.free_s = start + duration
        return start, duration

    def end(self, when: float) -> None:
        """Sleeps until a transfer's end; the link was not free before it."""
        self.free_s = max(self.free_s, when)
        time.sleep(max(0.0, when - time.perf_counter()))


class ClockedWorld:
    """A World whose lanes in `links` take their time."""

    def __init__(self, inner: World, links: Mapping[str, Link]) -> None:
        self.inner, self.links = inner, dict(links)

    @property
    def rank(self) -> int:
        """This rank."""
        return self.inner.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.inner.size

    def make(self, ranks: Sequence[int], *, axis: str, lane: str) -> Comm | None:
        """The World's Comm, clocked where the lane has a link."""
        made, link = self.inner.make(ranks, axis=axis, lane=lane), self.links.get(lane)
        if link is None or len(ranks) == 1:
            return made
        clock = self.inner.make(ranks, axis=axis, lane=f"{lane}/clock")
        return None if made is None or clock is None else ClockedComm(made, clock, link)

    def close(self) -> None:
        """Closes the World."""
        self.inner.close()


@dataclass
class _Timed:
    """A transfer under way: done when it has arrived and its time is over."""

    inner: Handle
    ends: Callable[[], float]
    link: Link
    value: Tensor | None = None

    def wait(self) -> Tensor:
        """Returns at the end of the transfer."""
        if self.value is None:
            self.value = self.inner.wait()
            self.link.end(self.ends())
        return self.value


@dataclass
class _TimedSent(_Timed):
    """A message under way."""

    inner: Sent

    @property
    def has_gone(self) -> bool:
        """Whether its time is over too."""
        return self.inner.has_gone and time.perf_counter() >= self.ends()


class ClockedComm(Blocking):
    """One group whose transfers take their time. `clock` is a second Comm over the same ranks."""

    def __init__(self, inner: Comm, clock: Comm, link: Link) -> None:
        self.inner, self.clock, self.link = inner, clock, link
        self.axis, self.lane = inner.axis, inner.lane
        self.ranks, self.rank, self.size = inner.ranks, inner.rank, inner.size
        self._number = 0

    def _timed(self, x: Tensor, inner: Handle) -> Handle:
        """A collective: it ends a duration after its last rank's start."""
        start, duration = self.link.begin(x)
        key = Key("F", 0, self._number, slot=7)  # no message has this slot
        self._number = (self._number + 1) % 65536
        others = [r for r in range(self.size) if r != self.rank]
        for r in others:
            self._tell(start, r, key)

        def ends() -> float:
            return max(start, *(self._hear(r, key) for r in others)) + duration

        return _Timed(inner, ends, self.link)

    def _tell(self, when: float, to: int, key: Key) -> None:
        self.clock.send(torch.tensor([when], dtype=torch.float64), to, key=key, site="clock")

    def _hear(self, source: int, key: Key) -> float:
        like = torch.empty(1, dtype=torch.float64)
        return float(self.clock.receive(like, source, key=key, site="clock").wait())

    def all_to_all(
        self,
        x: Tensor,
        *,
        site: str,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """As the inner Comm's."""
        counts = {"send_counts": send_counts, "receive_counts": receive_counts}
        return self._timed(x, _Later(lambda: self.inner.all_to_all(x, site=site, **counts))).wait()

    def broadcast(self, x: Tensor, *, site: str, root: int = 0) -> Tensor:
        """As the inner Comm's."""
        return self._timed(x, _Later(lambda: self.inner.broadcast(x, site=site, root=root))).wait()

    def barrier(self, *, site: str) -> None:
        """Moves no bytes and takes no time."""
        self.inner.barrier(site=site)

    def start_all_reduce(
        self, x: Tensor, *, site: str, op: ReduceOp = "sum", out: Tensor | None = None
    ) -> Handle:
        """Under way."""
        return self._timed(x, self.inner.start_all_reduce(x, site=site, op=op, out=out))

    def start_all_gather(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Under way."""
        return self._timed(x, self.inner.start_all_gather(x, site=site, dim=dim, out=out))

    def start_reduce_scatter(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Under way."""
        return self._timed(x, self.inner.start_reduce_scatter(x, site=site, dim=dim, out=out))

    def start_all_to_all(
        self, x: Tensor, *, site: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Handle:
        """Under way."""
        counts = {"send_counts": send_counts, "receive_counts": receive_counts}
        return self._timed(x, self.inner.start_all_to_all(x, site=site, **counts))

    def counts(self, x: Tensor, *, site: str) -> list[list[int]]:
        """As the inner Comm's."""
        found = self.inner.counts(x, site=site)
        self._timed(x, Done(x)).wait()
        return found

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Sent:
        """Under way; the receiver hears when it will be there."""
        start, duration = self.link.begin(x)
        sent = self.inner.send(x, to, key=key, site=site)
        self._tell(start + duration, to, key)
        return _TimedSent(sent, lambda: start + duration, self.link)

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """There when the sender's link has carried it; takes nothing of this rank's link."""
        posted = self.inner.receive(like, source, key=key, site=site)
        return _Timed(posted, lambda: self._hear(source, key), Link(0.0, 1.0))


@dataclass(frozen=True)
class _Later:
    """A blocking call as a handle."""

    call: Callable[[], Tensor]

    def wait(self) -> Tensor:
        """Calls."""
        return self.call()

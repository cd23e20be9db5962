"""Records what a rank sends: wraps any Comm and appends a Transfer for each call that moves bytes.

Bytes are those of the tensor handed in. A receive is not a Transfer. Waiting time is added up whether or
not transfers are kept, so that a slow rank can be told from one that waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from partita.comm.protocol import Comm, Handle, Key, ReduceOp, Sent, Where
from partita.record.transfer import Transfer


@dataclass
class Recorder:
    """One rank's record. `active` says whether transfers are kept."""

    rank: int = 0
    active: bool = True
    transfers: list[Transfer] = field(default_factory=list)
    origin_s: float = field(default_factory=time.perf_counter)
    waits: list[tuple[str, float, float]] = field(default_factory=list)
    watch: Callable[[Where, str, Tensor], None] | None = None  # sees what is handed in, as it is
    _wait_s: float = 0.0

    def waited(self, seconds: float) -> None:
        """Adds time spent waiting for others."""
        self._wait_s += seconds

    def waited_for(self, axis: str, start_s: float) -> None:
        """Adds a wait for a handle of an axis, from `start_s` until now on the host's clock."""
        end_s = time.perf_counter()
        self.waited(end_s - start_s)
        if self.active:
            self.waits.append((axis, start_s, end_s))

    def note(self, where: Where, axis: str, op: str, site: str, size: int, start_s: float) -> None:
        """A call that moved `size` bytes, from `start_s` until now on the host's clock."""
        if self.active:
            begin, end = start_s - self.origin_s, time.perf_counter() - self.origin_s
            found = (self.rank, axis, op, site, where.phase, size, where.step, where.microbatch)
            self.transfers.append(Transfer(*found, begin, end))

    def take_waits(self) -> list[tuple[str, float, float]]:
        """Axis, start and end of the waits for handles since the last call of this."""
        found, self.waits = self.waits, []
        return found

    def take_wait_s(self) -> float:
        """Seconds waited since the last call of this."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited

    def take(self) -> list[Transfer]:
        """The transfers kept since the last call of this."""
        found, self.transfers = self.transfers, []
        return found


@dataclass
class _Timed:
    """A handle whose waiting counts."""

    inner: Handle
    recorder: Recorder
    axis: str

    def wait(self) -> Tensor:
        """Waits, and says how long."""
        start = time.perf_counter()
        out = self.inner.wait()
        self.recorder.waited_for(self.axis, start)
        return out


class RecordingComm:
    """A Comm that also writes down what goes through it."""

    def __init__(self, inner: Comm, recorder: Recorder, where: Where) -> None:
        self.inner, self.recorder, self.where = inner, recorder, where
        self.axis, self.lane = inner.axis, inner.lane
        self.ranks, self.rank, self.size = inner.ranks, inner.rank, inner.size

    def _begin(self, x: Tensor, site: str) -> float:
        """A call begins: now."""
        if self.recorder.watch is not None:
            self.recorder.watch(self.where, site, x)
        return time.perf_counter()

    def _record(self, op: str, x: Tensor, site: str, start: float) -> None:
        if not site.startswith("checkpoint:"):
            size = x.numel() * x.element_size()
            self.recorder.note(self.where, self.axis, op, site, size, start)

    def _done(self, op: str, x: Tensor, site: str, start: float) -> None:
        self.recorder.waited(time.perf_counter() - start)
        self._record(op, x, site, start)

    def all_reduce(self, x: Tensor, *, site: str, op: ReduceOp = "sum") -> Tensor:
        """Recorded as all_reduce, bytes of x."""
        start = self._begin(x, site)
        out = self.inner.all_reduce(x, site=site, op=op)
        self._done("all_reduce", x, site, start)
        return out

    def all_gather(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """Recorded as all_gather, bytes of the shard."""
        start = self._begin(x, site)
        out = self.inner.all_gather(x, site=site, dim=dim)
        self._done("all_gather", x, site, start)
        return out

    def reduce_scatter(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """Recorded as reduce_scatter, bytes of the whole input."""
        start = self._begin(x, site)
        out = self.inner.reduce_scatter(x, site=site, dim=dim)
        self._done("reduce_scatter", x, site, start)
        return out

    def all_to_all(
        self,
        x: Tensor,
        *,
        site: str,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Recorded as all_to_all, bytes of the send buffer."""
        start = self._begin(x, site)
        out = self.inner.all_to_all(
            x, site=site, send_counts=send_counts, receive_counts=receive_counts
        )
        self._done("all_to_all", x, site, start)
        return out

    def counts(self, x: Tensor, *, site: str) -> list[list[int]]:
        """Recorded as all_gather, bytes of x."""
        start = self._begin(x, site)
        out = self.inner.counts(x, site=site)
        self._done("all_gather", x, site, start)
        return out

    def broadcast(self, x: Tensor, *, site: str, root: int = 0) -> Tensor:
        """Recorded as broadcast by every rank of the group, bytes of x."""
        start = self._begin(x, site)
        out = self.inner.broadcast(x, site=site, root=root)
        self._done("broadcast", x, site, start)
        return out

    def barrier(self, *, site: str) -> None:
        """Moves no bytes: not recorded."""
        self.inner.barrier(site=site)

    def moves(self, size: int) -> bool:
        """As inside."""
        return self.inner.moves(size)

    def start_all_reduce(
        self, x: Tensor, *, site: str, op: ReduceOp = "sum", out: Tensor | None = None
    ) -> Handle:
        """Recorded when started."""
        start = self._begin(x, site)
        handle = self.inner.start_all_reduce(x, site=site, op=op, out=out)
        self._record("all_reduce", x, site, start)
        return _Timed(handle, self.recorder, self.axis)

    def start_all_gather(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Recorded when started."""
        start = self._begin(x, site)
        handle = self.inner.start_all_gather(x, site=site, dim=dim, out=out)
        self._record("all_gather", x, site, start)
        return _Timed(handle, self.recorder, self.axis)

    def start_reduce_scatter(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Recorded when started."""
        start = self._begin(x, site)
        handle = self.inner.start_reduce_scatter(x, site=site, dim=dim, out=out)
        self._record("reduce_scatter", x, site, start)
        return _Timed(handle, self.recorder, self.axis)

    def start_all_to_all(
        self, x: Tensor, *, site: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Handle:
        """Recorded when started."""
        start = self._begin(x, site)
        handle = self.inner.start_all_to_all(
            x, site=site, send_counts=send_counts, receive_counts=receive_counts
        )
        self._record("all_to_all", x, site, start)
        return _Timed(handle, self.recorder, self.axis)

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Sent:
        """Recorded as send, bytes of x."""
        start = self._begin(x, site)
        handle = self.inner.send(x, to, key=key, site=site)
        self._record("send", x, site, start)
        return handle

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """Not recorded; its waiting counts."""
        handle = self.inner.receive(like, source, key=key, site=site)
        return _Timed(handle, self.recorder, self.axis)

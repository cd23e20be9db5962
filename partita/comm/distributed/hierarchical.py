"""Groups that span hosts: shared memory within a host, torch.distributed between hosts.

    all_reduce       reduce_scatter inside | all_reduce across, each place its share | all_gather inside
    reduce_scatter   reduce_scatter inside | reduce_scatter across
    all_gather       all_gather across, own shards | all_gather inside
    broadcast        across, by those in the root's place | broadcast inside

`inside` is the group's ranks on this host, `across` those with this rank's place in it on each host: what
crosses a host's link is what one rank a host would send (Jia et al. 2018, section 3.3). A reduction that is
only started goes on by itself under compute, over groups of its own: one thread adds up inside and starts
what goes between hosts, another takes that in and gathers (turns.py), so that one reduction crosses the
link while the next is added up. The first part of a gather is the one between hosts, which torch's
threads send. An all_to_all goes over torch.distributed alone: hierarchy saves nothing of it
(docs/benchmarks.md). Low precision adds up in fp32 and rounds once.
"""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partita.base.errors import CommError
from partita.comm.blocking import Blocking
from partita.comm.distributed.calls import CallPages, page_bytes
from partita.comm.distributed.torch import TorchWorld
from partita.comm.distributed.torch_comm import TorchComm
from partita.comm.distributed.turns import InTurn, Unseen
from partita.comm.protocol import Comm, Handle, Key, Message, ReduceOp, Sent, World, message_of
from partita.comm.shm.shm import ShmWorld, available
from partita.comm.shm.shm_comm import LOW, ShmComm


def join_hosts(between: TorchWorld, host: str, timeout_s: float) -> World:
    """The world of ranks that each name the host they are on; `between` where every one is alone there, or
    a host has no shared memory for them. An all_gather of three numbers a rank."""
    rank, size = between.rank, between.size
    comm = between.make(range(size), axis="world", lane="hosts")
    number = int.from_bytes(hashlib.blake2b(host.encode(), digest_size=7).digest(), "little")
    mine = torch.tensor([[number, secrets.randbits(56), int(available())]])
    rows = comm.all_gather(mine, site="hosts").tolist() if comm is not None else []
    named = [row[0] for row in rows]
    hosts = [named.index(n) for n in named]
    if len(set(hosts)) == size or not all(row[2] for row in rows):
        return between
    here = [r for r in range(size) if hosts[r] == hosts[rank]]
    path = Path(tempfile.gettempdir()) / f"partita-{rows[here[0]][1]:014x}"
    shm = ShmWorld(rank, size, path, timeout_s=timeout_s, where=between.where, ranks=here)
    return HostsWorld(between, shm, hosts)


class HostsWorld:
    """Ranks of several hosts; `hosts` is each rank's, `shm` what this host's share."""

    def __init__(self, between: TorchWorld, shm: ShmWorld, hosts: Sequence[int]) -> None:
        self.between, self.shm, self.hosts = between, shm, tuple(hosts)
        self.rank, self.size, self.where = between.rank, between.size, between.where
        between.board = shm.board  # one last word a rank
        self._made: list[HierarchicalComm] = []

    def make(self, ranks: Sequence[int], *, axis: str, lane: str) -> Comm | None:
        """In shared memory where one host has them all; by hierarchy where each host has as many of them,
        and more than one; else over torch.distributed."""
        by_host: dict[int, list[int]] = {}
        for r in ranks:
            by_host.setdefault(self.hosts[r], []).append(r)
        rows, mine = list(by_host.values()), self.hosts[self.rank]
        if len(rows) == 1:
            return self.shm.make(ranks, axis=axis, lane=lane) if mine in by_host else None
        whole = self.between.make(ranks, axis=axis, lane=lane)
        if len(rows[0]) == 1 or len({len(row) for row in rows}) > 1:
            return whole
        across = [
            self.between.make(column, axis=axis, lane=lane)
            for column in zip(*rows, strict=True)
            for _ in range(3)
        ]
        inside = [
            self.shm.make(by_host[mine], axis=axis, lane=lane) for _ in range(5) if mine in by_host
        ]
        pages = [self.shm.room(page_bytes(len(rows[0]))) for _ in range(mine in by_host)]
        if self.rank not in ranks:
            return None
        found = [c for c in across if c is not None]
        made = HierarchicalComm(self, tuple(ranks), rows, (axis, lane), (inside, found, whole))
        made.pages = CallPages(pages[0])
        self._made.append(made)
        return made

    def check(self) -> None:
        """Of groups between hosts; of those that a thread calls in, in their turn."""
        self.between.check()
        for comm in self._made:
            comm.compare_started()

    def close(self, drain: bool = True) -> None:
        """Leaves both worlds."""
        for comm in self._made:
            comm.begins.close()
            comm.ends.close()
        self.shm.close(drain)
        self.between.close(drain)


@dataclass(frozen=True, slots=True)
class _Note:
    """One call of a group: what its parts are told as, and its number."""

    comm: HierarchicalComm
    message: Message
    number: int
    digest: int

    def on(self, comm: Any) -> Callable[..., Any]:
        """Calls a method of a Comm as a part of this: boards, digests and errors name this."""

        def call(method: str, *args: Any, **words: Any) -> Any:
            comm.called = self.message
            try:
                with self.told():
                    return getattr(comm, method)(*args, **words)
            finally:
                comm.called = None

        return call

    @contextmanager
    def told(self) -> Iterator[None]:
        """A failure within is told as unlike calls where it is one."""
        try:
            yield
        except CommError:
            self.check()
            raise

    def check(self) -> None:
        """Raises CommError where another rank of this host called something else under this number."""
        if self.comm.pages.differ(len(self.comm.mates), self.number, self.digest):
            raise self.comm.disagreement(self)


class _Pending:
    """A gather under way: its part between hosts, and how it goes on."""

    def __init__(
        self, queue: list[_Pending], note: _Note, first: Handle, finish: Callable[[Tensor], Tensor]
    ) -> None:
        self._queue, self._note, self._first, self._finish = queue, note, first, finish
        self._value: Tensor | None = None
        queue.append(self)

    def wait(self) -> Tensor:
        """The result; what was started before goes first."""
        if self._value is None:
            while self._queue[0] is not self:
                self._queue[0].wait()
            with self._note.told():
                self._value = self._finish(self._first.wait())
            self._queue.remove(self)
        return self._value


class _Going:
    """A reduction that goes on in the group's threads; on the board it is the rank's call."""

    def __init__(
        self, note: _Note, begin: Callable[[], Handle], finish: Callable[[Handle], Tensor]
    ) -> None:
        comm = note.comm
        self._board = comm.world.shm.board
        self._board.status.enter(comm.axis, note.message, note.number, comm.world.where)
        self._board.enter(self._board.status)
        begun = comm.begins.start(begin)
        self._running = comm.ends.start(lambda: finish(begun.wait()))

    def wait(self) -> Tensor:
        """The result."""
        found = self._running.wait()
        self._board.leave()
        return found


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a reduction goes over, in turn."""

    inside: ShmComm
    across: TorchComm
    back: ShmComm


class HierarchicalComm(Blocking):
    """One group on one axis and lane. See the module."""

    def __init__(
        self,
        world: HostsWorld,
        ranks: tuple[int, ...],
        rows: Sequence[Sequence[int]],
        named: tuple[str, str],
        comms: tuple[Any, Any, Any],
    ) -> None:
        self.world, self.ranks, (self.axis, self.lane) = world, ranks, named
        self.rank, self.size = ranks.index(world.rank), len(ranks)
        self._order = [[ranks.index(r) for r in row] for row in rows]  # [host][place]
        self._host = next(h for h, row in enumerate(rows) if world.rank in row)
        (inside, back, self._spread, *beside), (across, self._ends, beyond), self._whole = comms
        self._now, self._started = (
            _Parts(inside, across, back),
            _Parts(beside[0], beyond, beside[1]),
        )
        self.begins, self.ends = (InTurn(f"{self.axis} {which}") for which in ("begins", "ends"))
        for comm in (*beside, beyond):
            comm.world = Unseen(world.shm, world.between)
        beyond.is_compared = False
        self.mates = self._order[self._host]  # of the group's ranks, those of this host
        self._gathering: list[_Pending] = []
        self.pages: CallPages  # of what this host's ranks called
        self._sequence = 0

    def _enter(self, op: str, x: Tensor, site: str) -> _Note:
        """Notes a call, and compares it with those of this host's other ranks."""
        message = message_of(op, x.shape if op != "all_to_all" else (), x.dtype, site)
        number, self._sequence = self._sequence, self._sequence + 1
        digest = self.pages.post(self.mates.index(self.rank), number, message)
        note = _Note(self, message, number, digest)
        note.check()
        return note

    def disagreement(self, note: _Note) -> CommError:
        """The error of ranks that call unlike collectives."""
        return self._now.inside.disagreement((note.message, note.number))

    def compare_started(self) -> None:
        """Raises CommError where ranks have started unlike reductions: 16 bytes, once those are over."""
        if self.ends.has_begun:
            self.ends.start(self._started.across.compare_calls).wait()

    # Collectives ---------------------------------------------------------------------------------

    def start_all_reduce(
        self, x: Tensor, *, site: str, op: ReduceOp = "sum", out: Tensor | None = None
    ) -> Handle:
        """Its parts go on in turn, behind those of what was started before."""
        by = self._enter("all_reduce", x, site), self._started
        return _Going(
            by[0],
            lambda: self._begin_all_reduce(x, site, op, by),
            lambda share: self._finish_all_reduce(share.wait(), x, site, op, out, by),
        )

    def start_reduce_scatter(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """The same."""
        by = self._enter("reduce_scatter", x, site), self._started
        return _Going(
            by[0],
            lambda: self._begin_reduce_scatter(x, site, dim, by),
            lambda mine: _placed(mine.wait()[0].to(x.dtype), out),
        )

    def start_all_to_all(
        self, x: Tensor, *, site: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Handle:
        """Over torch.distributed: see the module."""
        self._enter("all_to_all", x, site)
        counts = {"send_counts": send_counts, "receive_counts": receive_counts}
        return self._whole.start_all_to_all(x, site=site, **counts)

    def all_reduce(self, x: Tensor, *, site: str, op: ReduceOp = "sum") -> Tensor:
        """In this thread."""
        by = self._enter("all_reduce", x, site), self._now
        share = self._begin_all_reduce(x, site, op, by)
        with by[0].told():
            return self._finish_all_reduce(share.wait(), x, site, op, None, by)

    def reduce_scatter(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """In this thread."""
        by = self._enter("reduce_scatter", x, site), self._now
        mine = self._begin_reduce_scatter(x, site, dim, by)
        with by[0].told():
            return mine.wait()[0].to(x.dtype)

    def _begin_all_reduce(
        self, x: Tensor, site: str, op: ReduceOp, by: tuple[_Note, _Parts]
    ) -> Handle:
        """Each place of a host adds up its share inside and starts on it between hosts; of a maximum, which
        is of a few numbers, the whole."""
        note, parts = by
        inside, across = note.on(parts.inside), note.on(parts.across)
        flat = x.detach().reshape(-1)
        if op == "max":
            mine = inside("all_reduce", flat, site=site, op=op)
            return across("start_all_reduce", mine, site=site, op=op)
        n, size = parts.inside.size, x.numel()
        if size % n or x.dtype in LOW:
            flat = x.new_zeros(-(-size // n) * n, dtype=_wide(x.dtype))
            flat[:size] = x.detach().reshape(-1)
        share = inside("reduce_scatter", flat, site=site)
        return across("start_all_reduce", share, site=site, out=share)

    def _finish_all_reduce(
        self,
        share: Tensor,
        x: Tensor,
        site: str,
        op: ReduceOp,
        out: Tensor | None,
        by: tuple[_Note, _Parts],
    ) -> Tensor:
        """All shares, inside."""
        note, parts = by
        if op == "sum":
            direct = out is not None and x.numel() % parts.inside.size == 0
            whole = out.view(-1) if out is not None and direct else None
            back = note.on(parts.back)
            share = back("start_all_gather", share.to(x.dtype), site=site, out=whole).wait()
        return _placed(share[: x.numel()].view(x.shape), out)

    def _begin_reduce_scatter(
        self, x: Tensor, site: str, dim: int, by: tuple[_Note, _Parts]
    ) -> Handle:
        """Each place of a host adds up what the ranks in it are due, then starts to send each its part."""
        note, parts = by
        pieces = x.detach().chunk(self.size, dim)
        places = list(zip(*self._order, strict=True))
        due = torch.stack([pieces[g] for place in places for g in place]).to(_wide(x.dtype))
        mine = note.on(parts.inside)("reduce_scatter", due, site=site)
        return note.on(parts.across)("start_reduce_scatter", mine, site=site)

    def start_all_gather(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Each place of a host gathers between hosts, then all places inside."""
        note = self._enter("all_gather", x, site)
        across, inside = note.on(self._ends), note.on(self._spread)
        first = across("start_all_gather", x.detach().unsqueeze(0), site=site)

        def finish(came: Tensor) -> Tensor:
            """[place, host, ...] in the group's order."""
            every = inside("all_gather", came.unsqueeze(0), site=site)
            found: list[Any] = [None] * self.size
            for h, row in enumerate(self._order):
                for i, g in enumerate(row):
                    found[g] = every[i, h]
            whole = torch.cat(found, dim)
            return whole if out is None else out.copy_(whole)

        return _Pending(self._gathering, note, first, finish)

    def broadcast(self, x: Tensor, *, site: str, root: int = 0) -> Tensor:
        """Between hosts by those in the root's place, then inside."""
        note = self._enter("broadcast", x, site)
        host, place = next((h, row.index(root)) for h, row in enumerate(self._order) if root in row)
        if self._order[self._host][place] == self.rank:
            x = note.on(self._now.across)("broadcast", x, site=site, root=host)
        return note.on(self._now.inside)("broadcast", x, site=site, root=place)

    def barrier(self, *, site: str) -> None:
        """This host's ranks, the hosts, and this host's ranks again."""
        note = self._enter("barrier", torch.empty(0), site)
        for comm in (self._now.inside, self._now.across, self._now.back):
            note.on(comm)("barrier", site=site)

    # Point to point ------------------------------------------------------------------------------

    def _way(self, peer: int) -> tuple[Any, int]:
        """The Comm that reaches a rank of the group, and its place there."""
        mine = self.mates
        return (self._now.inside, mine.index(peer)) if peer in mine else (self._whole, peer)

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Sent:
        """Inside where the receiver is of this host."""
        comm, place = self._way(to)
        return comm.send(x, place, key=key, site=site)

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """Inside where the sender is of this host."""
        comm, place = self._way(source)
        return comm.receive(like, place, key=key, site=site)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which a dtype is added up."""
    return torch.float32 if dtype in LOW else dtype


def _placed(found: Tensor, out: Tensor | None) -> Tensor:
    """A result where it is wanted."""
    return found if out is None or out.data_ptr() == found.data_ptr() else out.copy_(found)

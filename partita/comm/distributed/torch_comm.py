"""One process group of torch.distributed as a Comm.

Gloo's errors never name a rank or an operation: they are caught here, and told with the axis, op, site, phase
and step, and with what is known of the other ranks. bf16 sums are made in fp32. reduce_scatter, which
gloo lacks, is an all_to_all and a sum in rank order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from partita.base.errors import CommError
from partita.comm.blocking import Blocking
from partita.comm.board import Board
from partita.comm.distributed.calls import RING, CallPages
from partita.comm.protocol import Handle, Key, Message, ReduceOp, Sent, Where, message_of
from partita.comm.table import Status, describe

LOW = (torch.bfloat16, torch.float16)
GATHER = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)  # its name since torch 2.13


class Members(Protocol):
    """What a group asks of the World it is of: where the rank is, what others say, what is sent."""

    rank: int
    size: int
    where: Where
    board: Board

    def statuses(self, message: str) -> Sequence[Status | None]:
        """Every rank's last call; `message` is why this rank fails."""
        ...

    def dead(self, ranks: Sequence[int]) -> Sequence[int]:
        """Who has died."""
        ...

    def started(self, work: Any) -> None:
        """A send is under way."""
        ...

    def waited(self, work: Any) -> None:
        """A send was waited for."""
        ...


@dataclass
class _Work:
    """A torch work handle and how its result is finished."""

    comm: TorchComm
    work: Any
    result: Callable[[], Tensor]
    note: tuple[Message, int]
    keeps: Any = None
    value: Tensor | None = None

    @property
    def has_gone(self) -> bool:
        """Whether torch's work is over, which gloo says of no send before it is waited for."""
        return self.work is None or self.work.is_completed()

    def wait(self) -> Tensor:
        """Waits, and says who was missing when that fails."""
        if self.value is None:
            self.comm.run(self.work.wait if self.work is not None else lambda: None, *self.note)
            self.comm.check(*self.note)
            self.value = self.result()
            self.comm.world.board.leave()
            self.comm.world.waited(self.work)
            self.work = self.keeps = None
        return self.value


class TorchComm(Blocking):
    """One process group on one axis and lane; `up` is that of messages to lower places."""

    def __init__(
        self, world: Members, ranks: tuple[int, ...], axis: str, lane: str, group: Any,
        pages: CallPages, up: Any,
    ) -> None:  # fmt: skip
        self.world, self.ranks, self.axis, self.lane = world, ranks, axis, lane
        self.group, self.up = group, up
        self.rank, self.size, self._pages = ranks.index(world.rank), len(ranks), pages
        self.called: Message | None = None  # what this call is a part of, where it is one
        self.is_compared = True  # by the World's check
        self._sequence = 0  # of collectives
        self._digests = [0] * RING  # of the newest
        by_number = sorted(
            ranks
        )  # torch numbers a group's ranks in this order, whatever it is given
        self._place = [by_number.index(r) for r in ranks]
        self._ours = [ranks.index(r) for r in by_number]

    def run(self, call: Callable[[], Any], message: Message, number: int) -> Any:
        """A torch call whose failure becomes a CommError that names what and who."""
        try:
            return call()
        except RuntimeError as error:
            raise self._failure(error, message, number) from None

    def _whole(self, call: Callable[[], Any], note: tuple[Message, int]) -> None:
        """A call from its start to its end."""
        self.run(call, *note)
        self.check(*note)
        self.world.board.leave()

    def _failure(self, error: RuntimeError, message: Message, number: int) -> CommError:
        """Why a call failed: unlike calls, else who is dead, else who did not come."""
        board, me = self.world.board, self.world.rank
        self.check(message, number)
        time.sleep(0.2)  # a peer that died with us needs a moment to be seen dead
        text, where = first_line(error), self.world.where
        what = (
            f"{self.axis} {message.op} #{number} of group {self.ranks} ({message.site}, phase "
            f"{where.phase}, step {where.step}) failed on rank {me}: {text}"
        )
        found = self.world.statuses(what)
        said = [s for s in found if s is not None]
        # Who is silent was lost, in this group or in one whose ranks could then not come to this
        silent = sorted((r for r in range(self.world.size) if found[r] is None), key=self._is_other)
        dead = self.world.dead(self.ranks)
        late = [s.rank for s in said if s.rank in self.ranks and s.is_behind(board.status)]
        first = ""
        if dead:
            first = f"rank {dead[0]} has died: "
        elif self._is_disputed(said, number):
            first, silent, late = "ranks disagree: ", [], []
        elif silent or late:
            first = f"rank {(silent or late)[0]} did not come: "
        table = describe(said, time.monotonic())
        return lost(f"{first}{what}\n{table}", dead or silent or late)

    def _is_other(self, rank: int) -> bool:
        """Whether a rank is not of this group."""
        return rank not in self.ranks

    def _is_disputed(self, said: Sequence[Status], number: int) -> bool:
        """Whether ranks of the group tell of unlike calls under this number."""
        calls = {
            (s.op, s.tensor, s.site)
            for s in said
            if s.rank in self.ranks and (s.axis, s.sequence) == (self.axis, number)
        }
        return len(calls) > 1

    def check(self, message: Message, number: int) -> None:
        """Raises CommError where another rank of the group called something else under this number."""
        if number < 0 or not self._pages.differ(self.size, number, self._digests[number % RING]):
            return
        time.sleep(0.02)  # the others' notes
        what = (
            f"ranks disagree at {self.axis} collective #{number} ({message.site}, phase "
            f"{self.world.where.phase}, step {self.world.where.step}): rank {self.world.rank} brings "
            f"{message}"
        )
        found = [s for s in self.world.statuses(what) if s is not None]
        raise CommError(f"{what}\n{describe(found, time.monotonic())}")

    def compare_calls(self) -> None:
        """Raises CommError where the group's ranks have called unlike collectives, between hosts."""
        if self._pages.is_shared:
            return
        mine = self._pages.sum
        both = torch.tensor([mine, -mine], dtype=torch.int64)
        high, low = self.all_reduce(both, site="step:calls", op="max").tolist()
        if high != -low:
            raise CommError(
                f"ranks disagree: the {self.axis} ranks {self.ranks} have called unlike collectives by "
                f"the end of step {self.world.where.step}, as rank {self.world.rank} finds"
            )

    def _enter(self, op: str, x: Tensor, site: str) -> tuple[Message, int]:
        """Notes a call; messages between two ranks have no number."""
        shape = x.shape if op != "all_to_all" else ()
        message = self.called or message_of(op, shape, x.dtype, site)
        number = -1
        if op not in ("send", "receive"):
            number, self._sequence = self._sequence, self._sequence + 1
            self._digests[number % RING] = self._pages.post(self.rank, number, message)
        board = self.world.board
        board.status.enter(self.axis, message, number, self.world.where)
        board.enter(board.status)
        self.check(message, number)
        return message, number

    # Collectives ---------------------------------------------------------------------------------

    def start_all_reduce(
        self, x: Tensor, *, site: str, op: ReduceOp = "sum", out: Tensor | None = None
    ) -> Handle:
        """Low precision adds up in fp32; in place where `out` is x."""
        note = self._enter("all_reduce", x, site)
        source = x.detach()
        if x.dtype in LOW:
            held = source.to(torch.float32)
        elif out is None:
            held = source.clone()
        else:
            held = out if out.data_ptr() == x.data_ptr() else out.copy_(source)
        kind = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        work = self.run(lambda: dist.all_reduce(held, kind, self.group, async_op=True), *note)
        return _Work(self, work, lambda: _into(out, held, x.dtype), note)

    def start_all_gather(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Gathers into the places of the result where they are contiguous, else into buffers. nccl would make
        a second result of a list of places: it is given one tensor where the ranks are in its order."""
        note = self._enter("all_gather", x, site)
        source = x.detach().contiguous()
        whole = None
        if dim == 0:
            rows = (self.size * source.shape[0], *source.shape[1:])
            whole = source.new_empty(rows) if out is None else out
        places = (
            [torch.empty_like(source) for _ in self.ranks]
            if whole is None
            else whole.chunk(self.size)
        )
        parts = [places[i] for i in self._ours]
        if whole is not None and self._ours == list(range(self.size)):
            call = partial(GATHER, whole, source)
        else:
            call = partial(dist.all_gather, parts, source)
        work = self.run(lambda: call(group=self.group, async_op=True), *note)

        def joined() -> Tensor:
            return whole if whole is not None else _into(out, torch.cat(places, dim), x.dtype)

        return _Work(self, work, joined, note, keeps=source)

    def start_reduce_scatter(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """An all_to_all of the parts, added up in rank order."""
        note = self._enter("reduce_scatter", x, site)
        parts = [p.contiguous() for p in x.detach().chunk(self.size, dim)]
        source = torch.stack([parts[i] for i in self._ours])
        came = torch.empty_like(source)
        shared = (came, source)
        work = self.run(
            lambda: dist.all_to_all_single(*shared, group=self.group, async_op=True), *note
        )

        def added() -> Tensor:
            low = came.dtype in LOW
            every = (came.float() if low else came)[self._place]
            return _into(out, every.sum(0), x.dtype)

        return _Work(self, work, added, note, keeps=source)

    def start_all_to_all(
        self, x: Tensor, *, site: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Handle:
        """One all_to_all_single of uneven rows."""
        note = self._enter("all_to_all", x, site)
        send, take = list(send_counts), list(receive_counts)
        parts = x.detach().split(send)
        source = torch.cat([parts[i] for i in self._ours])
        out = x.new_empty((sum(take), *x.shape[1:]))
        theirs, mine = [take[i] for i in self._ours], [send[i] for i in self._ours]
        shared = (out, source, theirs, mine)
        work = self.run(
            lambda: dist.all_to_all_single(*shared, group=self.group, async_op=True), *note
        )

        def placed() -> Tensor:
            came = out.split(theirs)
            return torch.cat([came[i] for i in self._place])

        return _Work(self, work, placed, note, keeps=source)

    def broadcast(self, x: Tensor, *, site: str, root: int = 0) -> Tensor:
        """The root's tensor."""
        note = self._enter("broadcast", x, site)
        out = x.detach().clone()
        self._whole(lambda: dist.broadcast(out, self.ranks[root], self.group), note)
        return out

    def barrier(self, *, site: str) -> None:
        """Waits for all."""
        note = self._enter("barrier", torch.empty(0), site)
        self._whole(lambda: dist.barrier(self.group), note)

    # Point to point ------------------------------------------------------------------------------

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Sent:
        """Tagged by its key, so that orders may differ."""
        note = self._enter("send", x, site)
        source, group = x.detach().contiguous(), self._way(self.rank, to)
        there, tag = self._place[to], tag_of(key)  # as dist.isend, less its checks
        work = self.run(lambda: group.send([source], there, tag), *note)
        self.world.started(work)
        return _Work(self, work, lambda: source, note, keeps=source)

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """Posted now."""
        note = self._enter("receive", like, site)
        out, group = torch.empty_like(like), self._way(source, self.rank)
        there, tag = self._place[source], tag_of(key)
        work = self.run(lambda: group.recv([out], there, tag), *note)
        return _Work(self, work, lambda: out, note)

    def _way(self, source: int, to: int) -> Any:
        """The group of messages from a place to another."""
        return self.group if source < to else self.up

    def connect(self, word: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Has nccl connect the group's ranks, and `pairs` of them, in one order on all ranks, for messages: a
        sum of `word`, and a message of it each way."""
        dist.all_reduce(word, group=self.group)
        for a, b in (pair for pair in pairs if self.rank in pair):
            for source, to in ((a, b), (b, a)):
                group = self._way(source, to)
                if self.rank == source:
                    group.send([word], self._place[to], 0).wait()
                else:
                    group.recv([word], self._place[source], 0).wait()


def first_line(error: RuntimeError) -> str:
    """The first line of what torch says, without the address of its build and its advice."""
    text = re.sub(r"^\[\S*/(gloo/\S+)\] ", r"[\1] ", str(error).splitlines()[0])
    return text.partition(". This is typically caused")[0]


def lost(text: str, guilty: Sequence[int]) -> CommError:
    """An error that knows whom it blames."""
    error = CommError(text)
    error.rank = guilty[0] if guilty else None
    return error


def _into(out: Tensor | None, found: Tensor, dtype: torch.dtype) -> Tensor:
    """A result where it is wanted, in the dtype of what was handed in."""
    if out is None:
        return found.to(dtype)
    return out if out.data_ptr() == found.data_ptr() else out.copy_(found)


def tag_of(key: Key) -> int:
    """Stage, kind, slot and microbatch in 31 bits."""
    kind = 0 if key.kind == "F" else 1
    return (((key.stage * 2 + kind) * 8 + key.slot) * 65536 + key.microbatch) % 2**31

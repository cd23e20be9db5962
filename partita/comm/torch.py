"""torch.distributed as a World: gloo between CPU ranks (and hosts), nccl for what lies on GPUs.

Every rank makes every group, in one order. Gloo's errors never name a rank or an operation: they are caught
here, and told with the axis, op, site, phase and step, and with what the status board knows of the
others. bf16 sums are made in fp32. reduce_scatter, which gloo lacks, is an all_to_all and a sum in
rank order.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partita.base.errors import CommError
from partita.comm.blocking import Blocking
from partita.comm.board import Board
from partita.comm.calls import RING, CallBook, CallPages
from partita.comm.processes import on_loopback
from partita.comm.protocol import Comm, Handle, Key, Message, ReduceOp, Where, message_of
from partita.comm.single import SingleComm
from partita.comm.stores import file_store, last_words
from partita.comm.table import Status, describe

LOW = (torch.bfloat16, torch.float16)
BOTH = "cpu:gloo,cuda:nccl"  # each tensor goes by where it lies


class TorchWorld:
    """All ranks of a run over torch.distributed. `path` is a file all ranks of one host see; with `gpus`
    tensors may lie on one GPU a rank, which is the process's current device."""

    def __init__(
        self,
        rank: int,
        size: int,
        path: Path | None,
        *,
        timeout_s: float = 60.0,
        where: Where | None = None,
        gpus: bool = False,
        store: Any = None,
    ) -> None:
        self.rank, self.size, self.where = rank, size, where or Where()
        self.timeout = timedelta(seconds=timeout_s)
        self.sends: OrderedDict[int, Any] = OrderedDict()  # under way, by id, oldest first
        if store is None:
            on_loopback()
            store = file_store(Path(str(path)), size)
        dist.init_process_group(
            BOTH if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=self.timeout
        )
        self.board = Board(None if path is None else path.with_suffix(".board"), rank, size)
        self.book = CallBook(None if path is None else path.with_suffix(".calls"))
        self._store, self._comms = store, list[TorchComm]()

    @staticmethod
    def from_torchrun(
        env: Mapping[str, str], store: Any, *, timeout_s: float, where: Where, gpus: bool = False
    ) -> TorchWorld:
        """Joins what torchrun started, through the store of `rendezvous`."""
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
            on_loopback()
        return TorchWorld(
            rank, size, None, timeout_s=timeout_s, where=where, store=store, gpus=gpus
        )

    def make(self, ranks: Sequence[int], *, axis: str, lane: str) -> Comm | None:
        """A Comm over `ranks`; every rank calls it for every group."""
        if len(ranks) == 1:
            return SingleComm(axis, lane, tuple(ranks)) if self.rank in ranks else None
        group = dist.new_group(list(ranks), timeout=self.timeout)
        pages = self.book.pages(len(ranks))
        if self.rank not in ranks:
            return None
        self._comms.append(TorchComm(self, tuple(ranks), axis, lane, group, pages))
        return self._comms[-1]

    def check(self) -> None:
        """Between hosts each group compares what it has called: 16 bytes a group."""
        for comm in self._comms:
            comm.compare_calls()

    def statuses(self) -> Sequence[Status | None]:
        """Every rank's last call, off the board or from the store; None where one says nothing."""
        if self.board.is_shared:
            return self.board.statuses()
        return last_words(self._store, self.board.status, self.size)

    def waited(self, work: Any) -> None:
        """A send that was waited for: gloo would wait for it a second time until the timeout."""
        self.sends.pop(id(work), None)

    def started(self, work: Any) -> None:
        """A send is under way; old ones that have gone out are let go of."""
        while self.sends and next(iter(self.sends.values())).is_completed():
            self.sends.popitem(last=False)
        self.sends[id(work)] = work

    def close(self, drain: bool = True) -> None:
        """Leaves the process groups, once what was sent has gone out. The last hold on a group ends its
        threads: one that lets go of a tensor while Python ends aborts the process. After a failure
        they are left to the end of the process: gloo would wait for the lost peer."""
        if not drain:
            return
        for work in self.sends.values():
            with contextlib.suppress(RuntimeError):  # a peer that is gone wants nothing more
                work.wait()
        self.sends.clear()
        self.book.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        for comm in self._comms:
            comm.group = None


@dataclass
class _Work:
    """A torch work handle and how its result is finished."""

    comm: TorchComm
    work: Any
    result: Callable[[], Tensor]
    note: tuple[Message, int]
    keeps: Any = None
    value: Tensor | None = None

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
    """One process group on one axis and lane."""

    def __init__(
        self, world: TorchWorld, ranks: tuple[int, ...], axis: str, lane: str, group: Any,
        pages: CallPages,
    ) -> None:  # fmt: skip
        self.world, self.ranks, self.axis, self.lane, self.group = world, ranks, axis, lane, group
        self.rank, self.size, self._pages = ranks.index(world.rank), len(ranks), pages
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
        found = self.world.statuses()
        said = [s for s in found if s is not None]
        silent = [r for r in self.ranks if found[r] is None]
        dead = [r for r in self.ranks if board.is_dead(r)]
        late = [s.rank for s in said if s.rank in self.ranks and s.is_behind(board.status)]
        first = ""
        if dead:
            first = f"rank {dead[0]} has died: "
        elif self._is_disputed(said, number):
            first = "ranks disagree: "
        elif silent or late:
            first = f"rank {(silent or late)[0]} did not come: "
        text = str(error).splitlines()[0]
        where = self.world.where
        return CommError(
            f"{first}{self.axis} {message.op} #{number} of group {self.ranks} ({message.site}, phase "
            f"{where.phase}, step {where.step}) failed on rank {me}: {text}\n"
            f"{describe(said, time.monotonic())}"
        )

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
        found = [s for s in self.world.statuses() if s is not None]
        raise CommError(
            f"ranks disagree at {self.axis} collective #{number} ({message.site}, phase "
            f"{self.world.where.phase}, step {self.world.where.step}): rank {self.world.rank} brings "
            f"{message}\n{describe(found, time.monotonic())}"
        )

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
        message = message_of(op, x.shape if op != "all_to_all" else (), x.dtype, site)
        number = -1
        if op not in ("send", "receive"):
            number, self._sequence = self._sequence, self._sequence + 1
            self._digests[number % RING] = self._pages.post(self.rank, number, message)
        frame = sys._getframe(2)
        while frame.f_back is not None and "/comm/" in frame.f_code.co_filename:
            frame = frame.f_back
        status = Status(self.world.rank)
        status.enter(self.axis, message, number, self.world.where, frame)
        self.world.board.enter(status)
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
        """Gathers into the places of `out` where they are contiguous, else into buffers."""
        note = self._enter("all_gather", x, site)
        source = x.detach().contiguous()
        direct = out is not None and dim == 0
        places = out.chunk(self.size) if direct else [torch.empty_like(source) for _ in self.ranks]
        parts = [places[i] for i in self._ours]
        work = self.run(lambda: dist.all_gather(parts, source, self.group, async_op=True), *note)

        def joined() -> Tensor:
            return out if direct else _into(out, torch.cat(places, dim), x.dtype)

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

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Handle:
        """Tagged by its key, so that orders may differ."""
        note = self._enter("send", x, site)
        source = x.detach().contiguous()
        tag = _tag(key)
        work = self.run(lambda: dist.isend(source, self.ranks[to], self.group, tag), *note)
        self.world.started(work)
        return _Work(self, work, lambda: source, note, keeps=source)

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """Posted now."""
        note = self._enter("receive", like, site)
        out = torch.empty_like(like)
        tag = _tag(key)
        work = self.run(lambda: dist.irecv(out, self.ranks[source], self.group, tag), *note)
        return _Work(self, work, lambda: out, note)


def _into(out: Tensor | None, found: Tensor, dtype: torch.dtype) -> Tensor:
    """A result where it is wanted, in the dtype of what was handed in."""
    if out is None:
        return found.to(dtype)
    return out if out.data_ptr() == found.data_ptr() else out.copy_(found)


def _tag(key: Key) -> int:
    """Stage, kind, slot and microbatch in 31 bits."""
    kind = 0 if key.kind == "F" else 1
    return (((key.stage * 2 + kind) * 8 + key.slot) * 65536 + key.microbatch) % 2**31

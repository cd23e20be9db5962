"""torch.distributed as a World: gloo between CPU ranks (and hosts), nccl for what lies on GPUs.

Every rank makes every group (torch_comm.py), in one order. Ranks of one host have a file between them; those
of several a store, through which one that fails asks who is still there (rollcall.py).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from partita.comm.board import Board
from partita.comm.calls import CallBook
from partita.comm.processes import on_loopback
from partita.comm.protocol import Comm, Where
from partita.comm.rollcall import RollCall
from partita.comm.single import SingleComm
from partita.comm.stores import file_store
from partita.comm.table import Status
from partita.comm.torch_comm import TorchComm, first_line, lost

BOTH = "cpu:gloo,cuda:nccl"  # each tensor goes by where it lies


class TorchWorld:
    """All ranks of a run over torch.distributed. `path` is a file all ranks of one host see, `roll` the store
    of those of several; with `gpus` tensors may lie on one GPU a rank, the process's current device."""

    def __init__(
        self,
        rank: int,
        size: int,
        path: Path | None,
        *,
        timeout_s: float = 60.0,
        where: Where | None = None,
        gpus: bool = False,
        roll: RollCall | None = None,
    ) -> None:
        self.rank, self.size, self.where = rank, size, where or Where()
        self.timeout = timedelta(seconds=timeout_s)
        self.sends: OrderedDict[int, Any] = OrderedDict()  # under way, by id, oldest first
        self.board = Board(None if path is None else path.with_suffix(".board"), rank, size)
        self.book = CallBook(None if path is None else path.with_suffix(".calls"))
        self.roll, self._comms = roll, list[TorchComm]()
        if roll is None:
            on_loopback()
            store = file_store(Path(str(path)), size)
        else:
            store = roll.store
            roll.is_for(lambda: self.board.status, self.where)
            roll.join()
        self._joined(
            lambda: dist.init_process_group(
                BOTH if gpus else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=self.timeout,
            ),
            range(size),
        )

    def _joined(self, call: Callable[[], Any], ranks: Sequence[int]) -> Any:
        """What makes a group of ranks; where it fails, who was missing."""
        try:
            return call()
        except RuntimeError as error:
            text = f"{first_line(error)} (group {tuple(ranks)}, step {self.where.step})"
            found = self.statuses(f"rank {self.rank} could not join the others: {text}")
            silent = [r for r in ranks if found[r] is None]
            first = f"rank {silent[0]} did not come: " if silent else ""
            raise lost(
                f"{first}rank {self.rank} could not join the others: {text}", silent
            ) from None

    @staticmethod
    def from_torchrun(
        env: Mapping[str, str],
        roll: RollCall,
        *,
        timeout_s: float,
        where: Where,
        gpus: bool = False,
    ) -> TorchWorld:
        """Joins what torchrun started, through what `rendezvous` gave."""
        rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
        if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
            on_loopback()
        return TorchWorld(rank, size, None, timeout_s=timeout_s, where=where, roll=roll, gpus=gpus)

    def make(self, ranks: Sequence[int], *, axis: str, lane: str) -> Comm | None:
        """A Comm over `ranks`; every rank calls it for every group."""
        if len(ranks) == 1:
            return SingleComm(axis, lane, tuple(ranks)) if self.rank in ranks else None
        group = self._joined(lambda: dist.new_group(list(ranks), timeout=self.timeout), ranks)
        pages = self.book.pages(len(ranks))
        if self.rank not in ranks:
            return None
        self._comms.append(TorchComm(self, tuple(ranks), axis, lane, group, pages))
        return self._comms[-1]

    def check(self) -> None:
        """Between hosts each group compares what it has called: 16 bytes a group."""
        for comm in self._comms:
            if comm.is_compared:
                comm.compare_calls()

    def statuses(self, message: str) -> Sequence[Status | None]:
        """Every rank's last call, off the board or through the store; None where one says nothing.
        `message` is why this rank fails."""
        return self.board.statuses() if self.roll is None else self.roll.call(message)

    def dead(self, ranks: Sequence[int]) -> Sequence[int]:
        """Who of the ranks has died; between hosts who of all."""
        return [r for r in ranks if self.board.is_dead(r)] or (
            self.roll.dead() if self.roll else []
        )

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
        if self.roll is not None:
            self.roll.close()
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
        if self.roll is not None and self.roll.line is not None:
            self.roll.line.leave()

"""torch.distributed as a World: gloo between CPU ranks (and hosts), nccl for what lies on GPUs.

Every rank makes every group (torch_comm.py), in one order. Ranks of one host have a file between them; those
of several a store, through which one that fails asks who is still there (rollcall.py).

nccl connects the ranks of a group at its first collective, and two ranks at their first message, and holds
their processes until all have come: what is only started, or posted early, might then wait for what stands
behind it. So groups on GPUs are connected as they are made, in one order on all ranks. It knows no keys
either: between two ranks a group carries messages in one row, whichever way they go. So those to lower
places have a group of their own; the order on each way is a schedule's to prove (schedule/rendezvous.py).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from partita.comm.board import Board
from partita.comm.distributed.calls import CallBook
from partita.comm.distributed.stores import file_store
from partita.comm.distributed.torch_comm import TorchComm, first_line, lost
from partita.comm.liveness.rollcall import RollCall
from partita.comm.processes import on_loopback
from partita.comm.protocol import Comm, Where
from partita.comm.single import SingleComm
from partita.comm.table import Status

BOTH, GPU = "cpu:gloo,cuda:nccl", "cuda"  # each tensor goes by where it lies
NEAR = ("pp_down", "pp_up", "cp")  # lanes on which each rank sends to the next, or the one before
FAR = ("wire",)  # and to any
ON_HOST = ("compute", "host", "validate", "preflight", "doctor")  # lanes of what lies on no GPU


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
        self.roll, self._comms, self._gpus = roll, list[TorchComm](), gpus
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
        pairs = pairs_of(lane, len(ranks)) if self._gpus else []
        down, *up = [
            self._joined(lambda: dist.new_group(list(ranks), timeout=self.timeout), ranks)
            for _ in range(1 + bool(pairs))
        ]
        pages = self.book.pages(len(ranks))
        if self.rank not in ranks:
            return None
        made = TorchComm(self, tuple(ranks), axis, lane, down, pages, up[0] if up else down)
        if self._gpus and lane not in ON_HOST:
            self._joined(lambda: made.connect(torch.zeros(1, device=GPU), pairs), ranks)
        self._comms.append(made)
        return made

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
            comm.group = comm.up = None
        if self.roll is not None and self.roll.line is not None:
            self.roll.line.leave()


def pairs_of(lane: str, size: int) -> list[tuple[int, int]]:
    """The places of a group that send to each other on a lane, the lower first, in one order on all ranks."""
    kind = lane.partition(".")[0]
    if kind in FAR:
        return list(combinations(range(size), 2))
    rows = [*range(0, size, 2), *range(1, size, 2)] if kind in NEAR else []
    ends = ((r, (r + 1) % size) for r in rows)
    return list(dict.fromkeys((min(a, b), max(a, b)) for a, b in ends))

"""Where thread ranks meet: slots of collectives, mailboxes, and who waits for what.

Since the meeting knows every rank's wait, an absent rank and a deadlock are found at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partita.base.errors import CommError
from partita.comm.protocol import Message, ReduceOp
from partita.comm.table import Status, describe

DEADLINE_S = 60.0
SlotKey = tuple[tuple[int, ...], str, str, int]


@dataclass
class Slot:
    """One meeting: what each rank brought, and the result each takes away."""

    ranks: tuple[int, ...]
    wake: threading.Condition
    brought: dict[int, tuple[Message, Any]] = field(default_factory=dict)
    results: dict[int, Tensor] | None = None
    taken: int = 0

    def absent(self) -> list[int]:
        """Ranks that have not come."""
        return [r for r in self.ranks if r not in self.brought]


class Meeting:
    """What all thread ranks of a run share."""

    def __init__(self, size: int, timeout_s: float = DEADLINE_S) -> None:
        self.size, self.timeout_s = size, timeout_s
        self.lock = threading.Lock()
        self.slots: dict[SlotKey, Slot] = {}
        self.mail: dict[tuple[Any, ...], deque[Tensor]] = {}
        self.mail_wake = [threading.Condition(self.lock) for _ in range(size)]
        self.blocked: dict[int, tuple[str, Any]] = {}
        self.finished: set[int] = set()
        self.status: list[Status] = [Status(r) for r in range(size)]
        self.failure: str | None = None

    def fail(self, message: str) -> None:
        """Stops everybody; the lock is held."""
        if self.failure is None:
            self.failure = f"{message}\n{describe(self.status, time.monotonic())}"
        for slot in self.slots.values():
            slot.wake.notify_all()
        for wake in self.mail_wake:
            wake.notify_all()

    def check(self) -> None:
        """Finds waits that cannot end; the lock is held."""
        for rank, (kind, what) in self.blocked.items() if self.finished else ():
            gone = [r for r in self._waits_for(kind, what) if r in self.finished]
            if gone:
                self.fail(
                    f"rank {gone[0]} has left: {self.named(kind, what)} cannot complete on rank {rank}"
                )
                return
        if len(self.blocked) + len(self.finished) == self.size and self.blocked:
            rank, (kind, what) = min(self.blocked.items())
            absent = ", ".join(map(str, self._waits_for(kind, what)))
            self.fail(
                f"deadlock: every rank waits. rank {rank} waits for rank {absent} in "
                f"{self.named(kind, what)}"
            )

    def _waits_for(self, kind: str, what: Any) -> list[int]:
        return self.slots[what].absent() if kind == "slot" else [what[3]]

    def late(self, rank: int, kind: str, what: Any) -> None:
        """A rank has waited in vain: stops everybody, naming the absent at the end of the chain, who wait for
        nobody themselves; the lock is held."""
        seen: set[int] = set()
        while True:
            absent = self._waits_for(kind, what)
            free = [r for r in absent if r not in self.blocked]
            if free or absent[0] in seen:
                break
            rank = absent[0]
            seen.add(rank)
            kind, what = self.blocked[rank]
        ranks = ", ".join(map(str, free or absent))
        self.fail(
            f"rank {ranks} did not come within {self.timeout_s:g} s: {self.named(kind, what)} cannot "
            f"complete on rank {rank}"
        )

    def named(self, kind: str, what: Any) -> str:
        """The call that a rank waits in, and its group."""
        if kind == "mail":
            axis, _, ranks, _, _, key = what
            return f"{axis} receive {key} of group {ranks}"
        ranks, axis, _, number = what
        message = next(iter(self.slots[what].brought.values()))[0]
        return f"{axis} {message.op} #{number} of group {ranks} ({message.site})"

    def leave(self, rank: int) -> None:
        """The rank's function has returned or raised."""
        with self.lock:
            self.finished.add(rank)
            self.status[rank].left = True
            self.check()


def reduce_in_order(xs: list[Tensor], op: ReduceOp) -> Tensor:
    """In rank order; bf16 and fp16 add up in fp32 and round once."""
    if op == "max":
        out = xs[0].clone()
        for x in xs[1:]:
            out = torch.maximum(out, x)
        return out
    low = xs[0].dtype in (torch.bfloat16, torch.float16)
    out = xs[0].float() if low else xs[0].clone()
    for x in xs[1:]:
        out += x
    return out.to(xs[0].dtype)


def expected_rows(x: Tensor, rows: int, what: str) -> Tensor:
    """x, which an exchange brought; raises CommError where its rows are not as many as expected."""
    if x.shape[0] != rows:
        raise CommError(f"{what} was sent {x.shape[0]} rows and expected {rows}")
    return x

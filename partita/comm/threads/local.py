"""Ranks are threads: a collective is a meeting in a numbered slot of its group.

The rank that comes last computes the result, in rank order; the others copy theirs out, so that no rank
sees another's tensor. CPU autograd runs backward in the calling thread, so functions that communicate in
backward work unchanged. A mismatch, an absent rank and a deadlock are found at once, since the meeting place
knows what everybody waits for. On a GPU, which all share, torch would run every backward in the one thread
that serves the device, where one that waits for another's never ends: ranks run their own.

    with local(4) as ranks:
        results = ranks.run(function, *args)        # function(world, *args) on every rank
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from partita.base.errors import CommError, PartitaError
from partita.comm.blocking import Blocking
from partita.comm.patience import Patience
from partita.comm.protocol import (
    Comm,
    Done,
    Handle,
    Key,
    Message,
    ReduceOp,
    Sent,
    Where,
    message_of,
)
from partita.comm.single import SingleComm
from partita.comm.threads.meeting import (
    DEADLINE_S,
    Meeting,
    Slot,
    SlotKey,
    expected_rows,
    reduce_in_order,
)

LOOK_S = 0.5  # between two looks at a wait

# no mode sees what runs within it
_UNSEEN: Any = getattr(torch._C, "_DisableTorchDispatch", nullcontext)


class LocalWorld:
    """One thread rank's view of the run."""

    def __init__(self, meeting: Meeting, rank: int, where: Where | None = None) -> None:
        self.meeting, self.rank, self.size = meeting, rank, meeting.size
        self.where = where or Where()
        self.entered: Counter[tuple[object, ...]] = (
            Counter()
        )  # collectives of each (ranks, axis, lane)

    def make(self, ranks: Sequence[int], *, axis: str, lane: str) -> Comm | None:
        """A Comm over `ranks`, or None where this rank is not among them."""
        if self.rank not in ranks:
            return None
        if len(ranks) == 1:
            return SingleComm(axis, lane, tuple(ranks), 0, 1)
        return LocalComm(self, tuple(ranks), axis, lane)

    def comm(self, axis: str = "world", lane: str = "compute") -> Comm:
        """A Comm over all ranks."""
        made = self.make(range(self.size), axis=axis, lane=lane)
        assert made is not None
        return made

    def check(self) -> None:
        """Nothing to compare."""

    def close(self, drain: bool = True) -> None:
        """Nothing to free."""


@dataclass
class _Pending:
    """A collective or receive under way."""

    finish: Callable[[], Tensor]
    out: Tensor | None = None
    value: Tensor | None = None

    def wait(self) -> Tensor:
        """Blocks this thread until the others have come."""
        if self.value is None:
            found = self.finish()
            self.value = found if self.out is None else self.out.copy_(found)
        return self.value


class LocalComm(Blocking):
    """One group of thread ranks on one axis and lane."""

    def __init__(self, world: LocalWorld, ranks: tuple[int, ...], axis: str, lane: str) -> None:
        self.world, self.ranks, self.axis, self.lane = world, ranks, axis, lane
        self.rank, self.size = ranks.index(world.rank), len(ranks)

    # Collectives ---------------------------------------------------------------------------------

    def broadcast(self, x: Tensor, *, site: str, root: int = 0) -> Tensor:
        """The root's tensor."""

        def combine(xs: list[Tensor]) -> list[Tensor]:
            return [xs[root].clone() for _ in xs]

        return self._start("broadcast", x, site, combine, (root,)).wait()

    def barrier(self, *, site: str) -> None:
        """Meets without bytes."""
        self._start("barrier", torch.empty(0), site, lambda xs: list(xs)).wait()

    def start_all_to_all(
        self, x: Tensor, *, site: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Handle:
        """Brings the rows for each rank; who is sent other numbers of rows than it expects raises."""
        me, take = self.rank, list(receive_counts)

        def swap(cut: list[list[Tensor]]) -> list[Tensor]:
            return [torch.cat([parts[d] for parts in cut]) for d in range(self.size)]

        parts = list(x.detach().split(list(send_counts)))
        handle = self._start("all_to_all", x, site, swap, compare_shapes=False, parts=parts)
        return _Pending(lambda: expected_rows(handle.wait(), sum(take), f"rank {me} at {site}"))

    def start_all_reduce(
        self, x: Tensor, *, site: str, op: ReduceOp = "sum", out: Tensor | None = None
    ) -> Handle:
        """Brings x; the last to come adds up."""

        def combine(xs: list[Tensor]) -> list[Tensor]:
            total = reduce_in_order(xs, op)
            return [total, *(total.clone() for _ in xs[1:])]

        return self._start("all_reduce", x, site, combine, (op == "max",), out=out)

    def start_all_gather(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Brings the shard; the last to come concatenates."""

        def combine(xs: list[Tensor]) -> list[Tensor]:
            whole = torch.cat(xs, dim)
            return [whole, *(whole.clone() for _ in xs[1:])]

        return self._start("all_gather", x, site, combine, (dim,), out=out)

    def start_reduce_scatter(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """Brings x; the last to come adds up and cuts."""

        def combine(xs: list[Tensor]) -> list[Tensor]:
            return [p.clone() for p in reduce_in_order(xs, "sum").chunk(self.size, dim)]

        return self._start("reduce_scatter", x, site, combine, (dim,), out=out)

    # The meeting ---------------------------------------------------------------------------------

    def _start(
        self,
        op: str,
        x: Tensor,
        site: str,
        combine: Callable[[list[Any]], list[Tensor]],
        extra: tuple[int, ...] = (),
        compare_shapes: bool = True,
        parts: list[Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Handle:
        meeting, me = self.world.meeting, self.world.rank
        group = (self.ranks, self.axis, self.lane)
        key: SlotKey = (*group, self.world.entered[group])
        self.world.entered[group] += 1
        shape = tuple(x.shape) if compare_shapes else ()
        message = message_of(op, shape, x.dtype, site, tuple(map(int, extra)))
        with meeting.lock:
            self._raise_failure()
            self._note(message, key[3])
            slot = meeting.slots.get(key)
            if slot is None:
                slot = meeting.slots[key] = Slot(self.ranks, threading.Condition(meeting.lock))
            slot.brought[me] = (message, x.detach() if parts is None else parts)
            self._compare(slot, key[3])
            last = len(slot.brought) == self.size
        if last:
            inputs = [slot.brought[r][1] for r in self.ranks]
            results = dict(zip(self.ranks, combine(inputs), strict=True))
            with meeting.lock:
                slot.results = results
                for r in self.ranks:
                    if meeting.blocked.get(r) == ("slot", key):
                        del meeting.blocked[r]
                slot.wake.notify_all()
        return _Pending(lambda: self._take(key, slot), out)

    def _compare(self, slot: Slot, number: int) -> None:
        """All must bring the same operation; the lock is held."""
        brought = slot.brought
        (first, _), (last, _) = brought[next(iter(brought))], brought[self.world.rank]
        if last is first or last == first:  # as did those between them
            return
        messages = {r: m for r, (m, _) in brought.items()}
        by_message: dict[Message, list[int]] = {}
        for r, m in sorted(messages.items()):
            by_message.setdefault(m, []).append(r)
        sites = {m.site for m in by_message}
        lines = "".join(
            f"\n  rank {','.join(map(str, rs)):<10} {m}" + (f"  {m.site}" if len(sites) > 1 else "")
            for m, rs in by_message.items()
        )
        phase = {"F": "forward", "B": "backward"}.get(
            self.world.where.phase, self.world.where.phase
        )
        message = (
            f"ranks disagree at {self.axis} collective #{number} ({first.site}, {phase}){lines}"
        )
        self.world.meeting.fail(message)
        self._raise_failure()

    def _take(self, key: SlotKey, slot: Slot) -> Tensor:
        meeting, me = self.world.meeting, self.world.rank
        with meeting.lock:
            if slot.results is None:
                if slot.absent():
                    meeting.blocked[me] = ("slot", key)
                    meeting.check()
                patience = Patience(meeting.timeout_s)
                while slot.results is None and meeting.failure is None:
                    if not slot.wake.wait(min(LOOK_S, patience.left_s)) and patience.is_over():
                        meeting.late(me, "slot", key)
                meeting.blocked.pop(me, None)
            if slot.results is None:
                self._raise_failure()
            assert slot.results is not None
            result = slot.results.pop(me)
            if not slot.results:
                meeting.slots.pop(key, None)
            meeting.status[me].completed = True
        return result

    # Point to point ------------------------------------------------------------------------------

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Sent:
        """Leaves a copy in the receiver's mailbox; never waits."""
        meeting = self.world.meeting
        target = self.ranks[to]
        place = self._place(self.world.rank, target, key)
        with _UNSEEN():  # it is the receiver's, whoever watches what this rank makes
            copy = x.detach().clone()
        with meeting.lock:
            self._raise_failure()
            self._note(message_of("send", x.shape, x.dtype, site), -1)
            meeting.mail.setdefault(place, deque()).append(copy)
            if meeting.blocked.get(target) == ("mail", place):
                del meeting.blocked[target]
            meeting.mail_wake[target].notify_all()
            meeting.status[self.world.rank].completed = True
        return Done(copy)

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """Posts a receive; `wait` blocks until the message with this key is there."""
        place = self._place(self.ranks[source], self.world.rank, key)
        message = message_of("receive", like.shape, like.dtype, site)
        return _Pending(lambda: self._collect(place, message))

    def _place(self, source: int, target: int, key: Key) -> tuple[Any, ...]:
        return (self.axis, self.lane, self.ranks, source, target, key)

    def _collect(self, place: tuple[Any, ...], message: Message) -> Tensor:
        meeting, me = self.world.meeting, self.world.rank
        with meeting.lock:
            self._raise_failure()
            self._note(message, -1)
            if not meeting.mail.get(place):
                meeting.blocked[me] = ("mail", place)
                meeting.check()
                patience, wake = Patience(meeting.timeout_s), meeting.mail_wake[me]
                while not meeting.mail.get(place) and meeting.failure is None:
                    if not wake.wait(min(LOOK_S, patience.left_s)) and patience.is_over():
                        meeting.late(me, "mail", place)
                meeting.blocked.pop(me, None)
            self._raise_failure()
            x = meeting.mail[place].popleft()
            if not meeting.mail[place]:
                del meeting.mail[place]
            meeting.status[me].completed = True
        if tuple(x.shape) != message.shape or str(x.dtype) != message.dtype:
            raise CommError(
                f"rank {me} expects {message.dtype}{list(message.shape)} at {message.site}, rank {place[3]} "
                f"sent {x.dtype}{list(x.shape)}"
            )
        return x

    def _note(self, message: Message, number: int) -> None:
        status = self.world.meeting.status[self.world.rank]
        status.enter(self.axis, message, number, self.world.where)

    def _raise_failure(self) -> None:
        if self.world.meeting.failure is not None:
            raise CommError(self.world.meeting.failure)


Handed = TypeVar("Handed")


class RankThread(threading.Thread):
    """A rank's thread, which knows its world."""

    def __init__(self, world: LocalWorld, enter: Callable[[LocalWorld], None]) -> None:
        super().__init__(target=enter, args=(world,), name=f"rank-{world.rank}")
        self.world = world


class LocalRanks(Generic[Handed]):
    """Thread ranks, started anew for each `run`; a function is handed what `handed` makes of its world."""

    def __init__(self, size: int, timeout_s: float, handed: Callable[[LocalWorld], Handed]) -> None:
        self.size, self.timeout_s, self._handed = size, timeout_s, handed

    def __enter__(self) -> LocalRanks[Handed]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing outlives a run."""

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(what it is handed, *args) on every rank; the results by rank. The first failing rank's
        error is raised, with a note of what the others said."""
        # What torch.optim loads at its first use parses source: CPython 3.11 does so in one thread only
        import_module("torch._dynamo")
        meeting = Meeting(self.size, self.timeout_s)
        results: list[Any] = [None] * self.size
        errors: list[tuple[float, int, BaseException]] = []

        def enter(world: LocalWorld) -> None:
            rank = world.rank
            torch.autograd.set_multithreading_enabled(False)
            try:
                results[rank] = function(self._handed(world), *args)
            except BaseException as error:
                errors.append((time.monotonic(), rank, error))
                with meeting.lock:
                    meeting.fail(f"rank {rank} raised {type(error).__name__}: {error}")
            finally:
                meeting.leave(rank)

        threads = [RankThread(LocalWorld(meeting, r), enter) for r in range(self.size)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if errors:
            _raise_first(errors)
        return results


def _raise_first(errors: list[tuple[float, int, BaseException]]) -> None:
    own = [e for e in errors if not isinstance(e[2], CommError)]
    _, rank, error = min(own or errors, key=lambda e: e[:2])
    others = [
        f"rank {r}: {(str(e) or type(e).__name__).splitlines()[0]}"
        for _, r, e in sorted(errors, key=lambda e: e[1])
        if r != rank
    ]
    if not isinstance(error, PartitaError):
        error.add_note(f"on rank {rank}")
    for line in others:
        error.add_note(line)
    raise error


def local(size: int, timeout_s: float = DEADLINE_S) -> LocalRanks[LocalWorld]:
    """`size` ranks as threads of this process, each with a LocalWorld."""
    return LocalRanks(size, timeout_s, lambda world: world)

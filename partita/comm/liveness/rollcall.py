"""Ranks of several hosts share a store and nothing else: how they come together, and how one that fails
learns who is still there.

A thread of each rank looks at the store once a second. When a rank fails it calls; every rank that can
answers with its last call, so that who is silent is who was lost. Rank 0's thread also counts on, so that
those who wait for its word know that it lives. A rank that cannot reach the store for longer than
`timeout_s` leaves: its thread of control may be in a call on a dead link, which nothing ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError

from partita.base.errors import CommError
from partita.comm.liveness.lifeline import Lifeline
from partita.comm.protocol import Where
from partita.comm.table import Status

BEAT_S = 1.0  # between two looks at the store
LOOK_S = 0.2  # between two looks at that
WORD_S = 2.5  # for the ranks of other hosts to leave their last word
GRACE_S = 5.0  # beyond the timeout, for a rank to say itself what it waited for
CALL, HERE, ALL, BEAT, WORD = (f"partita/{x}" for x in ("call", "here", "all", "beat", "word"))


class RollCall:
    """One rank's part in it. `status` tells its last call, `where` its step, as `is_for` has it; `line` tells
    of deaths."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout_s: float = 60.0,
        line: Lifeline | None = None,
    ) -> None:
        self.store, self.rank, self.size, self.timeout_s = store, rank, size, timeout_s
        self.line = line
        self.status: Callable[[], Status] = lambda: Status(rank)
        self.where = Where()
        self._own = store.clone()  # the thread's
        self._ended, self._message = False, ""
        self._wake, self._told = threading.Event(), threading.Event()
        self.found: list[Status | None] = [None] * size
        self._reached: float | None = time.monotonic()
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._look, self._watch)]
        for t in self._threads:
            t.start()

    # The threads ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Once a second: beats, and answers who calls."""
        said = False
        with suppress(RuntimeError):  # the store is gone: whoever needs it hears so
            while not self._ended:
                if self.rank == 0:
                    self._own.add(BEAT, 1)
                called = self._own.check([CALL])
                if not said and (called or self._message):
                    said = True
                    self._say()
                if self._message:
                    if not called:
                        self._own.set(CALL, self._message)
                    self._collect()
                    break
                self._reached = time.monotonic()
                self._wake.wait(BEAT_S)
            if not said:  # who leaves is not lost
                self._say()
        self._reached = None
        self._told.set()

    def _watch(self) -> None:
        """Ends a rank that the store has been out of reach of. Only looks that were made count: a process
        that was stopped has lost nothing."""
        limit, quiet, seen = self.timeout_s + GRACE_S, 0.0, self._reached
        while not self._ended and (reached := self._reached) is not None:
            quiet, seen = (quiet + LOOK_S if reached == seen else 0.0), reached
            if quiet > limit:
                sys.stderr.write(
                    f"partita: rank {self.rank} on {socket.gethostname()} has not reached the store of "
                    f"rank 0's host for {limit:g} s, in {_place(self.where)}: it leaves; started "
                    "again, the job goes on from its newest checkpoint, if one was written\n"
                )
                sys.stderr.flush()
                os._exit(71)
            time.sleep(LOOK_S)

    def _say(self) -> None:
        """Leaves the last call in the store. Clocks of hosts differ: its age is told."""
        own = self.status()
        told = {**asdict(own), "at": time.monotonic() - own.at}
        self._own.set(f"{WORD}/{self.rank}", json.dumps(told))

    def _collect(self) -> None:
        """Every rank's word, for as long as ranks may need to leave it."""
        end = time.monotonic() + WORD_S
        for r in range(self.size):
            name, left = f"{WORD}/{r}", end - time.monotonic()
            if r in self.dead():
                continue
            with suppress(DistStoreError):
                if left > 0:
                    self._own.wait([name], timedelta(seconds=left))
                elif not self._own.check([name]):
                    continue
                told = json.loads(self._own.get(name))
                self.found[r] = Status(**{**told, "at": time.monotonic() - told["at"]})

    # What a rank asks ----------------------------------------------------------------------------

    def call(self, message: str) -> Sequence[Status | None]:
        """This rank fails, with a message for those who wait for it: every rank's last call; None where
        one says nothing in time."""
        if not self._message:
            self._message = message
            self._wake.set()
        self._told.wait(WORD_S + GRACE_S / 2)
        self.found[self.rank] = self.status()
        return self.found

    def dead(self) -> Sequence[int]:
        """The ranks that are known to have died."""
        lost = self.line.lost if self.line is not None else None
        return [lost.rank] if lost is not None and lost.died else []

    def hear(self, key: str) -> str:
        """What rank 0 sets under a key, however late, as long as all ranks live."""
        beat, since = -1, time.monotonic()
        while True:
            with suppress(DistStoreError), self._reaching():
                self.store.wait([key], timedelta(seconds=BEAT_S))
                return self.store.get(key).decode()
            self._heed_losses()
            with self._reaching():
                now = self.store.add(BEAT, 0)
            if now != beat:
                beat, since = now, time.monotonic()
            elif time.monotonic() - since > self.timeout_s:
                raise self._lost(0, f"hangs: no word of it for {self.timeout_s:g} s")

    def join(self) -> None:
        """Waits for all ranks to come, until the timeout or until one says that it fails."""
        end = time.monotonic() + self.timeout_s
        with self._reaching():
            self.store.set(f"{HERE}/{self.rank}", "")
            if self.store.add(HERE, 1) == self.size:
                self.store.set(ALL, "")
        while True:
            with suppress(DistStoreError), self._reaching():
                return self.store.wait([ALL], timedelta(seconds=BEAT_S))
            self._heed_losses()
            with self._reaching():
                if self.store.check([CALL]):
                    raise CommError(self.store.get(CALL).decode())
                if time.monotonic() > end:
                    absent = [r for r in range(self.size) if not self.store.check([f"{HERE}/{r}"])]
                    raise self._lost(
                        absent[0], f"did not join the {self.size} ranks within {self.timeout_s:g} s"
                        + (f"; nor did {', '.join(map(str, absent[1:]))}" if absent[1:] else ""),
                    )  # fmt: skip

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Around calls of the store: that it is gone is told as a loss of rank 0's host."""
        try:
            yield
        except DistStoreError:
            raise
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            raise self._lost(
                0, f"and its store are out of reach of rank {self.rank}: {text}"
            ) from None

    def _heed_losses(self) -> None:
        """Raises CommError where a rank has been lost."""
        lost = self.line.lost if self.line is not None else None
        if lost is not None:
            error = CommError(f"{lost.text}; rank {self.rank} was in {_place(self.where)}")
            error.rank = lost.rank
            raise error

    def _lost(self, rank: int, how: str) -> CommError:
        """The error of a rank that is missing."""
        error = CommError(f"rank {rank} {how} in {_place(self.where)}")
        error.rank = rank
        return error

    def is_for(self, status: Callable[[], Status], where: Where) -> None:
        """From now on this rank's calls and its place are told by these."""
        self.status, self.where = status, where
        if self.line is not None:
            self.line.where = lambda: (where.step, where.activity)

    def close(self) -> None:
        """Ends the threads; one that is held by a dead link stays."""
        self._ended = True
        self._wake.set()
        for t in self._threads:
            t.join(1.0)


def _place(where: Where) -> str:
    return f"step {where.step} ({where.activity})"

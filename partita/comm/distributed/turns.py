"""Calls that go on by themselves: one after another, in the order they come, in a thread of their own.

For a collective of several parts, of which each needs the result of the one before. Its parts are no calls of
the rank's own: the board keeps telling what the rank itself waits for.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from partita.comm.board import Board
from partita.comm.table import Status


class Running:
    """A call that waits for its turn, or runs, or is over."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call
        self._over = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """In the thread."""
        assert self._call is not None
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        self._call = None  # and what it held
        self._over.set()

    def wait(self) -> Any:
        """The result, or the call's error."""
        self._over.wait()
        if self._error is not None:
            raise self._error
        return self._value


class InTurn:
    """The thread: it begins with the first call and ends with `close`."""

    def __init__(self, name: str) -> None:
        self._name, self._calls = name, queue.SimpleQueue[Running | None]()
        self._thread: threading.Thread | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a call ever came."""
        return self._thread is not None

    def start(self, call: Callable[[], Any]) -> Running:
        """Has a call run after those before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        running = Running(call)
        self._calls.put(running)
        return running

    def _work(self) -> None:
        while (running := self._calls.get()) is not None:
            running.run()

    def close(self) -> None:
        """Nothing more comes."""
        self._calls.put(None)


class Unseen:
    """The Worlds of one host and between hosts, as parts of such calls see them: what they do is not noted,
    and moves nothing of the rank's own."""

    spins = 0  # looking before sleeping would hold up the rank's own thread

    def __init__(self, shm: Any, between: Any) -> None:
        self._between, self.board = between, _Unwritten(shm.board)
        self.rank, self.size, self.where = between.rank, between.size, between.where
        self.timeout_s: float = shm.timeout_s

    def progress(self) -> None:
        """The rank's own sends are its own thread's."""

    def statuses(self, message: str) -> Sequence[Status | None]:
        """Every rank's last call."""
        return self._between.statuses(message)

    def dead(self, ranks: Sequence[int]) -> Sequence[int]:
        """Who has died."""
        return self._between.dead(ranks)

    def waited(self, work: Any) -> None:
        """No send of the rank's."""


class _Unwritten:
    """The board, to read."""

    def __init__(self, board: Board) -> None:
        self.status = Status(board.rank)
        self.is_dead, self.waits, self.describe = board.is_dead, board.waits, board.describe

    def enter(self, status: Status) -> None:
        """Not noted."""

    def leave(self) -> None:
        """Nor that."""

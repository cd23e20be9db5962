"""Checkpoints written behind the training: a rank copies what it saves, goes on, and a thread writes.

    save step 100     step 101        step 102           step 103        save step 200
    copy ┐            agree: all      agree: all         agree: is it    (waits, if it is not over)
         └ thread:    written? no     written? yes       there? yes
           write ─────────────────────┘ └ main's thread: commit

At most one save is in flight: the next one waits for it, as do a stop and the end of a run. While one is,
all ranks agree after each step on how far it is (4 or 8 bytes), in the thread that trains: a thread that
writes calls no collective. What goes wrong surfaces there, on all ranks, with what was there before kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial

import psutil

from partita.train.checkpoints.checkpoint import Saving, stage
from partita.train.checkpoints.pieces import Piece

SPARE = 2.0  # of the host's free memory the copies of its ranks take at most one part in so many
ASK_S = 1.0


class Behind:
    """The saves of one rank. `agree` in what it is given is called by all ranks alike."""

    def __init__(self) -> None:
        self._saving: Saving | None = None
        self._thread = threading.Thread()
        self._error: Exception | None = None
        self._commits = False

    @property
    def in_flight(self) -> bool:
        """Whether a save is not over yet; the same on all ranks."""
        return self._saving is not None

    def start(
        self, saving: Saving, pieces: Iterable[Piece], ranks_here: int = 1, in_files: bool = False
    ) -> None:
        """Copies the pieces and has them written; none may be in flight. Where the host lacks the memory
        for the copies of its `ranks_here` ranks, or they lie `in_files`, which are no smaller than disks, it
        writes them at once, from where they lie."""
        assert not self.in_flight
        if saving.temporary is None:
            return
        self._saving, self._error, self._commits = saving, None, False
        held = list(pieces)
        room = psutil.virtual_memory().available / SPARE / ranks_here
        if saving.ranks.agree(not in_files and sum(p.bytes for p in held) <= room):
            self._run(partial(saving.write, [p.copied() for p in held]))
        else:
            self._run(partial(saving.write, held))
            self.finish()

    def advance(self) -> bool:
        """After a step, on all ranks while a save is in flight: goes on to the next stage once all are
        through with one; True when the save is over. Raises WriteError or CheckpointError on all ranks."""
        saving = self._saving
        if saving is None:
            return True
        if not saving.ranks.agree(not self._thread.is_alive()):
            return False
        self._saving = None  # unless all went well
        assert saving.temporary is not None
        with stage(saving.temporary, saving.ranks):
            if self._error is not None:
                raise self._error
        if self._commits:
            return True
        self._saving, self._commits = saving, True
        self._run(saving.commit)
        return False

    def finish(self) -> None:
        """Waits until the save in flight is over; ranks that are through with a stage ask again, so that
        a slow disk is no lost peer."""
        while not self.advance():
            self._thread.join(ASK_S)

    def _run(self, work: Callable[[], None]) -> None:
        """In a thread that ends with the process; what it raises is kept."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

"""What launcher and ranks of one host tell each other without a message: a small mapped file.

    word 0          a stop was asked for: the signal's number
    word 1          the last step that everybody does before stopping; 0 while open
    word 2 + 3 rank   milliseconds the rank was busy in its newest step
    word 3 + 3 rank   the step it is in
    word 4 + 3 rank   what it does there (an index into ACTIVITIES)

Each word has one writer at a time and is 8 bytes, aligned: readers see an old or a new value. A stop is
agreed without a collective: when rank 0 has finished step s and sees word 0, it states s + 2; no rank can
have finished s + 1, whose gradient norm needs rank 0.

Whoever has it mapped holds it locked: of a run whose launcher was killed before its ranks had joined, nobody.
"""

from __future__ import annotations

import fcntl
import mmap
import struct
from collections.abc import Callable
from pathlib import Path

from partita.comm.protocol import Where

_WORD = struct.Struct("<q")
_HEAD, _EACH = 2, 3
ACTIVITIES = (
    "starting", "data", "count", "forward", "backward", "loss", "optimizer", "evaluation",
    "checkpoint", "finished",
)  # fmt: skip
_NUMBER = {name: number for number, name in enumerate(ACTIVITIES)}


class NotedWhere(Where):
    """A Where whose step and activity are written through as they change, so that the last word of a
    rank that dies is right."""

    __slots__ = ("_note",)

    def __init__(self, note: Callable[[int, str], None]) -> None:
        object.__setattr__(self, "_note", lambda step, activity: None)
        super().__init__()
        object.__setattr__(self, "_note", note)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "activity":
            self._note(self.step, self.activity)


class Control:
    """The mapped file of one run; the launcher creates it, ranks open it.

    `shared` False: a rank that torchrun started has a file of its own, and the ranks exchange what is
    in it by a collective after every step.
    """

    def __init__(
        self, path: Path, num_ranks: int, create: bool = False, shared: bool = True
    ) -> None:
        self.path, self.num_ranks, self.shared = path, num_ranks, shared
        size = _WORD.size * (_HEAD + _EACH * num_ranks)
        if create:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            fcntl.flock(
                file, fcntl.LOCK_SH
            )  # held as long as the map, which has its own handle of it
            self._map = mmap.mmap(file.fileno(), size)

    def _get(self, word: int) -> int:
        return _WORD.unpack_from(self._map, word * _WORD.size)[0]

    def _set(self, word: int, value: int) -> None:
        _WORD.pack_into(self._map, word * _WORD.size, value)

    def ask_stop(self, signal_number: int) -> None:
        """Asks all ranks to stop at the end of a step they agree on."""
        self._set(0, signal_number)

    @property
    def stop_signal(self) -> int:
        """The signal that asked for a stop, or 0."""
        return self._get(0)

    def should_stop(self, rank: int, finished_step: int) -> bool:
        """Whether the rank, having finished a step, must save and leave."""
        if rank == 0 and self.stop_signal and not self._get(1):
            self._set(1, finished_step + (2 if self.num_ranks > 1 else 0))
        last = self._get(1)
        return bool(last) and finished_step >= last

    def report_busy(self, rank: int, seconds: float) -> None:
        """The rank's own compute time of its newest step."""
        self._set(_HEAD + _EACH * rank, int(seconds * 1000))

    def busy_ms(self, rank: int) -> int:
        """What `report_busy` last said."""
        return self._get(_HEAD + _EACH * rank)

    def slowest(self) -> tuple[int, float]:
        """The rank that was busy longest in its newest step, and its seconds."""
        busy = self.busy_s()
        rank = max(range(self.num_ranks), key=lambda r: busy[r])
        return rank, busy[rank]

    def busy_s(self) -> list[float]:
        """Every rank's seconds, as they were last reported."""
        return [self.busy_ms(r) / 1000 for r in range(self.num_ranks)]

    def note(self, rank: int, step: int, activity: str) -> None:
        """Where a rank is: what a launcher says of one that died without a word."""
        self._set(_HEAD + _EACH * rank + 1, step)
        self._set(_HEAD + _EACH * rank + 2, _NUMBER.get(activity, 0))

    def where_of(self, rank: int) -> Where:
        """The rank's Where, noted here as it moves."""
        return NotedWhere(lambda step, activity: self.note(rank, step, activity))

    def where(self, rank: int) -> tuple[int, str]:
        """The step a rank was last seen in, and what it did."""
        step = self._get(_HEAD + _EACH * rank + 1)
        return step, ACTIVITIES[self._get(_HEAD + _EACH * rank + 2)]

    def close(self, remove: bool = False) -> None:
        """The launcher removes the file; the map goes with the process."""
        if remove:
            self.path.unlink(missing_ok=True)

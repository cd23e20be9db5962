"""One owner for a run folder: a file lock that the system frees with its owner, and a note of who.

`.lock` is held by flock, so a killed owner frees it; `.owner.json` says host, pid and when the
process started, for the message, and for folders shared by hosts where flock does not reach.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import filelock
import msgspec
import psutil

from partita.base.errors import BusyError, WriteError

LOCK, OWNER = ".lock", ".owner.json"


class Owner(msgspec.Struct, frozen=True):
    """Who holds a run folder."""

    host: str
    pid: int
    started: float

    def is_alive(self) -> bool | None:
        """Whether the process still runs (a zombie does not); None where another host would have to
        be asked."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


class RunLock:
    """Holds a run folder until `release` or the end of a `with`; one owner at a time.

    `took_over` tells of a dead owner whose lock was taken, else None. Raises BusyError naming host
    and pid of a live owner (or of one on another host, which cannot be asked), WriteError where the
    folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.took_over: str | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(folder / LOCK, blocking=False, thread_local=False)
            self._lock.acquire()
            self._claim()
        except filelock.Timeout as error:
            raise self._busy(self._owner()) from error
        except OSError as error:
            raise WriteError(
                f"cannot write in the run folder {folder}: {error.strerror}", file=str(folder)
            ) from error

    def _claim(self) -> None:
        process = psutil.Process()
        own = Owner(socket.gethostname(), process.pid, process.create_time())
        before = self._owner()
        if before == own:  # who held it still would hold the lock
            before = None
        if before is not None and before.is_alive() is not False:
            self._lock.release()
            raise self._busy(before)
        if before is not None:
            self.took_over = (
                f"{self.folder}: its last owner, pid {before.pid} on {before.host}, is dead: "
                "its lock is taken over"
            )
        (self.folder / OWNER).write_bytes(msgspec.json.encode(own))

    def _owner(self) -> Owner | None:
        try:
            return msgspec.json.decode((self.folder / OWNER).read_bytes(), type=Owner)
        except (FileNotFoundError, msgspec.DecodeError):  # none, or half written by a dead one
            return None

    def _busy(self, owner: Owner | None) -> BusyError:
        who = f"pid {owner.pid} on {owner.host}" if owner else "another process"
        advice = "stop it or choose another name"
        if owner and owner.is_alive() is None:
            advice += f"; if it is dead, remove {self.folder / OWNER}"
        return BusyError(
            f"the run folder {self.folder} is taken by {who}: {advice}", file=str(self.folder)
        )

    def release(self) -> None:
        """Frees the folder; safe to call twice. On a disk that has become read-only the note stays: it must
        not hide why the run ended, and the next start takes a dead owner's lock over."""
        if self._lock.is_locked:
            with suppress(OSError):
                (self.folder / OWNER).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

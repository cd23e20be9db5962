"""The file that the ranks of one host map: who is there, what each does, and room for groups.

    0          magic, ready, number of ranks
    4096       a control page pair a rank: pid, flag | doorbell | last call | how it failed
    then       a ring for every ordered pair of ranks (shm_mail), mapped and filled when first used
    then       groups in the order in which they are made (shm_group)

The file is sparse. Every writer allocates what it is about to write (posix_fallocate never shrinks and
never races), so that a full /dev/shm is an error with a number in it and not a SIGBUS.
Rank 0 makes the file whole under another name and renames it; it is unlinked as soon as all have attached,
so nothing is left behind however the ranks end.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import time
from contextlib import suppress
from pathlib import Path

import torch

from partita.base.errors import CommError, WriteError
from partita.base.units import format_bytes
from partita.comm.processes import is_alive
from partita.comm.protocol import Message, Where
from partita.comm.shm_futex import Doorbells
from partita.comm.table import Status

PAGE = mmap.PAGESIZE
CONTROL = 8192
TICK_S = 0.05  # how often a waiting rank looks whether the others live
_MAGIC = 0x50415254
_BELL, _STATUS, _TEXT, _FAILURE = 64, 128, 192, 1024
_CALL = struct.Struct("=qqdII")  # sequence, step, time, line, length of the text
_DONE = _STATUS + 48
_LEFT, _FAILED = 1, 2


class Region:
    """A mapped stretch of the segment: bytes as a tensor, as raw memory, as 64-bit words, and its address."""

    def __init__(self, segment: Segment, offset: int, length: int) -> None:
        self.segment, self.offset, self.length = segment, offset, length
        segment.allocate(offset + length - PAGE, PAGE)  # the file reaches to the end of the mapping
        self.map = mmap.mmap(segment.fd, length, offset=offset)
        self.raw = memoryview(self.map)
        self.words = self.raw.cast("Q")
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()

    def allocate(self, start: int, length: int) -> None:
        """Makes pages for [start, start + length) of this region."""
        self.segment.allocate(self.offset + start, length)


class Segment:
    """One rank's view of the shared file. See the module."""

    def __init__(self, rank: int, size: int, path: Path, timeout_s: float) -> None:
        self.rank, self.size, self.path, self.timeout_s = rank, size, Path(path), timeout_s
        self.fd = -1
        self._texts: dict[tuple[str, ...], bytes] = {}
        deadline = time.monotonic() + timeout_s
        if rank == 0:
            self._create()
        else:
            self._open(deadline)
        self._meet(deadline)
        first = PAGE + _BELL
        narrow = self.control.raw[first : first + size * CONTROL - _BELL].cast("I")
        address = self.control.address + first
        self.bells = Doorbells(narrow, address, CONTROL, size, rank, TICK_S)

    # Meeting -------------------------------------------------------------------------------------

    @property
    def control_bytes(self) -> int:
        """Length of the header and the ranks' control pages."""
        return PAGE + self.size * CONTROL

    def allocate(self, offset: int, length: int) -> None:
        """Backs [offset, offset + length) of the file with memory; raises WriteError where there is none."""
        try:
            os.posix_fallocate(self.fd, offset, length)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            disk = os.fstatvfs(self.fd)
            free = disk.f_bavail * disk.f_frsize
            raise WriteError(
                f"shared memory is full: rank {self.rank} needs {format_bytes(length)} more and "
                f"{self.path.parent} has {format_bytes(free)} free; enlarge it (docker: --shm-size) or "
                "run with --backend gloo",
                file=str(self.path),
            ) from error

    def _create(self) -> None:
        draft = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        self.fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self.allocate(0, self.control_bytes)
            self._map()
            struct.pack_into("=III", self.control.raw, 0, _MAGIC, 0, self.size)
            self._set_word(self._mine, os.getpid())
            draft.rename(self.path)  # over what a dead run may have left there
        except BaseException:
            with suppress(FileNotFoundError):
                draft.unlink()
            raise

    def _open(self, deadline: float) -> None:
        """Opens the file when rank 0 has made it, and only one whose rank 0 lives."""
        while True:
            with suppress(FileNotFoundError):
                self.fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
                size = os.fstat(self.fd).st_size
                if size >= self.control_bytes:
                    self._map()
                    if self._looks_right():
                        self._set_word(self._mine, os.getpid())
                        return
                os.close(self.fd)
            if time.monotonic() > deadline:
                raise CommError(
                    f"rank 0 did not make {self.path} within {self.timeout_s:g} s: rank {self.rank} "
                    f"cannot join the {self.size} ranks of this host"
                )
            time.sleep(0.002)

    def _looks_right(self) -> bool:
        magic, ready, size = struct.unpack_from("=III", self.control.raw, 0)
        if magic != _MAGIC or ready or not is_alive(self.pid(0)):
            return False
        if size != self.size:
            raise CommError(
                f"{self.path} was made for {size} ranks, rank {self.rank} expects {self.size}: "
                "all ranks of a run name the same world size and their own segment file"
            )
        return True

    def _map(self) -> None:
        self.control = Region(self, 0, self.control_bytes)
        self._mine = PAGE + self.rank * CONTROL

    def _meet(self, deadline: float) -> None:
        """Waits until all have attached. Rank 0 then unlinks the file and says so."""
        while True:
            if self.rank == 0 and all(self.pid(r) for r in range(self.size)):
                self.path.unlink(missing_ok=True)
                self._set_word(4, 1)
            if self._word(4):
                return
            if self.rank and not is_alive(self.pid(0)):
                raise CommError(f"rank 0 (pid {self.pid(0)}) died before all ranks had attached")
            if time.monotonic() > deadline:
                if self.rank == 0:
                    self.path.unlink(missing_ok=True)
                missing = [str(r) for r in range(self.size) if not self.pid(r)]
                raise CommError(
                    f"rank {', '.join(missing) or 0} did not attach to {self.path} within "
                    f"{self.timeout_s:g} s; rank {self.rank} has"
                )
            time.sleep(0.001)

    def _word(self, offset: int) -> int:
        return struct.unpack_from("@I", self.control.raw, offset)[0]  # native: one 32-bit load

    def _set_word(self, offset: int, value: int) -> None:
        struct.pack_into("@I", self.control.raw, offset, value)

    # What each rank is doing ---------------------------------------------------------------------

    def pid(self, rank: int) -> int:
        """The process of a rank, 0 before it attached."""
        return self._word(PAGE + rank * CONTROL)

    def enter(
        self, axis: str, message: Message, sequence: int, where: Where, file: str, line: int
    ) -> None:
        """Writes this rank's last call into its status slot."""
        key = (axis, message.op, message.site, where.phase, file)
        text = self._texts.get(key)
        if text is None:
            if len(self._texts) > 4096:
                self._texts.clear()
            text = "\0".join(key).encode()[: _FAILURE - _TEXT]
            self._texts[key] = text
        raw, at = self.control.raw, self._mine
        _CALL.pack_into(raw, at + _STATUS, sequence, where.step, time.monotonic(), line, len(text))
        raw[at + _TEXT : at + _TEXT + len(text)] = text
        raw[at + _DONE] = 0

    def complete(self) -> None:
        """The last call has come out."""
        self.control.raw[self._mine + _DONE] = 1

    def status(self) -> list[Status]:
        """Every rank's last call; a rank that is writing at this moment may look mixed."""
        return [self._status(r) for r in range(self.size)]

    def _status(self, rank: int) -> Status:
        at, raw = PAGE + rank * CONTROL, self.control.raw
        sequence, step, when, line, length = _CALL.unpack_from(raw, at + _STATUS)
        text = bytes(raw[at + _TEXT : at + _TEXT + length]).decode(errors="replace")
        axis, op, site, phase, file = [*text.split("\0"), *[""] * 5][:5]
        gone = self.flag(rank) == _LEFT or not self.is_alive(rank)
        done = bool(raw[at + _DONE])
        return Status(rank, axis, op, sequence, site, phase, step, done, when, file, line, gone)

    # How each rank ended -------------------------------------------------------------------------

    def flag(self, rank: int) -> int:
        """0 while at work."""
        return self._word(PAGE + rank * CONTROL + 4)

    def has_left(self, rank: int) -> bool:
        """The rank closed its world in good order."""
        return self.flag(rank) == _LEFT

    def leave(self) -> None:
        """This rank closes; a failure it wrote before stays."""
        if self.flag(self.rank) == 0:
            self._set_word(self._mine + 4, _LEFT)
        self.bells.ring(tuple(r for r in range(self.size) if r != self.rank))

    def fail(self, message: str) -> None:
        """Tells the others why this rank stops; the first message stays."""
        if self.flag(self.rank) == _FAILED:
            return
        text = message.encode()[: CONTROL - _FAILURE - 4]
        at = self._mine + _FAILURE
        self.control.raw[at + 4 : at + 4 + len(text)] = text
        self._set_word(at, len(text))
        self._set_word(self._mine + 4, _FAILED)
        self.bells.ring(tuple(r for r in range(self.size) if r != self.rank))

    def failure(self) -> tuple[int, str] | None:
        """(rank, message) of a rank that failed, other than this."""
        for r in range(self.size):
            if r != self.rank and self.flag(r) == _FAILED:
                at = PAGE + r * CONTROL + _FAILURE
                text = bytes(self.control.raw[at + 4 : at + 4 + self._word(at)])
                return r, text.decode(errors="replace")
        return None

    def is_alive(self, rank: int) -> bool:
        """Whether the rank's process exists and is no zombie."""
        return rank == self.rank or is_alive(self.pid(rank))

    def process_state(self, rank: int) -> str:
        """What the kernel says a live rank does, in words."""
        try:
            stat = Path(f"/proc/{self.pid(rank)}/stat").read_text()
        except OSError:
            return "is gone"
        state = stat.rpartition(")")[2].split()[0]
        return {
            "T": "is stopped by a signal",
            "t": "is stopped in a debugger",
            "R": "is computing",
        }.get(state, "is asleep")

    def close(self) -> None:
        """Closes the file; mappings end with the last tensor on them. Safe to call twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.rank == 0:
            with suppress(OSError):
                if self.path.exists() and not self._word(4):
                    self.path.unlink()


def copy_bytes(target: int, source: int, length: int) -> None:
    """Copies between addresses that do not overlap."""
    if length:
        ctypes.memmove(target, source, length)

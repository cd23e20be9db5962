"""Words in shared memory that processes wait on: spin for a moment, then futex.

A word has one writer. On x86 stores become visible in program order, so data written before its word is
there when the word is seen; other architectures give no such promise to plain stores from Python, so
`available` says no there, and gloo is used.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import time

_SYS_FUTEX = 202  # x86_64
_WAIT, _WAKE = 0, 1
SPINS = 60  # about 15 us of looking before sleeping, where ranks outnumber cores
SPINS_OWN_CORE = 400  # about 100 us: less than it takes to be woken, and nobody else wants the core
_NUMBER = ctypes.c_long(_SYS_FUTEX)
_WAKE_ALL = (
    ctypes.c_int(_WAKE), ctypes.c_int(1 << 30), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(0),
)  # fmt: skip


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def available() -> bool:
    """Whether this platform has futexes and ordered stores: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


class Words:
    """32-bit words of a mapped region, from byte `start` on."""

    def __init__(self, region: mmap.mmap, count: int, start: int = 0, spins: int = SPINS) -> None:
        self._spins = spins
        self.view = memoryview(region)[start : start + 4 * count].cast("I")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(region)) + start
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._wakes = [
            (_NUMBER, ctypes.c_void_p(self._address + 4 * i), *_WAKE_ALL) for i in range(count)
        ]

    def set(self, index: int, value: int) -> None:
        """Stores and wakes whoever sleeps on the word."""
        self.view[index] = value & 0xFFFFFFFF
        self._syscall(*self._wakes[index])

    def reached(self, index: int, value: int) -> bool:
        """Whether the word has come to `value`, counting modulo 2^32."""
        return ((self.view[index] - value) & 0xFFFFFFFF) < 0x80000000

    def wait(self, index: int, value: int, seconds: float) -> bool:
        """Waits until the word has come to `value`, for at most `seconds`."""
        for spin in range(self._spins):
            if self.reached(index, value):
                return True
            if spin % 8 == 7:
                os.sched_yield()
        deadline = time.monotonic() + seconds
        while True:
            seen = self.view[index]
            if self.reached(index, value):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            timeout = _Timespec(int(left), int(left % 1 * 1e9))
            address = ctypes.c_void_p(self._address + 4 * index)
            self._syscall(
                _SYS_FUTEX, address, _WAIT, ctypes.c_uint32(seen), ctypes.byref(timeout), None, 0
            )

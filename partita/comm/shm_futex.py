"""Sleeping and waking across processes without a compiler: the futex system call, and a doorbell a rank.

Ordering. A rank publishes by storing data, then one aligned word that only it writes. On x86-64 stores
become visible in program order and loads are not reordered with loads (Intel SDM 3A, 8.2.2; glibc ends
its non-temporal copies with sfence), so a reader who sees the word sees the data. Only a store followed by
a load of another address may be reordered, which is the pair 'publish, then look whether the other
sleeps': `fence` stands between them. AArch64 promises none of this to plain stores and loads; it would
need release stores and acquire loads, which Python does not have: `available` is False there.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading

_FUTEX = 202  # x86-64
_WAIT, _WAKE = 0, 1  # not the private forms: the word is shared between processes
_EVERYBODY = 2**31 - 1
_MASK = 2**32 - 1
_LOCK = threading.Lock()


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def available() -> bool:
    """Whether ranks of this machine can meet in shared memory; where not, gloo serves them."""
    return (
        sys.platform == "linux"
        and platform.machine() in ("x86_64", "AMD64")
        and sys.implementation.name == "cpython"
        and sys.maxsize > 2**32
        and _answers()
    )


def _answers() -> bool:
    """The kernel has the call (a sandbox may refuse it): waking nobody returns 0."""
    word = ctypes.c_uint32(0)
    return _call(ctypes.addressof(word), _WAKE, 1, None, None, 0) == 0


def _load() -> ctypes._NamedFuncPointer | None:  # type: ignore[name-defined]
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).syscall
    function.restype = ctypes.c_long
    function.argtypes = (
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint32,
    )
    return function


_SYSCALL = _load()


def _call(address: int, op: int, value: int, time: object, other: object, last: int) -> int:
    assert _SYSCALL is not None
    return _SYSCALL(_FUTEX, address, op, value, time, other, last)


def fence() -> None:
    """A full barrier: taking a lock is a locked instruction on x86-64, whatever the lock."""
    _LOCK.acquire()
    _LOCK.release()


class Doorbells:
    """One 32-bit word a rank: odd while that rank sleeps or is about to.

        sleeper                              waker
        arm: word = odd s                    store data, store its counter
        fence, look again for work           fence, look at the word
        FUTEX_WAIT while word == s           odd: word = s + 1, FUTEX_WAKE

    Several wakers may store s + 1: the same value. A waker that was late may undo a newer s; the sleeper
    then only wakes once too often, for that waker still calls FUTEX_WAKE. A waker that dies between its
    two steps costs the sleeper one `tick` of its sleep, never more.
    """

    def __init__(
        self, words: memoryview, address: int, stride: int, size: int, rank: int, tick_s: float
    ) -> None:
        self.words = words  # of 32 bits
        self.index = [r * stride // 4 for r in range(size)]
        self.addresses = [address + r * stride for r in range(size)]
        self.mine, self.my_address = self.index[rank], self.addresses[rank]
        self.ticket = 0
        self._time = _Time(0, int(tick_s * 1e9))
        self._time_at = ctypes.addressof(self._time)

    def arm(self) -> None:
        """This rank is about to sleep: whoever publishes from now on rings."""
        self.ticket = (self.ticket + 2) & _MASK | 1
        self.words[self.mine] = self.ticket
        fence()

    def sleep(self) -> None:
        """Sleeps until rung or for one tick; returns at once if rung since `arm`."""
        _call(self.my_address, _WAIT, self.ticket, self._time_at, None, 0)

    def disarm(self) -> None:
        """This rank is awake."""
        self.words[self.mine] = (self.ticket + 1) & _MASK

    def ring(self, ranks: tuple[int, ...]) -> None:
        """Wakes those of `ranks` that sleep; the caller has published before."""
        fence()
        for r in ranks:
            word = self.words[self.index[r]]
            if word & 1:
                self.words[self.index[r]] = (word + 1) & _MASK
                _call(self.addresses[r], _WAKE, _EVERYBODY, None, None, 0)


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1

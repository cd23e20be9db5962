"""The stack of a rank that hangs or crashes, at the end of its log.

faulthandler's handlers are C and take no lock of Python's: they answer while the lock is held by a call that
does not return, in a deadlock, and for the last time as a process crashes.

    in the rank       SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL, and SIGUSR1, which changes nothing
    by the launcher   SIGUSR1 to a rank that hangs, and SIGCONT, before it is killed; by anybody, to look
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import partita

ASK = getattr(signal, "SIGUSR1", None)
ANSWER_S = 1.0  # for a rank to write its stacks
QUIET_S = 0.05  # after which they are whole
TAIL = 1 << 20  # bytes of a log's end that are looked at
SHOWN, KEPT = 3, 16  # frames of a message, and of failure.json
ROOT = f"{Path(partita.__file__).parent}/"
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


def tell_stacks(log: Path) -> None:
    """From now on a crash of this process, and SIGUSR1, leave the stacks of all its threads in the log."""
    with suppress(OSError):
        file = log.open("a", encoding="utf-8")  # faulthandler holds on to it
        faulthandler.enable(file)
        if ASK is not None:
            faulthandler.register(ASK, file, all_threads=True)


def leave_stacks(log: Path) -> None:
    """Writes those of this process now."""
    with suppress(OSError), log.open("a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def size_of(log: Path) -> int:
    """Bytes of a log that are there."""
    with suppress(OSError):
        return log.stat().st_size
    return 0


def asked(pid: int, log: Path) -> list[str]:
    """The frames of a process that hangs, which it is asked for; none where it does not answer."""
    if ASK is None:
        return []
    start = size_of(log)
    with suppress(OSError):
        _signal(pid, ASK)
        os.kill(pid, signal.SIGCONT)  # a stopped one answers before it does anything else
        seen, since = start, time.monotonic()
        until = since + ANSWER_S
        while (now := time.monotonic()) < until and not (seen > start and now - since > QUIET_S):
            time.sleep(0.01)
            if size_of(log) != seen:
                seen, since = size_of(log), time.monotonic()
    return frames(_from(log, start))


def crashed(log: Path, start: int) -> list[str]:
    """The frames of a crash told in a log from byte `start` on."""
    _, fatal, told = _from(log, start).rpartition("Fatal Python error: ")
    return frames(told, crashed=True) if fatal else []


def frames(told: str, crashed: bool = False) -> list[str]:
    """`file:line function` of the first thread, which is told last, or of the one that has `crashed`; the
    innermost first; files of this package by their place in it.

    >>> frames('Thread 0x1 (most recent call first):\\n  File "/a/b.py", line 3 in wait\\n')
    ['/a/b.py:3 wait']
    """
    threads = re.split(r"^(?=(?:Current t|T)hread 0x)", told, flags=re.MULTILINE)[1:]
    current = [t for t in threads if crashed and t.startswith("Current")]
    lines = [line for thread in (current or threads)[-1:] for line in thread.splitlines()]
    found = (_FRAME.match(line) for line in lines)
    return [f"{m[1].replace(ROOT, 'partita/')}:{m[2]} {m[3]}" for m in found if m][:KEPT]


def short(stack: list[str]) -> str:
    """What a message says of it: the innermost frame, and those of this package that led there; led by a
    comma where there is any."""
    ours = [f for f in stack[1:] if f.startswith("partita/")]
    return ", at " + " < ".join([*stack[:1], *ours][:SHOWN]) if stack else ""


def _signal(pid: int, number: int) -> None:
    """To the first thread, where the C library can say so: of a stopped process any thread may take it, and
    the first goes on meanwhile."""
    try:
        ctypes.CDLL(None).tgkill(pid, pid, number)
    except (AttributeError, TypeError):
        os.kill(pid, number)


def _from(log: Path, start: int) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(start, size_of(log) - TAIL))
        return file.read().decode(errors="replace")
    return ""

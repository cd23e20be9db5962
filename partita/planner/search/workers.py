"""One search on several cores: processes forked off it take its open parts one by one, and whatever plan one
of them has seen cuts what all of them look at.

    unit       the meshes of one (tp, sp, split, cp): for these tables of blocks are laid (bound.py), and one
               of fewer parts of a sequence tells those of more. So a worker keeps to its own (tp, sp, split),
               until all have begun; then it helps with what is left
    board      memory that all share: who took which unit, and the keys of the best plans that each saw
    result     of a worker, at its end: its best plans, what it counted, and the tables it laid, for spaces
               that are searched next

The search itself is the first worker. What one of the others had that died it searches again. The plans are
those of one process; how many were refused, and how many cut, follows from what was seen first, but not
their sum.

Processes are forked only where that is safe: off a process with one thread (but for one that draws a line
on a terminal and has no lock that is wanted here), without torch, on Linux; and where it may use more cores.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any
from zlib import crc32

import numpy as np

from partita.base.errors import Problem
from partita.planner.bounds.bound import ENDLESS, Bounds
from partita.planner.bounds.table import Table
from partita.planner.search.nodes import INF, Key, Node, Queue
from partita.planner.space import MeshChoice

MOST = 8  # processes
WORTH = 20_000_000  # plans that are left, from which on a search is shared
ROWS = 64  # plans of a worker that others know of
GRACE_S = 5.0  # behind the budget, for a node that takes long


def processes() -> int:
    """How many this process may become."""
    if not sys.platform.startswith("linux") or "torch" in sys.modules:
        return 1
    others = [t for t in threading.enumerate() if t is not threading.current_thread()]
    if any(type(t).__module__.partition(".")[0] != "rich" for t in others):
        return 1
    return min(len(os.sched_getaffinity(0)), MOST)


class Board:
    """What workers share. `top`: so many best plans are looked for."""

    def __init__(self, workers: int, units: int, top: int) -> None:
        self.top = top
        sizes = (8 * workers, 8 * units, 24 * workers * ROWS)
        self._memory = mmap(-1, sum(sizes))
        self.published, self.taken = (
            np.frombuffer(self._memory, np.int64, n, at)
            for n, at in ((workers, 0), (units, sizes[0]))
        )
        rows = np.frombuffer(self._memory, np.float64, 3 * workers * ROWS, sizes[0] + sizes[1])
        self._rows = rows.reshape(workers, ROWS, 3)
        self._rows[:] = INF
        self._lock = os.memfd_create("units")
        self._seen, self._limit = b"", None

    def close(self) -> None:
        """No unit is taken any more."""
        os.close(self._lock)

    def take(self, me: int, groups: Sequence[object]) -> int | None:
        """A unit that nobody has: of the worker's own groups, else of one that nobody has begun, else of that
        with most left, its last. None where all are taken."""
        import fcntl  # which only systems have that may fork

        fcntl.lockf(self._lock, fcntl.LOCK_EX)  # which ends with the process that has it
        try:
            by = self.taken.tolist()
            free = Counter(g for g, b in zip(groups, by, strict=True) if not b)
            mine = {g for g, b in zip(groups, by, strict=True) if b == me + 1}
            begun = {g for g, b in zip(groups, by, strict=True) if b}
            if not free:
                return None
            wanted = [g for g in free if g in mine] or [g for g in free if g not in begun]
            group = wanted[0] if wanted else free.most_common(1)[0][0]
            left = [i for i, g in enumerate(groups) if g == group and not by[i]]
            unit = left[0] if wanted else left[-1]
            self.taken[unit] = me + 1
            return unit
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def give_back(self, worker: int) -> None:
        """What a worker had is nobody's."""
        self.taken[self.taken == worker + 1] = 0
        self._rows[worker] = INF
        self.published[worker] += 1

    def publish(self, me: int, key: Key, line: str) -> None:
        """Tells the others of a plan: of many the worst makes room."""
        rows = self._rows[me]
        at = max(range(ROWS), key=lambda i: tuple(rows[i]))
        if tuple(rows[at, :2]) > key:
            rows[at, 0] = INF
            rows[at, 1:] = key[1], crc32(line.encode())
            rows[at, 0] = key[0]
            self.published[me] += 1

    @property
    def limit(self) -> Key | None:
        """The key of the last of the best plans, where so many are known; one that two know counts once."""
        seen = self.published.tobytes()
        if seen != self._seen:
            rows = {tuple(row) for row in self._rows.reshape(-1, 3).tolist() if row[0] < INF}
            known = sorted(rows)
            self._limit = known[self.top - 1][:2] if len(known) >= self.top else None
            self._seen = seen
        return self._limit


@dataclass
class Result:
    """Of a worker: keys and lines of the best plans that it knows; what it counted; seconds of the clock when
    it saw the best; tables by what each depends on."""

    plans: list[tuple[Key, str]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    simulated: int = 0
    complete: bool = True
    first_s: float = 0.0
    tables: dict[Any, Table | Problem] = field(default_factory=dict)


def learn(bounds: Bounds, tables: Mapping[Any, Table | Problem]) -> None:
    """Takes in tables that another process has made."""
    for key, found in tables.items():
        if key not in bounds.tables:
            bounds.tables[key] = found
            tp, sp, split, cp, shape, tokens = key
            mesh, endless = MeshChoice(1, 1, cp, tp, sp, split), tokens.micro == ENDLESS
            if isinstance(found, Table) and endless:
                bounds.rings.learn(mesh, shape, tokens, found)
            if tokens.every == 1 and bounds.space.offload.to == "none":
                bounds.read.learn(bounds.asked(mesh, shape, tokens), endless, found)


class Crew:
    """The workers of a search over some nodes; its queue knows what all have seen."""

    def __init__(
        self, nodes: Sequence[Node], usual: Sequence[Node], workers: int, queue: Queue
    ) -> None:
        units: dict[tuple[object, ...], list[Node]] = {}
        for node in sorted(nodes, key=lambda n: (n.mesh.cp, n.seconds)):
            m = node.mesh
            units.setdefault((m.tp, m.sp, m.split, m.cp), []).append(node)
        groups = Counter[object]()
        for key, some in units.items():
            groups[key[:3]] += len(some)
        order = sorted(units, key=lambda k: (-groups[k[:3]], k))
        self.units = [units[key] for key in order]
        self.groups = [key[:3] for key in order]
        self.workers, self.me = workers, 0
        self._usual = _dealt(usual, workers)
        self._board, self._parent = Board(workers, len(order), queue.top), os.getpid()
        self._children: dict[int, tuple[int, int]] = {}  # by the worker: process, pipe
        for key, plan in queue.best:
            self.publish(key, plan.plan)
        queue.shared = self
        self._queue = queue

    def begin(self, work: Callable[[Crew], Result]) -> None:
        """Forks the others, each of which does this `work`."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _stops())
        try:  # what a signal raises is for the parent
            for me in range(1, self.workers):
                there, back = os.pipe()
                try:
                    pid = os.fork()
                except OSError:  # no room for one more
                    os.close(there)
                    os.close(back)
                    return
                if not pid:
                    self._run(me, back, work)
                os.close(back)
                self._children[me] = pid, there
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _run(self, me: int, pipe: int, work: Callable[[Crew], Result]) -> None:
        """A worker's life: it ends with its parent, and never returns."""
        try:
            for number in _stops():
                signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _stops())
            self.me = me
            told = pickle.dumps(work(self), pickle.HIGHEST_PROTOCOL)
            with os.fdopen(pipe, "wb") as out:
                out.write(told)
            os._exit(0)
        except BaseException:
            os._exit(1)  # its parent searches again what it had, and tells what is wrong

    @property
    def limit(self) -> Key | None:
        """The key of the last of the best plans that any saw. Here a worker ends whose search is gone."""
        if self.me and os.getppid() != self._parent:
            os._exit(1)
        return self._board.limit

    def publish(self, key: Key, line: str) -> None:
        """Tells the others of a plan."""
        self._board.publish(self.me, key, line)

    def usual(self) -> list[Node]:
        """Its own of the usual meshes."""
        return self._usual[self.me]

    def take(self) -> list[Node] | None:
        """The nodes of a unit that nobody has; None where none is left."""
        at = self._board.take(self.me, self.groups)
        return None if at is None else self.units[at]

    def results(self, until: float) -> list[Result]:
        """Of all workers that came to their end, until the clock says so; what another had is nobody's."""
        found = []
        for me in list(self._children):
            told = _read(self._children[me][1], until + GRACE_S)
            self._end(me)
            if told is None:
                self._board.give_back(me)
            else:
                found.append(told)
        return found

    def _end(self, me: int) -> None:
        pid, pipe = self._children.pop(me)
        os.close(pipe)
        os.kill(pid, signal.SIGKILL)  # it has said all, or never will
        os.waitpid(pid, 0)

    def end(self) -> None:
        """Leaves nothing behind."""
        for me in list(self._children):
            self._end(me)
        self._board.close()
        self._queue.shared = None


def _dealt(usual: Sequence[Node], workers: int) -> list[list[Node]]:
    """The usual meshes by worker: of each (tp, sp, split) one has all, if there are as many."""
    for fine in (False, True):
        keys = [(m.tp, m.sp, m.split, m.cp * fine) for m in (n.mesh for n in usual)]
        at = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        if len(at) >= workers:
            break
    return [
        [n for n, key in zip(usual, keys, strict=True) if at[key] % workers == me]
        for me in range(workers)
    ]


def _stops() -> tuple[signal.Signals, ...]:
    """The signals that end a search (cli/main.py); not all are everywhere."""
    return signal.SIGINT, signal.SIGTERM, signal.SIGALRM


def _read(pipe: int, until: float) -> Result | None:
    """What a worker says before the clock says so; None where it ended without."""
    parts = []
    while (left := until - time.perf_counter()) > 0:
        if select.select([pipe], [], [], left)[0]:
            part = os.read(pipe, 1 << 20)
            if not part:
                break
            parts.append(part)
    try:
        return pickle.loads(b"".join(parts))
    except (EOFError, pickle.UnpicklingError):
        return None

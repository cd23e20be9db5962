"""What a rank really holds: storages entered when they are born and dropped when they are freed.

On CPU a dispatch mode sees every operation of a step, so every storage that torch makes; a weak reference
to the storage tells when it is freed. Sizes are the storages', never computed from shapes. It slows a step
down, so that only a few steps are measured; their peak is reported for the steps between. On CUDA the
caching allocator knows the peak of every step, and the mode only tells the categories apart.

A storage is what it was claimed as (parameters, gradients, optimizer); else `activations` once
autograd keeps it, or when it outlives the forward it was born in, or the input half of a backward; else
`buffers`: alive inside an operation, a collective or a backward. What was there before the step and
nobody claims is `untagged`. Views of mapped files (tokens on disk, the segment that ranks share) are no
allocation: their pages are the host's, and most are never touched.
"""

from __future__ import annotations

import gc
import re
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from partita.comm.protocol import Where
from partita.record.ledger import Ledger

KEEPING = ("F", "I")  # phases that leave behind what another one reads: B, or W


def mapped_files() -> list[tuple[int, int]]:
    """First and end address of every mapped file of this process, sorted; empty where the system does
    not say (Linux does)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        match = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ ([0-9]+)", line)
        if match and match[3] != "0":  # anonymous memory has inode 0
            found.append((int(match[1], 16), int(match[2], 16)))
    return sorted(found)


def _with_subclasses(kind: type) -> set[type]:
    """A class and all that inherit from it."""
    return {kind}.union(*map(_with_subclasses, type.__subclasses__(kind)))


class Allocations(TorchDispatchMode):
    """The storages of one rank's process on one kind of device.

    Of a rank that is not `alone` in its process nothing is untagged: what it neither made nor claims may be
    another thread's. Enter it as a context (through `watch`) while something runs. `at_peak` are the bytes by
    category when their sum was largest; `on_peak` is called then. `most` are each category's own largest.
    """

    watches_storages = (
        True  # and nothing else: products keep their kernels (parallel/kernels/product.py)
    )

    def __init__(self, where: Where, device: str = "cpu", alone: bool = True) -> None:
        super().__init__()
        self.where, self.device, self.alone = where, device, alone
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.host: Counter[str] = Counter()  # the same of the host's arena, even where both are RAM
        self.host_at_peak: Counter[str] = Counter()
        self.total = self.peak = 0
        self.on_peak: Callable[[], None] | None = None
        self._mapped = mapped_files()
        # storage -> bytes, category, the arena's counter, weak reference
        self._live: dict[int, tuple[int, str, Counter[str], Any]] = {}
        self._born: set[int] = set()  # in this forward or input half, not yet kept
        self._resized: list[Tensor] = []

    def resizes(self, tensors: Iterable[Tensor]) -> None:
        """Says that these claimed tensors' storages are resized in place, as long as this is used."""
        self._resized = [t for t in tensors if t.untyped_storage()._cdata in self._live]

    def claim(self, category: str, tensors: Iterable[Tensor], arena: str = "") -> None:
        """Says what these tensors' storages are, for as long as they live; `arena`: where they lie, if they
        are new."""
        for t in tensors:
            with self.where.on(arena or self.where.arena):
                self._enter(t, category)
            if (key := t.untyped_storage()._cdata) in self._live:
                self._move(key, category)

    def claimed(self) -> None:
        """All is claimed that is to be: what each category holds now counts."""
        self.most |= self.held

    def adopt(self) -> None:
        """Enters every tensor that Python can reach and nobody has claimed, as untagged.

        Tensors are found through their classes. A list of all objects would hold tuples that other threads
        are making, and CPython makes none longer or shorter that somebody else holds: `tuple(...)` raises
        SystemError there.
        """
        self._mapped = mapped_files()
        if not self.alone:
            return
        for found in gc.get_referrers(*_with_subclasses(Tensor)):
            if issubclass(type(found), Tensor):
                self._enter(found, "untagged")

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Measures what runs inside; the peak starts anew."""
        self._mapped = mapped_files()
        self._read_again()
        self._note_peak(fresh=True)
        with self, saved_tensors_hooks(self.kept, lambda t: t):
            yield
        self._born.clear()

    def leaves_behind(self) -> None:
        """A stage's forward, or the input half of its backward, has ended: what it made and is still there
        waits for its backward, or its weight half."""
        for key in self._born:
            if key in self._live:
                self._keep(key)
        self._born.clear()

    def backward_over(self) -> None:
        """A stage's backward has ended: what it made is no activation of the forward that follows."""
        self._born.clear()

    def ledger(self, rank: int, arena: str = "device") -> Ledger:
        """The peak of the newest `watch` in the device's arena, or in the host's."""
        found = self.at_peak if arena == "device" else self.host_at_peak
        most = {c: n for c, n in self.most.items() if n} if arena == "device" else {}
        return Ledger(rank, arena, {c: n for c, n in found.items() if n}, most)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and enters the storages of its arguments and results."""
        kwargs = kwargs or {}
        self._enter_all(args, "untagged")
        out = func(*args, **kwargs)
        self._enter_all(kwargs.values(), "untagged")
        self._enter_all((out,), "buffers")
        return out

    def _enter_all(self, values: Iterable[Any], category: str) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._enter(value, category)
            elif isinstance(value, list | tuple):
                self._enter_all(value, category)

    def _enter(self, t: Tensor, category: str) -> None:
        on_host = self.where.arena != "device" and t.device.type == "cpu"
        if not (t.device.type == self.device or on_host) or t.layout is not torch.strided:
            return
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is None and category == "untagged" and not self.alone:
            return
        if known is None:
            if not storage.resizable() and self._is_mapped(storage.data_ptr()):
                return
            gone = weakref.ref(storage, lambda _, key=key: self._freed(key))
            arena = self.host if on_host else self.held
            if arena is self.host and category == "buffers" and self.where.phase == "F":
                category = "activations"  # what F has put there waits for B
            self._live[key] = (size, category, arena, gone)
            if category == "buffers" and self.where.phase in KEEPING and arena is self.held:
                self._born.add(key)
        elif known[0] != size:  # resized in place
            category, arena = known[1], known[2]
            self._live[key] = (size, category, arena, known[3])
            size -= known[0]
        else:
            return
        self._count(arena, category, size)

    def _count(self, arena: Counter[str], category: str, size: int) -> None:
        arena[category] += size
        if arena is not self.held:
            if self.host.total() > self.host_at_peak.total():
                self.host_at_peak = Counter(self.host)
            return
        self.total += size
        self.most[category] = max(self.most[category], arena[category])
        if self.total > self.peak:
            self._read_again()
        if self.total > self.peak:
            self._note_peak()

    def _read_again(self) -> None:
        """Sizes of storages that are resized in place, which makes no operation."""
        for t in self._resized:
            storage = t.untyped_storage()
            known, category, arena, gone = self._live[storage._cdata]
            size = storage.nbytes() - known
            if size and arena is self.held:
                self._live[storage._cdata] = (known + size, category, arena, gone)
                arena[category] += size
                self.total += size

    def _freed(self, key: int) -> None:
        entry = self._live.pop(key, None)
        if entry is not None:
            self._count(entry[2], entry[1], -entry[0])

    def _keep(self, key: int) -> None:
        self._move(key, "activations")
        self.most["activations"] = max(self.most["activations"], self.held["activations"])

    def _move(self, key: int, category: str) -> None:
        size, before, arena, gone = self._live[key]
        if before != category:
            self._live[key] = (size, category, arena, gone)
            arena[before] -= size
            arena[category] += size

    def kept(self, t: Tensor) -> Tensor:
        """Autograd saves a tensor; what a replay saves in backward is gone when that is over."""
        if self.where.phase == "F" and t.device.type == self.device:
            self._enter(t, "buffers")
            key = t.untyped_storage()._cdata
            if key in self._live and self._live[key][1] == "buffers":
                self._keep(key)
        return t

    def _is_mapped(self, address: int) -> bool:
        """Whether memory that torch did not allocate belongs to a mapped file."""
        place = bisect_right(self._mapped, (address, 2**64)) - 1
        return place >= 0 and address < self._mapped[place][1]

    def _note_peak(self, fresh: bool = False) -> None:
        self.peak = self.total
        self.at_peak = Counter(self.held)
        if fresh:
            self.host_at_peak, self.most = Counter(self.host), Counter(self.held)
        if self.on_peak is not None and not fresh:
            self.on_peak()

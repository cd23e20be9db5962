"""Silent data corruption: a step computed twice on every rank, and compared bit by bit, before the update.

    first     forward and backward of the step, for what it leaves; nothing of it is recorded
    second    the step itself
    compared  what each rank hands in to every call of another, the loss, the reduced gradients
    replicas  weights that several ranks hold, masters and working copies, with each other

Values are functions of seed and place, sums go in one order: what differs was computed wrong once. The rank
that handed in something else first is the one; what others hand in later follows from it. On one host that is
told by one clock, between hosts from a meeting on.

Communicates, outside any step as a checkpoint does ('checkpoint:exchange'), all_gathers over world: 8 bytes,
8 * (3 + TEXT), then 16 for each of a rank's pieces. The first pass sends what the step sends.
"""

from __future__ import annotations

import ctypes
import math
import socket
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import xxhash
from torch import Tensor

from partita.base.errors import CorruptError
from partita.comm.protocol import Where
from partita.train.build import Built
from partita.train.step import Model, StepBatch

TEXT = 200  # bytes of a name that are exchanged
HANDED_IN, LEFT, ALIKE = 1, 2, 9  # what differs, first to last
Call = tuple[str, str, int]  # site, phase, how many before it


@dataclass
class Pass:
    """What a rank hands in during one pass, call by call: digest and when; and what is left in the end."""

    calls: dict[Call, tuple[int, float, int]] = field(default_factory=dict)  # and its microbatch
    left: dict[str, int] = field(default_factory=dict)
    _before: Counter[tuple[str, str]] = field(default_factory=Counter)

    def see(self, where: Where, site: str, x: Tensor) -> None:
        """A call that is about to be made."""
        at = (site, where.phase)
        microbatch = where.microbatch if where.phase != "step" else -1
        self.calls[*at, self._before[at]] = digest(x), time.perf_counter(), microbatch
        self._before[at] += 1

    def end(self, model: Model, loss: float) -> None:
        """The pass is over."""
        self.left = {f"gradient of {u.name}": digest(u.gradient) for u in model.units}
        self.left["loss"] = xxhash.xxh3_64_intdigest(struct.pack("<d", loss))


@dataclass
class Replay:
    """Of one rank; every rank calls it alike. `every`: steps between two (0: never); `one_clock`: all ranks
    are of one host."""

    built: Built
    every: int
    one_clock: bool
    first: Pass | None = None
    second: Pass = field(default_factory=Pass)
    _since: float = 0.0

    def is_due(self, step: int) -> bool:
        """Whether a step (from 1) is computed twice."""
        return self.every > 0 and step % self.every == 0

    def rehearse(self, batch: StepBatch) -> None:
        """The first pass. Raises as forward_backward does."""
        model, first = self.built.model, Pass()
        seen = model.products.seen()
        try:
            self._watch(first)
            first.end(model, model.forward_backward(batch))
        finally:
            self._watch(None)
            model.products.restore(seen)
        self.first, self.second = first, Pass()
        self.built.exchange((0,))  # all begin the second together
        self._since = 0.0 if self.one_clock else time.perf_counter()
        self._watch(self.second)

    def compare(self, loss: float) -> None:
        """After the second pass, if this step had a first. Raises CorruptError, naming one, on all ranks."""
        first, self.first = self.first, None
        if first is None:
            return
        self._watch(None)
        model, exchange = self.built.model, self.built.exchange
        self.second.end(model, loss)
        pieces = list(replicas(model, self.built.context.rank))
        told = exchange((*self._differs(first).words(), len(pieces)))
        step = self.built.context.where.step
        _raise_first([_Differs.of(words[:-1]) for words in told], step)
        longest = max(words[-1] for words in told)
        padded = [n for piece in pieces for n in piece] + [0] * (2 * (longest - len(pieces)))
        found = exchange(padded)
        rows = [
            list(zip(row[::2], row[1::2], strict=True))[: words[-1]]
            for row, words in zip(found, told, strict=True)
        ]
        self._hold_replicas(rows, step)

    def _watch(self, made: Pass | None) -> None:
        self.built.context.recorder.watch = None if made is None else made.see

    def _differs(self, first: Pass) -> _Differs:
        """The first that this rank has twice and not alike."""
        calls, again = first.calls, self.second.calls
        nothing = (0, self._since, -1)  # of a call that was not made again
        wrong = [
            (*again.get(key, nothing)[1:], key)
            for key in {**calls, **again}
            if calls.get(key, nothing)[0] != again.get(key, nothing)[0]
        ]
        if wrong:
            at_s, microbatch, (site, phase, _) = min(wrong)
            at = f"{phase}, microbatch {microbatch}" if microbatch >= 0 else phase
            return _Differs(HANDED_IN, int((at_s - self._since) * 1e9), f"{site} ({at})")
        left = [name for name, x in first.left.items() if x != self.second.left[name]]
        return _Differs(LEFT, 0, left[0]) if left else _Differs(ALIKE, 0, "")

    def _hold_replicas(self, rows: Sequence[Sequence[tuple[int, int]]], step: int) -> None:
        """Ranks that hold one piece of a weight hold the same bits, or it is told which do not."""
        held: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for rank, row in enumerate(rows):
            for key, value in row:
                held[key].append((rank, value))
        for key, values in held.items():
            counts = Counter(value for _, value in values)
            if len(counts) == 1:
                continue
            (most, often), *others = counts.most_common()
            sure = often > others[0][1]
            odd = [r for r, value in values if not sure or value != most]
            named = [self._name_of(key), *(f"rank {r}" for r in odd)]
            ranks = " and ".join(named[1:])
            who = f"{ranks}, unlike the others," if sure else f"one of {ranks}"
            raise _error(
                f"weight replicas differ before the update of step {step}: {who} holds wrong bits of "
                f"{named[0]}",
                odd[0],
                named[0],
            )

    def _name_of(self, key: int) -> str:
        """The name of a piece, told by a rank that holds it: all call this together."""
        own = {k: name for name, k, _ in _pieces(self.built.model, self.built.context.rank)}
        text = own.get(key, "").encode()[:TEXT]
        told = self.built.exchange([*text, *[0] * (TEXT - len(text))])
        return next(bytes(filter(None, row)).decode(errors="replace") for row in told if any(row))


@dataclass(frozen=True, order=True)
class _Differs:
    """What a rank has found to differ, when, and what that is."""

    kind: int
    at_ns: int
    name: str

    def words(self) -> list[int]:
        text = f"{self.name} on {socket.gethostname()}".encode()[:TEXT]
        return [self.kind, self.at_ns, *text, *[0] * (TEXT - len(text))]

    @staticmethod
    def of(words: Sequence[int]) -> _Differs:
        text = bytes(w for w in words[2:] if w).decode(errors="replace")
        return _Differs(words[0], words[1], text)


def _raise_first(told: Sequence[_Differs], step: int) -> None:
    first = min(told)
    if first.kind == ALIKE:
        return
    rank, (name, _, host) = told.index(first), first.name.rpartition(" on ")
    what = f"hands in at {name}" if first.kind == HANDED_IN else f"has as {name}"
    raise _error(
        f"step {step}, computed twice, gives two answers: the first is what rank {rank} on {host} {what}",
        rank,
        name.split(" (")[0].removeprefix("gradient of "),
    )


def _error(text: str, rank: int, key: str) -> CorruptError:
    error = CorruptError(
        f"{text}; nothing was updated: take that device out of the job, then start it again, from a "
        "checkpoint that is known to be good",
        key=key,
    )
    error.rank = rank
    return error


def digest(x: Tensor) -> int:
    """64 bits of a tensor's bytes, in row-major order. Not by numpy: memory that it has seen can no longer be
    resized."""
    here = x.detach().cpu().contiguous()
    if not here.nbytes:
        return 0
    return xxhash.xxh3_64_intdigest((ctypes.c_char * here.nbytes).from_address(here.data_ptr()))


def replicas(model: Model, rank: int) -> Iterator[tuple[int, int]]:
    """(what it is, its bits) of every piece of weights that this rank holds, as signed words."""
    for _, key, value in _pieces(model, rank):
        yield key, _signed(value)


def _pieces(model: Model, rank: int) -> Iterator[tuple[str, int, int]]:
    """Name, key and digest of masters, by their boxes, and of working copies that are stored whole."""
    for unit in model.units:
        for name, *_ in unit.places:
            for piece in model.laid.pieces(name, rank):
                n = math.prod(b - a for a, b in piece.box)
                part = unit.master[piece.start : piece.start + n]
                yield name, _key("master", name, piece.box), digest(part)
        if unit.spec.stage < 3 and unit.values.tensor is not None:
            for name, first, n in unit.places:
                layout = model.laid.layouts[name].alone
                boxes = [p.box for p in layout.pieces(model.laid.mesh, rank)]
                part = unit.values.tensor[first : first + n]
                yield name, _key("working", name, boxes), digest(part)


def _key(*what: object) -> int:
    return _signed(xxhash.xxh3_64_intdigest(repr(what).encode()))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
